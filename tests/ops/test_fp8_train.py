"""FP8 training's reference: rounded as section 3.3 says, differentiable, and applied to a model without a trace."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import random_tokens, randomised, tiny_config
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from abyssal.model.layers import MLP, Linear
from abyssal.model.packing import Packing
from abyssal.model.positions import rotary
from abyssal.model.transformer import Transformer
from abyssal.ops.fp8 import dequantize, quantize
from abyssal.ops.fp8_train import fp8_train_linear, fp8_train_mlp, round_blocks, round_rows
from abyssal.train.fp8 import Fp8Linear, Fp8MLP, apply_fp8, remove_fp8

few = settings(max_examples=25, deadline=None)
sizes = st.integers(1, 300)


def normal(*shape, seed=0, dtype=torch.float64, grad=False):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x.requires_grad_(grad)


def error(out, exact):
    out, exact = out.detach(), exact.detach()
    assert out.isfinite().all()
    return float((out.double() - exact.double()).norm() / exact.double().norm())


@few
@given(st.integers(1, 5), sizes)
def test_every_128_columns_of_a_row_share_a_scale(tokens, width) -> None:
    x = normal(tokens, width, seed=width)
    rounded = round_rows(x)
    assert rounded.shape == x.shape and rounded.dtype == x.dtype
    for t in range(tokens):
        for start in range(0, width, 128):
            part = x[t, start : start + 128].float()
            scale = part.abs().max() / 448
            own = (part / scale).to(torch.float8_e4m3fn).double() * scale.double()
            assert torch.equal(rounded[t, start : start + 128], own)


def test_a_power_of_two_passes_through_at_any_size() -> None:
    """Gradients are small, and small as they are, are rounded as large ones: the scale is a block's own."""
    x = normal(3, 200)
    for power in (-80, -20, 60):
        assert torch.equal(round_rows(x * 2.0**power), round_rows(x) * 2.0**power)
    assert torch.equal(round_rows(torch.zeros(2, 130)), torch.zeros(2, 130))


def test_an_outlier_spoils_its_own_block_alone() -> None:
    x = normal(2, 256)
    spoilt = x.clone()
    spoilt[0, 3] = 1e6
    assert torch.equal(round_rows(spoilt)[:, 128:], round_rows(x)[:, 128:])
    assert torch.equal(round_rows(spoilt)[1], round_rows(x)[1])
    assert not torch.equal(round_rows(spoilt)[0, 4:128], round_rows(x)[0, 4:128])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad) -> None:
    x = normal(2, 200)
    x[1, 150] = bad
    y = fp8_train_linear(x, normal(3, 200, seed=1))
    assert y[0].isfinite().all() and not y[1].isfinite().any()


@few
@given(sizes, sizes, st.integers(1, 140))
def test_the_three_products_are_of_rounded_numbers(inputs, outputs, tokens) -> None:
    """One token, sizes that are multiples of nothing: each product sums over what was rounded along the sum."""
    x, w = normal(tokens, inputs, grad=True), normal(outputs, inputs, seed=1, grad=True)
    dy = normal(tokens, outputs, seed=2)
    y = fp8_train_linear(x, w)
    y.backward(dy)
    blocks = dequantize(*quantize(w.detach()), torch.float64)
    assert torch.equal(round_blocks(w.detach(), torch.float64), blocks)
    torch.testing.assert_close(y, round_rows(x) @ blocks.T)
    torch.testing.assert_close(x.grad, round_rows(dy) @ blocks)
    torch.testing.assert_close(w.grad, round_rows(dy.T) @ round_rows(x.detach().T).T)
    assert w.grad.shape == w.shape and x.grad.shape == x.shape


def test_errors_are_those_of_four_bits() -> None:
    x, w = normal(256, 512, dtype=torch.float32, grad=True), normal(384, 512, seed=1, dtype=torch.float32, grad=True)
    dy = normal(256, 384, seed=2, dtype=torch.float32)
    y = fp8_train_linear(x, w)
    y.backward(dy)
    assert y.dtype == x.grad.dtype == w.grad.dtype == torch.float32
    for out, exact in ((y, x @ w.T), (x.grad, dy @ w), (w.grad, dy.T @ x)):
        assert 0.02 < error(out, exact) < 0.04


def test_weights_may_be_wider_than_what_they_meet() -> None:
    """Parameters in float32 under bfloat16 activations: rounded from float32, and so is their gradient."""
    x, w = normal(5, 200, dtype=torch.bfloat16, grad=True), normal(64, 200, seed=1, dtype=torch.float32, grad=True)
    y = fp8_train_linear(x[None], w)
    y.sum().backward()
    assert y.shape == (1, 5, 64) and y.dtype == torch.bfloat16
    assert w.grad.dtype == torch.float32 and x.grad.dtype == torch.bfloat16


def test_nothing_in_nothing_out() -> None:
    x, w = normal(0, 200, grad=True), normal(64, 200, grad=True)
    y = fp8_train_linear(x, w)
    y.sum().backward()
    assert y.shape == (0, 64) and x.grad.shape == (0, 200) and not w.grad.any()


def test_paths_are_named() -> None:
    x = normal(2, 128)
    with pytest.raises(ValueError, match="path: expected 'reference' or 'fp8', got 'fast'"):
        fp8_train_linear(x, x, "fast")
    with pytest.raises(ValueError, match=r"path 'fp8': expected x in bfloat16, got torch\.float64"):
        fp8_train_linear(x, x, "fp8")


@few
@given(st.sampled_from([128, 200]), st.sampled_from([60, 256]), st.integers(1, 20))
def test_the_gated_mlp_is_its_three_maps(width, inner, tokens) -> None:
    def leaves():
        shapes = ((tokens, width), (inner, width), (width, inner), (inner, width))
        return [normal(*shape, seed=i, grad=True) for i, shape in enumerate(shapes)]

    (x, w1, w2, w3), (u, v1, v2, v3) = leaves(), leaves()
    fp8_train_mlp(x, w1, w2, w3).square().sum().backward()
    h = silu(fp8_train_linear(u, v1)) * fp8_train_linear(u, v3)
    fp8_train_linear(h, v2).square().sum().backward()
    for one, other in ((x, u), (w1, v1), (w2, v2), (w3, v3)):
        torch.testing.assert_close(one.grad, other.grad)


# Applied to a model.

BIG = {
    "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "num_attention_heads": 2,
    "qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "v_head_dim": 64, "kv_lora_rank": 112, "q_lora_rank": 128,
    "num_nextn_predict_layers": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
}  # fmt: skip


def model_of(**changes) -> Transformer:
    return randomised(Transformer(tiny_config(**BIG | changes)))


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    packing, tokens = Packing.of([5, 9], torch.zeros(14)), random_tokens(14)
    states = model.hidden(tokens, packing).states
    parts = [states, *(p.states for p in model.predict_states(states, tokens, packing))]
    sum(model.logits(s).square().mean() for s in parts).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_maps_of_the_blocks_are_taken_and_no_others() -> None:
    model = model_of()
    taken = apply_fp8(model, least=0)
    attention = ("wq_a", "wq_b", "wkv_a", "wo")  # 128 columns of latent and rotary key; wkv_b has 112
    expected = {f"layers.{i}.attn.{name}" for i in range(3) for name in attention}
    expected |= {"layers.0.ffn", "layers.1.ffn.shared_experts", "layers.2.ffn.shared_experts", "mtp.0.eh_proj"}
    expected |= {f"mtp.0.block.attn.{name}" for name in attention} | {"mtp.0.block.ffn.shared_experts"}
    assert set(taken) == expected
    kinds = {name: type(m) for name, m in model.named_modules()}
    assert {name for name, kind in kinds.items() if kind in (Fp8Linear, Fp8MLP)} == expected
    assert kinds["head"] is Linear and kinds["layers.0.attn.wkv_b"] is Linear


def test_only_where_it_pays() -> None:
    """in · out / (in + out): 170.7 for the dense MLP, 170.7 for eh_proj, 128 and less for the others."""
    model = model_of(intermediate_size=512, hidden_size=256)
    assert apply_fp8(model, least=170) == ["layers.0.ffn", "mtp.0.eh_proj"]
    with pytest.raises(ValueError, match=r"fp8: no map of the model has sizes .* of 1000 or more"):
        apply_fp8(model_of())


def test_weights_that_are_fp8_already_are_refused_by_name() -> None:
    model = model_of()
    model.layers[0].attn.wo.scale = torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.wo\.weight: expected a weight to train"):
        apply_fp8(model, least=0)


def test_every_gradient_is_near_the_wide_models() -> None:
    wide, model = model_of(), model_of()
    apply_fp8(model, least=0)
    exact, own = gradients(wide), gradients(model)
    assert exact.keys() == own.keys()
    for name, gradient in own.items():
        if "gate" not in name:
            assert error(gradient, exact[name]) < 0.35, name
    assert any(not torch.equal(own[name], exact[name]) for name in own)


def test_recomputation_changes_no_bit() -> None:
    model, recomputing = model_of(), model_of()
    for m in (model, recomputing):
        apply_fp8(m, least=0)
    for block in recomputing.layers:
        forward = block.forward
        block.__dict__["forward"] = lambda *a, forward=forward: checkpoint(forward, *a, use_reentrant=False)
    one, other = gradients(model), gradients(recomputing)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_saved_is_the_same_and_it_can_be_taken_back(tmp_path) -> None:
    plain, model = model_of(), model_of()
    apply_fp8(model, least=0)
    state = model.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all(torch.equal(state[name], t) for name, t in plain.state_dict().items())
    for name, m in (("plain", plain), ("fp8", model)):
        m.save(tmp_path / name)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "fp8"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "plain" / "config.json").read_text() == (tmp_path / "fp8" / "config.json").read_text()
    again = copy.deepcopy(model)
    assert type(again.layers[0].ffn) is Fp8MLP
    remove_fp8(again)
    assert not any(type(m) in (Fp8Linear, Fp8MLP) for m in again.modules())
    assert type(again.layers[0].ffn) is MLP
    one, other = gradients(plain), gradients(again)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def alone_in_a_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_sharded_blocks_compute_the_same(alone_in_a_group) -> None:
    """FSDP2 makes a class of each class that it shards, and hands the maps whole weights, here rounded to bf16."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model, sharded = model_of().bfloat16(), model_of()
    mesh = init_device_mesh("cpu", (1,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for m in (model, sharded):
        apply_fp8(m, least=0)
    for block in sharded.layers:
        for part in (block.ffn, block):
            fully_shard(part, mesh=mesh, mp_policy=policy)
    x = normal(9, 128, seed=3, dtype=torch.bfloat16)
    packing = Packing.of([4, 5], torch.zeros(9))
    angles = rotary(model.config, packing.positions)
    outs = [m.layers[0](x, angles, packing)[0] for m in (model, sharded)]
    for out in outs:
        out.square().sum().backward()
    assert torch.equal(*outs)
    for name, p in model.layers[0].named_parameters():
        own = sharded.layers[0].get_parameter(name)
        assert torch.equal(own.grad.full_tensor().bfloat16(), p.grad), name
