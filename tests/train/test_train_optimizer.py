"""Masters, decay, Muon, clipping, and the optimizer's state."""

import gc
import weakref

import pytest
import torch
from torch import nn

from abyssal.model.transformer import Transformer
from abyssal.train.alone import Alone
from abyssal.train.muon import StackedMuon, orthogonalize
from abyssal.train.optimizer import Optimizer
from abyssal.train.parts import PARTS


def build(config, dtype=torch.float32):
    model = Transformer(config.model_settings()).init_weights(torch.Generator().manual_seed(0))
    return model, Optimizer(Alone(model, config, torch.device("cpu"), dtype).parameters(), config)


def update(optimizer, lr, stopped=0.0):
    """Returns the gradient's norm before clipping."""
    norm = optimizer.squares().sum().sqrt()
    optimizer.update(lr, norm, torch.tensor(stopped))
    return float(norm)


def fill_gradients(model, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8), (2, 12, 12)])
def test_stacked_muon_is_torchs_slice_by_slice(shape):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    stack = nn.Parameter(start.clone())
    slices = [nn.Parameter(s.clone()) for s in start]
    ours = StackedMuon([stack], lr=0.02, weight_decay=0.1)
    torchs = torch.optim.Muon(slices, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        stack.grad = torch.randn(shape, generator=generator)
        for p, g in zip(slices, stack.grad):
            p.grad = g.clone()
        ours.step()
        torchs.step()
    # bfloat16 products, whose roundings differ between one matrix and a stack of them
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in slices]), rtol=0, atol=2e-3)
    moved = (stack.detach() - start).norm()
    assert (stack.detach() - torch.stack([p.detach() for p in slices])).norm() < 0.01 * moved


def test_orthogonalize_brings_singular_values_near_one():
    values = torch.linalg.svdvals(orthogonalize(torch.randn(4, 16, 40)).float())
    assert 0.4 < values.min() < values.max() < 1.6


def test_stacked_muon_refuses_matrices():
    with pytest.raises(ValueError, match=r"stacks of matrices \[E, M, N\], got a parameter \[2, 3\]"):
        StackedMuon([nn.Parameter(torch.zeros(2, 3))], 0.1, 0.0)


def test_who_steps_what(make_config):
    model, optimizer = build(make_config(optimizer="muon"))
    adam, flat, stacked = optimizer.optimizers
    name_of = {p: name for name, p in model.named_parameters()}
    names = [[name_of[p] for group in o.param_groups for p in group["params"]] for o in (adam, flat, stacked)]
    assert sorted(name for part in names for name in part) == sorted(name_of.values())
    assert {"embed.weight", "head.weight", "layers.1.ffn.gate.weight", "norm.weight"} <= set(names[0])
    assert "mtp.0.eh_proj.weight" in names[1]
    assert all(".ffn.experts.w" in name for name in names[2])
    decays = {name_of[p]: group["weight_decay"] for group in adam.param_groups for p in group["params"]}
    assert decays["embed.weight"] == 0.1
    assert decays["layers.0.attn_norm.weight"] == 0.0


def test_adamw_by_hand(make_config):
    config = make_config(clip=None, weight_decay=0.1)
    model, optimizer = build(config)
    before = model.head.weight.detach().clone()
    fill_gradients(model)
    gradient = model.head.weight.grad.clone()
    optimizer.collect()
    update(optimizer, 0.01)
    # After one step the moments' bias corrections leave g / (|g| + eps).
    expected = before * (1 - 0.01 * 0.1) - 0.01 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(model.head.weight.detach(), expected, rtol=1e-5, atol=1e-7)


def test_clipping_scales_the_whole_gradient(make_config):
    config = make_config(clip=1.0)
    model, optimizer = build(config)
    fill_gradients(model)
    total = sum(float(p.grad.double().square().sum()) for p in model.parameters()) ** 0.5
    kept = [g for _, g in optimizer.gradients()]
    assert update(optimizer, 0.0) == pytest.approx(total, rel=1e-5)
    assert torch.stack([g.double().norm() for g in kept]).norm() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_stopped_update_changes_nothing_but_drops_the_gradient(make_config, name):
    model, optimizer = build(make_config(optimizer=name, weight_decay=0.1))
    fill_gradients(model)
    update(optimizer, 0.01)
    before = [p.detach().clone() for p in model.parameters()]
    state = {key: t.clone() for key, t in optimizer.state().items()}
    fill_gradients(model, scale=float("nan"))
    update(optimizer, 0.01, stopped=1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(torch.equal(t, optimizer.state()[key]) for key, t in state.items())
    assert all(p.grad is None for p in model.parameters())


def test_the_norm_by_parts_adds_up_and_names_them(make_config):
    model, optimizer = build(make_config({"num_nextn_predict_layers": 1, "n_shared_experts": 1}))
    fill_gradients(model)
    by_part = dict(zip(PARTS, optimizer.squares().tolist(), strict=True))
    named = dict(model.named_parameters())
    experts = [p for name, p in named.items() if ".ffn.experts." in name and not name.startswith("mtp")]
    assert by_part["experts"] == pytest.approx(sum(float(p.grad.square().sum()) for p in experts), rel=1e-4)
    assert by_part["head"] == pytest.approx(float(named["head.weight"].grad.square().sum()), rel=1e-4)
    assert all(x > 0 for x in by_part.values())
    assert sum(by_part.values()) == pytest.approx(sum(float(p.grad.square().sum()) for p in named.values()), rel=1e-4)


def test_tiny_updates_reach_float32_masters(make_config):
    """Steps of 1e-5 on weights near 0.02 vanish in bfloat16, whose next number is 1e-4 away."""
    config = make_config(clip=None, weight_decay=0.0)
    model, optimizer = build(config, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.gates()[0].bias.dtype == torch.float32
    with torch.no_grad():
        optimizer.masters[0].fill_(0.02)
        model.embed.weight.fill_(0.02)
    rounded = float(model.embed.weight[0, 0])
    for _ in range(40):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.collect()
        update(optimizer, 1e-5)
    assert float(optimizer.masters[0][0, 0]) == pytest.approx(0.02 - 40e-5, rel=1e-3)
    assert float(model.embed.weight[0, 0]) == pytest.approx(0.0196, abs=1e-4)
    assert float(model.embed.weight[0, 0]) != rounded


def test_gradients_of_microbatches_are_summed_in_float32(make_config):
    model, optimizer = build(make_config(), torch.bfloat16)
    for _ in range(600):  # in bfloat16 the sum of ones would stop at 256
        model.norm.weight.grad = torch.ones_like(model.norm.weight)
        optimizer.collect()
    assert dict(optimizer.gradients())["norm.weight"].unique().tolist() == [600.0]
    assert model.norm.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_round_trip(make_config, dtype, name):
    config = make_config(optimizer=name)

    def step(model, optimizer, seed):
        fill_gradients(model, 0.1, seed)
        optimizer.collect()
        update(optimizer, 1e-3)

    model, optimizer = build(config, dtype)
    step(model, optimizer, 1)
    state = {key: t.clone() for key, t in optimizer.state().items()}
    other, restored = build(config, dtype)
    other.load_state_dict(model.state_dict())
    restored.load_state(state)
    for m, o in ((model, optimizer), (other, restored)):
        step(m, o, 2)
    assert optimizer.state().keys() == restored.state().keys()
    for key, t in optimizer.state().items():
        assert torch.equal(t, restored.state()[key]), key
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_hooks_sum_microbatches_as_collecting_does(make_config):
    """With several microbatches a step a gradient is taken in when it is made: none is left, and the sums are those of
    float32; the next step's are in the same memory."""
    model, optimizer = build(make_config(accumulate=2), torch.bfloat16)
    weight = dict(model.named_parameters())["head.weight"]
    kept = set()
    for step in range(2):
        exact = torch.zeros(weight.shape)
        for micro in range(2):
            by = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2 * step + micro)).bfloat16()
            (weight * by).sum().backward()
            assert weight.grad is None
            optimizer.collect()
            exact += by.float()
        (gradient,) = (g for name, g in optimizer.gradients() if name == "head.weight")
        assert torch.equal(gradient, exact)
        kept.add(gradient.data_ptr())
        update(optimizer, 1e-3)
        assert optimizer.gradients() == []
    assert len(kept) == 1


def test_the_parameters_do_not_keep_a_forgotten_optimizer_alive(make_config):
    model, optimizer = build(make_config(accumulate=2), torch.bfloat16)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    (model.head.weight * 2).sum().backward()
    assert model.head.weight.grad is not None
