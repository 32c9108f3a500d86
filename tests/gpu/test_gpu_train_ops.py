"""The operations of a training step on a GPU, forward and backward, against their references in float64."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from abyssal.config import ModelConfig
from abyssal.model.layers import MLP
from abyssal.model.packing import Packing
from abyssal.model.transformer import Transformer
from abyssal.ops.counts import count_picks
from abyssal.ops.fork import fork
from abyssal.ops.gate import gate
from abyssal.ops.gated import gated, gated_halves
from abyssal.ops.latent_attention import latent_attention
from abyssal.ops.linear import linears
from abyssal.ops.norm import add_norm, norm_beside, rms_norm
from abyssal.ops.paged import cumulative
from abyssal.ops.rotary import norm_rotate, rotate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
dtypes = st.sampled_from(list(TOLERANCE))
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="no Hopper GPU"
)


def error(out: Tensor, exact: Tensor) -> float:
    assert out.isfinite().all() and out.shape == exact.shape
    return float((out.double() - exact).norm() / exact.norm().clamp(min=1e-2))


def both(run: Callable[..., tuple[Tensor, ...]], leaves: list[Tensor], path: str | None) -> list[Tensor]:
    """Outputs and gradients on a path, the gradient that comes in the same for every path."""
    inputs = [t.detach().requires_grad_() for t in leaves]
    out = run(*inputs, path)
    g = torch.Generator("cuda").manual_seed(7)
    above = [torch.randn(t.shape, generator=g, device="cuda").bfloat16().to(t.dtype) for t in out]
    return [*(t.detach() for t in out), *torch.autograd.grad(out, inputs, above)]


def same(run: Callable[..., tuple[Tensor, ...]], leaves: list[Tensor], slow: str = "reference") -> None:
    """What is chosen gives what `slow` gives in float64, and the same bits twice."""
    found, again = (both(run, leaves, None) for _ in range(2))
    exact = both(run, [t.double() for t in leaves], slow)
    for a, b, c in zip(found, exact, again, strict=True):
        assert error(a, b) < TOLERANCE[leaves[0].dtype]
        assert torch.equal(a, c)


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 3000), st.sampled_from([1, 7, 64, 300, 1024, 2816, 7168]), dtypes, st.booleans())
def test_norm(n: int, D: int, dtype: torch.dtype, sliced: bool) -> None:
    x, y, weight = draw(n, D + 5, dtype=dtype), draw(n, D, dtype=dtype), draw(D, dtype=dtype)
    x = x[:, 2 : 2 + D] if sliced else x[:, :D].contiguous()
    same(lambda x, w, path: (rms_norm(x, w, 1e-5, path),), [x, weight])
    same(lambda x, y, w, path: add_norm(x, y, w, 1e-5, path), [x, y, weight])
    same(lambda x, w, path: norm_beside(x, w, 1e-5, path), [x, weight])
    same(lambda x, path: tuple((i + 1) * t for i, t in enumerate(fork(x, 3, path))), [x])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2000), st.sampled_from([1, 8, 33, 512, 1500, 2816]), dtypes)
def test_gated(n: int, F: int, dtype: torch.dtype) -> None:
    ab = draw(n, 2 * F + 8, dtype=dtype)
    same(lambda a, b, path: (gated(a, b, path),), [ab[:, :F], ab[:, F : 2 * F]])
    same(lambda ab, path: (gated_halves(ab, path),), [ab[:, : 2 * F]])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2000), st.sampled_from([2, 6, 32, 64, 128]), st.integers(1, 17), dtypes)
def test_rotation(n: int, R: int, H: int, dtype: torch.dtype) -> None:
    q, kv, weight = draw(n, H, 24 + R, dtype=dtype), draw(n, 40 + R, dtype=dtype), draw(40, dtype=dtype)
    angles = 6 * torch.rand(n, R // 2, device="cuda")
    cos, sin = angles.cos(), angles.sin()
    same(lambda q, path: (rotate(q[..., 24:], cos, sin, path),), [q])
    same(lambda kv, w, path: norm_rotate(kv, w, 1e-6, cos, sin, path), [kv, weight])


V2_LITE = ("softmax", 1, 1, 6, False, 1.0, "best")
V3 = ("sigmoid", 8, 4, 8, True, 2.5, "best two")
SHAPE_961M = ("sigmoid", 1, 1, 4, True, 1.0, "best two")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("T, D, E, rest", [(1, 64, 16, V2_LITE), (700, 300, 64, V2_LITE), (513, 512, 256, V3),
                                           (4096, 1024, 32, SHAPE_961M)])  # fmt: skip
def test_gradients_of_the_gate(T: int, D: int, E: int, rest: tuple, dtype: torch.dtype) -> None:  # type: ignore[type-arg]
    """Where the choice is the reference's: near-ties are left out of both losses."""
    x, weight = draw(T, D, dtype=dtype), (draw(E, D) / D**0.5).to(dtype)
    bias = torch.randn(E, device="cuda") / 10 if rest is not V2_LITE else None
    exact = gate(x.double(), weight.double(), None if bias is None else bias.double(), *rest, path="reference")
    with torch.no_grad():
        picked = gate(x, weight, bias, *rest)[1]
    agree = (picked.sort(-1).values == exact[1].sort(-1).values).all(-1)
    assert agree.float().mean() > 0.98
    spread = torch.arange(E, device="cuda").cos()
    grads = []
    for path, wide in ((None, x.dtype), ("reference", torch.float64)):
        leaves = [t.to(wide).requires_grad_() for t in (x, weight)]
        more = None if bias is None else bias.to(torch.promote_types(wide, torch.float32))
        weights, indices, scores = gate(*leaves, more, *rest, path=path)
        loss = ((weights * spread[indices]).sum(-1) * agree).sum() + (scores * spread).sum()
        grads.append(torch.autograd.grad(loss, leaves))
    for a, b in zip(*grads, strict=True):
        assert error(a, b) < (4e-3 if dtype == torch.bfloat16 else 1e-4)


@hopper
@pytest.mark.parametrize("lens", [[300, 300], [1, 0, 300, 77, 513], [2048]], ids=str)
@pytest.mark.parametrize("widths", [(128, 64, 128), (192, 64, 256), (40, 24, 72)], ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_latent_attention(lens: list[int], widths: tuple[int, int, int], deterministic: bool) -> None:
    (N, R, V), T, H, cu = widths, sum(lens), 3, cumulative(lens).cuda()
    q, kv, k_rope = draw(T, H, N + R), draw(T, H, N + V), draw(T, R)
    angles = 6 * torch.rand(T, R // 2, device="cuda")
    cos, sin = angles.cos(), angles.sin()

    def run(q: Tensor, kv: Tensor, k_rope: Tensor, path: str | None) -> tuple[Tensor, ...]:
        wide = [t.to(torch.promote_types(q.dtype, torch.float32)) for t in (cos, sin)]
        return (latent_attention(q, kv, k_rope, *wide, cu, max(lens), (N + R) ** -0.5, path),)

    torch.use_deterministic_algorithms(deterministic)
    try:
        found = both(run, [q, kv, k_rope], None)
    finally:
        torch.use_deterministic_algorithms(False)
    exact = both(run, [t.double() for t in (q, kv, k_rope)], "split")
    for a, b in zip(found, exact, strict=True):
        assert error(a, b) < 8e-3


@pytest.mark.parametrize("T, K, E", [(1, 1, 3), (5000, 4, 32), (33000, 8, 256)])
def test_picks_are_counted(T: int, K: int, E: int) -> None:
    indices, live = torch.randint(0, E, (T, K), device="cuda"), torch.rand(T, device="cuda") > 0.3
    for mask in (None, live):
        assert torch.equal(count_picks(indices, E, mask), count_picks(indices, E, mask, "reference"))


def test_maps_of_one_input() -> None:
    def run(x: Tensor, a: Tensor, b: Tensor, path: str | None) -> tuple[Tensor, ...]:
        return linears(x, a, b) if path is None else (x @ a.T, x @ b.T)

    same(run, [draw(700, 256), draw(384, 256), draw(72, 256)])


def test_a_gated_mlp_of_one_product_is_that_of_two() -> None:
    mlp = MLP(256, 384).cuda().bfloat16()
    for p in mlp.parameters():
        torch.nn.init.normal_(p, 0.0, 0.1)
    x = draw(700, 256)

    def run(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, path: str | None) -> tuple[Tensor, ...]:
        if path is None:
            weights = {"w1.weight": w1, "w2.weight": w2, "w3.weight": w3}
            return (torch.func.functional_call(mlp, weights, (x,)),)
        return (gated(x @ w1.T, x @ w3.T, path) @ w2.T,)

    same(run, [x, mlp.w1.weight.data, mlp.w2.weight.data, mlp.w3.weight.data])


def small(**changes: int) -> Transformer:
    config = ModelConfig(**{  # type: ignore[arg-type]
        "vocab_size": 512, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 3,
        "num_attention_heads": 4, "qk_nope_head_dim": 128, "v_head_dim": 128, "kv_lora_rank": 64,
        "qk_rope_head_dim": 64, "moe_intermediate_size": 128, "n_routed_experts": 8, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, **changes,
    })  # fmt: skip
    model = Transformer(config).cuda().bfloat16()
    return model.init_weights(torch.Generator("cuda").manual_seed(0))


def gradients(model: Transformer, tokens: Tensor, lens: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(tokens, lens)
    loss = logits.logsumexp(-1).mean() + model.predict(tokens, lens)[0].logsumexp(-1).mean()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@hopper
@pytest.mark.parametrize("how", ["checkpoint", "compile"])
def test_a_whole_model_recomputed_or_compiled_has_the_same_gradients(how: str) -> None:
    model, lens = small(), [700, 3, 0, 321]
    tokens = torch.randint(0, 512, (sum(lens),), device="cuda")
    loss, plain = gradients(model, tokens, lens)
    for block in [*model.layers, *(m.block for m in model.mtp)]:
        forward = block.forward
        block.__dict__["forward"] = (
            torch.compile(forward) if how == "compile" else partial(checkpoint, forward, use_reentrant=False)
        )
    again, found = gradients(model, tokens, lens)
    assert abs(float(loss - again)) < 1e-3 and found.keys() == plain.keys()
    for name, grad in plain.items():
        assert error(found[name], grad.double()) < 3e-2, name


@hopper
def test_a_step_s_gradients_are_those_of_the_plain_model_in_float32() -> None:
    """All fast paths together, of a batch whose sequences are uneven. Routing is dense, so that no near-tie counts."""
    model, lens = small(num_experts_per_tok=8), [700, 3, 0, 321]
    tokens = torch.randint(0, 512, (sum(lens),), device="cuda")
    _, found = gradients(model, tokens, lens)
    exact = Transformer(model.config).double()
    exact.load_state_dict({name: t.double().cpu() for name, t in model.state_dict().items()})
    _, expected = gradients(exact, tokens.cpu(), lens)
    for name, grad in expected.items():
        assert error(found[name].cpu(), grad) < 5e-2, name


def test_nothing_waits_for_the_host() -> None:
    model, lens = small(), [700, 3, 321]
    tokens = torch.randint(0, 512, (sum(lens),), device="cuda")
    packing = Packing.of(lens, tokens)
    model.hidden(tokens, packing).states.sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.hidden(tokens, packing).states.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
