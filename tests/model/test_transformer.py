"""The whole model: variants, norms of the latents, casts, and nothing read on the host."""

import copy

import pytest
import torch
from tiny import greedy, random_tokens, randomised, tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import abyssal
from abyssal.model import transformer as transformer_module
from abyssal.model.cache import Cache
from abyssal.model.layers import MLP, Linear
from abyssal.model.packing import Packing
from abyssal.model.transformer import Transformer
from abyssal.ops import experts as experts_module
from abyssal.ops.fp8 import dequantize, quantize


def test_the_latents_norms_use_1e_6_whatever_rms_norm_eps_says() -> None:
    """With inputs so small that eps is most of the sum: the latent is c / sqrt(mean c² + 1e-6), by hand."""
    attn = tiny_model(rms_norm_eps=1e-5).layers[0].attn
    x = 1e-3 * torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    c = (x @ attn.wkv_a.weight.T)[:, :7]
    with torch.no_grad():
        latent, _ = attn.leave(x, (torch.ones(5, 2), torch.zeros(5, 2)))
        by_hand = c / (c.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attn.kv_norm.weight
        torch.testing.assert_close(latent, by_hand, atol=1e-12, rtol=0)
        q_nope, q_rope = attn.queries(x, (torch.ones(5, 2), torch.zeros(5, 2)))
        c = x @ attn.wq_a.weight.T
        by_hand = (c / (c.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attn.q_norm.weight) @ attn.wq_b.weight.T
        found = torch.cat((q_nope, q_rope), -1).flatten(1)
        torch.testing.assert_close(found, by_hand, atol=1e-12, rtol=0)


def test_the_other_norms_use_rms_norm_eps() -> None:
    model = tiny_model(rms_norm_eps=0.5, num_nextn_predict_layers=1)
    x = torch.randn(3, 24, dtype=torch.float64)
    names = []
    for name, norm in model.named_modules():
        if name.endswith("norm") and not name.endswith(("q_norm", "kv_norm")):
            names.append(name.split(".")[-1])
            by_hand = x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt() * norm.weight
            torch.testing.assert_close(norm(x), by_hand, atol=1e-12, rtol=0)
    assert set(names) == {"attn_norm", "ffn_norm", "norm", "enorm", "hnorm"}


def test_a_dense_model_has_no_experts_and_decodes() -> None:
    model = tiny_model(n_routed_experts=None, n_shared_experts=None, num_nextn_predict_layers=1)
    assert model.gates() == []
    assert all(isinstance(layer.ffn, MLP) for layer in model.layers)
    tokens = random_tokens(6)
    hidden = model.hidden(tokens, Packing.of([6], tokens))
    assert hidden.routings == []
    assert len(model.predict(tokens, [6])) == 1
    last = model(tokens, [6])[-1].argmax().item()
    assert greedy(model, [tokens], 1, "absorbed") == [[last]]


@pytest.mark.parametrize("first", [0, 1, 2, 3, 9])
def test_the_first_layers_are_dense(first: int) -> None:
    model = tiny_model(first_k_dense_replace=first)
    assert [isinstance(layer.ffn, MLP) for layer in model.layers] == [l < first for l in range(3)]
    tokens = random_tokens(4)
    routings = model.hidden(tokens, Packing.of([4], tokens)).routings
    assert len(routings) == len(model.gates()) == max(3 - first, 0)


def test_tied_embeddings_are_one_parameter_through_casts_and_copies() -> None:
    model = tiny_model(tie_word_embeddings=True)
    for again in (model, model.float(), copy.deepcopy(model), copy.deepcopy(model).bfloat16()):
        assert again.head.weight is again.embed.weight
    tokens = random_tokens(5)
    states = model.hidden(tokens, Packing.of([5], tokens)).states
    torch.testing.assert_close(model(tokens, [5]), states @ model.embed.weight.T)
    assert not any(name.startswith("head") for name, _ in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_logits_are_float32_or_wider(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype, num_nextn_predict_layers=1)
    tokens = random_tokens(6)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert model(tokens, [6]).dtype == model.predict(tokens, [6])[0].dtype == expected


@torch.no_grad()
def test_bfloat16_stays_near_float32_on_both_paths() -> None:
    exact, model = (tiny_model(dtype=d, n_routed_experts=None) for d in (torch.float32, torch.bfloat16))
    tokens = random_tokens(12)
    expected = exact(tokens, [12])
    assert (model(tokens, [12]) - expected).abs().mean() < 0.03 * expected.std()
    cache = Cache.allocate(model.leaves(), 1, 12, torch.bfloat16)
    for t in range(12):
        packing = cache.contiguous_packing([1], [t], [0])
        logits = model.logits(model.hidden(tokens[t : t + 1], packing, cache, "absorbed").states)
        assert (logits[0] - expected[t]).abs().mean() < 0.05 * expected.std()


def test_lengths_may_be_a_list_a_tensor_or_a_packing() -> None:
    model, tokens = tiny_model(), random_tokens(5)
    expected = model(tokens, [2, 3])
    assert torch.equal(model(tokens, torch.tensor([2, 3])), expected)
    assert torch.equal(model(tokens, Packing.of([2, 3], tokens)), expected)


def test_a_parameter_is_drawn_from_the_seed_and_its_name_alone() -> None:
    """Neither how many threads draw nor what else the model has changes a number; no two parameters are alike."""
    config, threads = abyssal.ModelConfig.load("tiny"), torch.get_num_threads()
    small = Transformer(config).init_weights(torch.Generator().manual_seed(3))
    try:
        torch.set_num_threads(3)
        deeper = config.replace(num_hidden_layers=config.num_hidden_layers + 1)
        large = dict(Transformer(deeper).init_weights(torch.Generator().manual_seed(3)).named_parameters())
    finally:
        torch.set_num_threads(threads)
    matrices = {name: p for name, p in small.named_parameters() if p.ndim > 1}
    assert all(torch.equal(p, large[name]) for name, p in matrices.items())
    assert len({tuple(p.flatten()[:8].tolist()) for p in large.values() if p.ndim > 1}) == sum(
        p.ndim > 1 for p in large.values()
    )


def test_fresh_weights_are_the_reports() -> None:
    """N(0, initializer_range) everywhere, norms at 1, biases at 0, and the same from the same seed."""
    config = abyssal.ModelConfig.load("tiny")
    model, again = (Transformer(config).init_weights(torch.Generator().manual_seed(3)) for _ in range(2))
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
        if p.ndim == 1:
            assert (p == 1).all(), name
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.15), name
            assert abs(p.mean().item()) < 0.002, name
    assert all((gate.bias == 0).all() for gate in model.gates())
    assert sum(p.numel() for p in model.parameters()) < 1_000_000  # the preset's promise


def test_fp8_weights_answer_as_their_dequantised_twins_and_survive_casts() -> None:
    """Blocks and scales stay as they are under `.to(dtype)`, in linear maps and in stacked experts."""
    sizes = {"hidden_size": 130, "moe_intermediate_size": 140, "kv_lora_rank": 129}  # ragged edges
    model, twin = (randomised(Transformer(tiny_config(**sizes))) for _ in range(2))
    for a, b in zip(model.modules(), twin.modules(), strict=True):
        for name, p in a.named_parameters(recurse=False):
            if not isinstance(a, abyssal.model.layers.Linear | abyssal.model.experts.Experts):
                continue
            if a is model.head:
                continue
            weight, scale = quantize(p.detach())
            getattr(b, name).data = dequantize(weight, scale, torch.float32)
            getattr(a, name).requires_grad_(False)
            getattr(a, name).data = weight
            scale_name = "scale" if name == "weight" else f"{name}_scale"
            setattr(a, scale_name, scale)
    tokens = random_tokens(9)
    with torch.no_grad():
        expected = twin(tokens, [9])
        torch.testing.assert_close(model(tokens, [9]), expected, atol=1e-5, rtol=0)
        assert greedy(model, [tokens], 8, "absorbed") == greedy(twin, [tokens], 8, "absorbed")
        before = {name: t.clone() for name, t in model.state_dict().items()}
        after = model.to(torch.bfloat16).float().state_dict()
    for name, t in before.items():
        if t.dtype == torch.float8_e4m3fn or "scale" in name:
            assert after[name].dtype == t.dtype
            assert torch.equal(after[name].view(torch.uint8), t.view(torch.uint8)), name


# ---- nothing is read on the host ------------------------------------------------------------------------


class NoHost(TorchDispatchMode):
    """Fails where a device would have to wait for the host: a value read, or a shape that depends on values."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave.Tensor", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(word in str(func) for word in self.FORBIDDEN), f"{func} reads values on the host"
        return func(*args, **(kwargs or {}))


def meta_packing(T: int, S: int) -> Packing:
    with torch.device("meta"):
        return Packing(torch.zeros(S + 1, dtype=torch.int32), torch.zeros(T, dtype=torch.int64), T)


def test_the_guard_sees_a_value_read() -> None:
    with NoHost(), pytest.raises(AssertionError, match="reads values on the host"):
        torch.ones(3).sum().item()
    with pytest.raises(RuntimeError):
        torch.ones(3, device="meta").tolist()


@pytest.mark.parametrize("width", [16, 12])
def test_training_reads_nothing_on_the_host(width: int) -> None:
    """On "meta" tensors have no values to read: forward, MTP, losses, balance and the backward pass as a GPU has
    them in bfloat16; grouped products, and the reference where rows are not of 16 bytes."""
    from abyssal.model.balance import Balance, auxiliary_loss, sequence_balance_loss

    with torch.device("meta"):
        model = Transformer(tiny_config(num_nextn_predict_layers=2, moe_intermediate_size=width)).to(torch.bfloat16)
        tokens = torch.zeros(19, dtype=torch.int64)
    packing = meta_packing(19, 4)
    with NoHost():
        hidden = model.hidden(tokens, packing)
        predictions = model.predict_states(hidden.states, tokens, packing)
        routings = [*hidden.routings, *(p.routing for p in predictions)]
        balance = Balance(model.gates())
        balance.observe(routings, [None, None, *(p.live for p in predictions)])
        balance.update(1e-3)
        loss = sum(sequence_balance_loss(r, packing) + auxiliary_loss(r) for r in routings)
        loss = loss + model.logits(hidden.states).square().mean()
        loss.backward()
    assert model.logits(hidden.states).shape == (19, 61)
    assert model.embed.weight.grad is not None


@pytest.mark.parametrize("path", ["grouped", "reference"])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_experts_read_nothing_on_the_host(path: str, groups: tuple[int, int]) -> None:
    """With values, on a CPU: the same paths that a GPU runs."""
    sizes = {"n_group": groups[0], "topk_group": groups[1], "moe_intermediate_size": 16}
    ffn = tiny_model(dtype=torch.bfloat16, **sizes).layers[1].ffn
    x = torch.randn(9, 24).bfloat16()
    with NoHost():
        routing = ffn.gate(x)
        e = ffn.experts
        experts_module.experts(x, e.w1, e.w2, e.w3, routing.indices, routing.weights, path)


def test_model_never_asks_for_a_value() -> None:
    """The words themselves: what reads a tensor on the host lives in `ops/`, under a path's name."""
    from pathlib import Path

    folder = Path(transformer_module.__file__).parent
    for file in folder.glob("*.py"):
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            assert not any(w in line for w in (".tolist()", ".item()", ".cpu()", "nonzero()")), f"{file}:{number}"


@pytest.mark.parametrize("of", ["the MLP", "a map of it", "the MLP's forward"])
def test_shared_experts_that_compute_in_another_way_do_so_without_gradients_too(of, monkeypatch) -> None:
    """They are read together with the routed ones only where they are no more than their weights: what is validated
    is what is trained, in FP8 for one."""
    moe = tiny_model(n_shared_experts=1).layers[-1].ffn
    shared, called = moe.shared_experts, []

    class OtherMLP(MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            called.append(True)
            return super().forward(x)

    class OtherLinear(Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            called.append(True)
            return super().forward(x)

    monkeypatch.setattr("abyssal.model.experts.read_together", lambda *tensors: True)
    x = torch.randn(5, 24, dtype=torch.float64)
    with torch.no_grad():
        together = moe(x)[0]
        assert not called
        if of == "the MLP":
            shared.__class__ = OtherMLP
        elif of == "a map of it":
            shared.w2.__class__ = OtherLinear
        else:
            forward = shared.forward
            shared.__dict__["forward"] = lambda x: called.append(True) or forward(x)
        torch.testing.assert_close(moe(x)[0], together)
    assert called
