"""FP8 training on a GPU: what is rounded, every product against float64, poisoned outputs, the same bits each time."""

import copy

import pytest
import torch
from tiny import randomised
from torch.nn.functional import pad, silu
from torch.utils.checkpoint import checkpoint

from abyssal.config import ModelConfig
from abyssal.model.packing import Packing
from abyssal.model.transformer import Transformer
from abyssal.ops.fp8_train import fp8_train_linear, fp8_train_mlp, serves
from abyssal.train.fp8 import apply_fp8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not serves(torch.ones(1, device="cuda", dtype=torch.bfloat16)),
        reason="no scaled products of blocks on this device",
    ),
]
SHAPES = [(1, 128, 128), (7, 200, 130), (300, 576, 1000), (129, 128, 384), (1024, 1536, 2048), (64, 7168, 512)]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a launcher asks for holds NaN until it is written."""
    new_empty = torch.Tensor.new_empty

    def poison(self, *size, **options):
        t = new_empty(self, *size, **options)
        if t.dtype == torch.float8_e4m3fn and t.is_cuda:
            t.view(torch.uint8).fill_(0x7F)
            return t
        return t.fill_(float("nan")) if t.is_floating_point() and t.is_cuda else t

    monkeypatch.setattr(torch.Tensor, "new_empty", poison)


def error(out, exact):
    out, exact = out.detach().double(), exact.detach().double()
    assert out.isfinite().all()
    return float((out - exact).norm() / exact.norm())


def normal(*shape, dtype=torch.bfloat16, scale=1.0, grad=True):
    return (torch.randn(shape, device="cuda") * scale).to(dtype).requires_grad_(grad)


def wide(*leaves):
    return [t.detach().double().requires_grad_() for t in leaves]


@pytest.mark.parametrize("tokens, width", [(1, 128), (5, 200), (300, 1000), (129, 7168)])
@pytest.mark.parametrize("scale", [1.0, 1e-12])
def test_rows_are_rounded_as_torch_does_in_both_layouts(tokens, width, scale) -> None:
    from abyssal.kernels import fp8_train as kernels

    x = normal(tokens, width, scale=scale, grad=False)
    x[0] = 0
    q, q_scale, turned, turned_scale = kernels.round_rows(x, True)
    for numbers, scales, exact in ((q, q_scale, x), (turned, turned_scale, x.T)):
        padded = pad(exact.float(), (0, -exact.shape[1] % 128, 0, -exact.shape[0] % 128))
        assert numbers.shape == padded.shape
        expected = padded.unflatten(1, (-1, 128)).abs().amax(-1).clamp(min=1e-30) / 448
        torch.testing.assert_close(scales.T, expected, rtol=1e-6, atol=0)
        rounded = (padded.unflatten(1, (-1, 128)) / expected[..., None]).to(torch.float8_e4m3fn).flatten(1)
        # A quotient off by its last bit may fall on the other side of a midpoint.
        assert (numbers.float() != rounded.float()).float().mean() < 2e-3
        assert not numbers.float()[padded == 0].any()


@pytest.mark.parametrize("tokens, inputs, outputs", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_map_and_its_gradients(tokens, inputs, outputs, dtype) -> None:
    """Against the reference in float64, which rounds the same numbers: what is left is bf16's own rounding and the
    midpoints. The weights are bf16, or float32 as FSDP may keep them."""
    x, w, dy = (
        normal(tokens, inputs),
        normal(outputs, inputs, dtype=dtype, scale=0.02),
        normal(tokens, outputs, scale=1e-6),
    )
    y = fp8_train_linear(x, w, "fp8")
    y.backward(dy.detach())
    u, v = wide(x, w)
    z = fp8_train_linear(u, v, "reference")
    z.backward(dy.detach().double())
    assert y.dtype == x.grad.dtype == torch.bfloat16 and w.grad.dtype == dtype and y.is_contiguous()
    for out, exact in ((y, z), (x.grad, u.grad), (w.grad, v.grad)):
        assert out.shape == exact.shape and error(out, exact) < 5e-3
    again = [t.detach().clone().requires_grad_() for t in (x, w)]
    same = fp8_train_linear(*again)
    same.backward(dy.detach())
    assert torch.equal(same, y) and torch.equal(again[0].grad, x.grad) and torch.equal(again[1].grad, w.grad)


@pytest.mark.parametrize("tokens, width, inner", [(1, 128, 256), (300, 384, 640), (1000, 1024, 2816), (50, 200, 130)])
def test_the_gated_mlp_and_its_gradients(tokens, width, inner) -> None:
    x, dy = normal(tokens, width), normal(tokens, width)
    w1, w2, w3 = (normal(*s, scale=s[1] ** -0.5) for s in ((inner, width), (width, inner), (inner, width)))
    y = fp8_train_mlp(x, w1, w2, w3, "fp8")
    y.backward(dy.detach())
    u, v1, v2, v3 = wide(x, w1, w2, w3)
    z = fp8_train_mlp(u, v1, v2, v3, "reference")
    z.backward(dy.detach().double())
    a, b1, b2, b3 = wide(x, w1, w2, w3)
    exact = (silu(a @ b1.T) * (a @ b3.T)) @ b2.T
    exact.backward(dy.detach().double())
    pairs = zip((y, x.grad, w1.grad, w2.grad, w3.grad), (z, u.grad, v1.grad, v2.grad, v3.grad),
                (exact, a.grad, b1.grad, b2.grad, b3.grad))  # fmt: skip
    for out, reference, true in pairs:
        # What lies between is bf16 here, so some of it is rounded to a neighbour of the reference's.
        assert error(out, reference) < 0.025
        assert error(out, true) < 1.15 * error(reference, true)


def test_only_what_is_asked_for_is_computed() -> None:
    x, w = normal(200, 256), normal(384, 256)
    fp8_train_linear(x, w.detach()).sum().backward()
    fp8_train_linear(x.detach(), w).sum().backward()
    assert x.grad is not None and w.grad is not None
    with torch.no_grad():
        assert not fp8_train_linear(x, w).requires_grad
    turned = normal(256, 200).T  # rows that do not lie together
    assert torch.equal(fp8_train_linear(turned, w), fp8_train_linear(turned.contiguous(), w))


def test_what_is_not_finite_is_not_hidden() -> None:
    for bad in (float("nan"), float("inf")):
        x, w = normal(200, 256, grad=False), normal(384, 256, grad=False)
        x[3, 7] = bad
        y = fp8_train_linear(x, w)
        assert not y[3].isfinite().any() and y[:3].isfinite().all() and y[4:].isfinite().all()


def test_no_host_synchronisation() -> None:
    x, w = normal(200, 256), normal(384, 256)
    w1, w2, w3 = normal(384, 256), normal(256, 384), normal(384, 256)

    def run():
        fp8_train_linear(x, w).sum().backward()
        fp8_train_mlp(x, w1, w2, w3).sum().backward()

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_it_is_compiled_whole() -> None:
    x, dy = normal(200, 256), normal(200, 256, grad=False)
    weights = normal(384, 256), normal(256, 384), normal(384, 256)

    def run(x, w1, w2, w3):
        return fp8_train_linear(2 * fp8_train_mlp(x, w1, w2, w3), w2.T.contiguous()[:256])

    expected = run(x, *weights)
    expected.backward(dy)
    gradients = [t.grad.clone() for t in (x, *weights)]
    for t in (x, *weights):
        t.grad = None
    out = torch.compile(run, fullgraph=True)(x, *weights)
    out.backward(dy)
    assert torch.equal(out, expected)
    for t, gradient in zip((x, *weights), gradients):
        assert error(t.grad, gradient) < 0.005


def small_model() -> Transformer:
    config = ModelConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        qk_nope_head_dim=64, v_head_dim=64, kv_lora_rank=128, qk_rope_head_dim=32, q_lora_rank=128,
        moe_intermediate_size=128, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2,
        first_k_dense_replace=1, num_nextn_predict_layers=1,
    )  # fmt: skip
    return randomised(Transformer(config)).to("cuda", torch.bfloat16)


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 1024, (600,), generator=torch.Generator().manual_seed(1)).cuda()
    states = model.hidden(tokens, Packing.of([250, 350], tokens)).states
    torch.nn.functional.cross_entropy(model.logits(states), tokens.roll(-1)).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_a_model_in_fp8_learns_what_the_wide_one_does() -> None:
    model = small_model()
    wide_gradients = gradients(model)
    apply_fp8(model, least=0)
    own = gradients(model)
    assert own.keys() == wide_gradients.keys()
    for name, gradient in own.items():
        # Experts and routers see other tokens where a choice was close.
        assert error(gradient, wide_gradients[name]) < (0.6 if "experts" in name or "gate" in name else 0.35), name
    again = copy.deepcopy(model)
    for block in again.layers:
        forward = block.forward
        block.__dict__["forward"] = lambda *a, forward=forward: checkpoint(forward, *a, use_reentrant=False)
    recomputed = gradients(again)
    assert all(torch.equal(recomputed[name], own[name]) for name in own)
