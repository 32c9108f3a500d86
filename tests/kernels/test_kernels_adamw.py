"""AdamW in one pass over many parameters, in the interpreter, against torch's on float32 masters."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from abyssal.kernels.adamw import BLOCK
from abyssal.model.transformer import Transformer
from abyssal.ops.adamw import OnePass, Stepped, widen
from abyssal.train import optimizer as module
from abyssal.train.alone import Alone
from abyssal.train.config import TrainConfig
from abyssal.train.optimizer import Optimizer

BETAS, EPS, LR, DECAY = (0.9, 0.95), 1e-8, 3e-3, 0.1
PARTS = 3


class Both:
    """The same parameters, stepped by the kernels and by torch."""

    def __init__(self, sizes: Sequence[int], own: bool = False) -> None:
        """`own`: the parameters are their own masters."""
        g = torch.Generator().manual_seed(0)
        masters = [torch.randn(n, generator=g) * 0.02 for n in sizes]
        self.theirs = [nn.Parameter(m.clone()) for m in masters]
        groups = [{"params": [p], "weight_decay": DECAY * (i % 2)} for i, p in enumerate(self.theirs)]
        self.adamw = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)
        self.ours = [Stepped(m if own else m.bfloat16(), m, torch.zeros_like(m), torch.zeros_like(m)) for m in masters]
        self.steps = torch.zeros(len(sizes))
        decays, parts = [DECAY * (i % 2) for i in range(len(sizes))], [(i * 2) % PARTS for i in range(len(sizes))]
        self.parts = parts
        self.one = OnePass(self.ours, self.steps, decays, parts)

    def step(self, gradients: Sequence[Tensor | None], scale: float = 1.0, stopped: float = 0.0) -> None:
        for p, gradient in zip(self.theirs, gradients, strict=True):
            p.grad = None if gradient is None else gradient.float().clone()  # torch divides it in place
        self.adamw.grad_scale, self.adamw.found_inf = torch.tensor(scale), torch.tensor(stopped)
        self.adamw.step()
        self.one.step(gradients, LR, BETAS, EPS, torch.tensor(scale), torch.tensor(stopped))

    def check(self) -> None:
        for i, (p, ours) in enumerate(zip(self.theirs, self.ours, strict=True)):
            state = self.adamw.state[p]
            found = (ours.master, ours.exp_avg, ours.exp_avg_sq)
            exact = (p.detach(), state.get("exp_avg", found[1]), state.get("exp_avg_sq", found[2]))
            for a, b in zip(found, exact, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)  # sums of both signs cancel
            if state:  # the interpreter cuts off what a GPU rounds
                torch.testing.assert_close(ours.param.float(), ours.master, rtol=2**-7, atol=0.0)
            assert self.steps[i] == state.get("step", 0.0)


def gradients_of(
    sizes: Sequence[int], seed: int, dtype: torch.dtype, without: int | None = None
) -> list[Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    made = [torch.randn(n, generator=g).to(dtype) for n in sizes]
    return [None if i == without else gradient for i, gradient in enumerate(made)]


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.sampled_from([1, 7, 64, BLOCK, BLOCK + 8, 2 * BLOCK - 1]), min_size=1, max_size=4),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.sampled_from([None, 0]),
    st.booleans(),
)
def test_steps_are_torchs(sizes: list[int], dtype: torch.dtype, without: int | None, own: bool) -> None:
    both = Both(sizes, own)
    for seed, scale in enumerate((1.0, 3.7, 1.0)):
        both.step(gradients_of(sizes, seed, dtype, without if seed == 1 else None), scale)
        both.check()


def test_a_stopped_step_changes_nothing() -> None:
    sizes = [5, BLOCK + 3]
    both = Both(sizes)
    both.step(gradients_of(sizes, 0, torch.bfloat16))
    before = [t.clone() for ours in both.ours for t in ours]
    broken = [torch.full((n,), float("nan"), dtype=torch.bfloat16) for n in sizes]
    both.one.step(broken, LR, BETAS, EPS, torch.tensor(float("nan")), torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, (t for ours in both.ours for t in ours), strict=True))
    assert both.steps.tolist() == [1.0, 1.0]


def test_gradients_that_lie_oddly_are_read_as_they_are() -> None:
    both = Both([9, 10])
    odd = torch.randn(10).bfloat16()[1:]  # two bytes off
    turned = torch.randn(5, 4).bfloat16()[:, :2].T.reshape(2, 5).flatten()[:10]
    both.step([odd, turned])
    both.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_of_squares_by_part(dtype: torch.dtype) -> None:
    sizes = [3, BLOCK * 2 + 5, 40, 1]
    both = Both(sizes)
    gradients = gradients_of(sizes, 1, dtype, without=2)
    exact = torch.zeros(PARTS + 1, dtype=torch.float64)
    for part, gradient in zip(both.parts, gradients, strict=True):
        if gradient is not None:
            exact[part] += gradient.double().square().sum()
    torch.testing.assert_close(both.one.squares(gradients, PARTS + 1).double(), exact, rtol=1e-6, atol=0.0)


def test_gradients_of_two_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gradients: expected all bfloat16 or all float32, got \['torch.bfloat16'"):
        Both([2, 2]).one.squares([torch.ones(2).bfloat16(), torch.ones(2)], PARTS)


@pytest.mark.parametrize("n", [0, 1, BLOCK, BLOCK + 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_widen_is_torchs_sum(n: int, dtype: torch.dtype) -> None:
    total, part = torch.randn(n), torch.randn(n).to(dtype)
    for add in (False, True):
        found, exact = total.clone(), total.clone()
        widen(found, part, add, "triton")
        widen(exact, part, add, "reference")
        assert torch.equal(found, exact)


def test_a_backward_pass_through_what_a_step_overwrote_is_refused() -> None:
    both = Both([4])
    weight = nn.Parameter(both.ours[0].param)
    both.one = OnePass([both.ours[0]._replace(param=weight)], both.steps, [0.0], [0])
    y = (weight * weight).sum()
    both.one.step([torch.ones(4).bfloat16()], LR, BETAS, EPS, torch.tensor(1.0), torch.tensor(0.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


OVERRIDES = {"vocab_size": 64, "num_hidden_layers": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}


def build(accumulate: int) -> tuple[Transformer, Optimizer]:
    settings = {"model": "tiny", "model_overrides": OVERRIDES, "out": "run", "steps": 8, "accumulate": accumulate}
    config = TrainConfig.of(settings)
    model = Transformer(config.model_settings()).init_weights(torch.Generator().manual_seed(0))
    return model, Optimizer(Alone(model, config, torch.device("cpu"), torch.bfloat16).parameters(), config)


def step(model: Transformer, optimizer: Optimizer, seed: int, accumulate: int = 1) -> Tensor:
    """The norm before clipping. Of the last microbatch the first parameter has no gradient."""
    for micro in range(accumulate):
        g = torch.Generator().manual_seed(100 * seed + micro)
        for i, p in enumerate(model.parameters()):
            if i or micro or accumulate == 1:
                (p * torch.randn(p.shape, generator=g).bfloat16()).sum().backward()
        optimizer.collect()
    norm = optimizer.squares().sum().sqrt()
    optimizer.update(1e-3, norm, torch.zeros(()))
    return norm


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_optimizer_steps_as_with_torchs(accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = build(accumulate)
    monkeypatch.setattr(module, "fits", lambda params, masters: True)
    ours = build(accumulate)
    for seed in range(3):
        norms = [step(*run, seed, accumulate) for run in (ours, theirs)]
        torch.testing.assert_close(*norms, rtol=1e-5, atol=0.0)
        assert ours[1].gradients() == [] and all(p.grad is None for p in ours[0].parameters())
    states = [optimizer.state() for _, optimizer in (ours, theirs)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=1e-4, atol=1e-6, msg=key)


def test_a_state_of_torchs_goes_on_in_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    model, theirs = build(1)
    step(model, theirs, 0)
    monkeypatch.setattr(module, "fits", lambda params, masters: True)
    other, ours = build(1)
    step(other, ours, 7)
    ours.load_state(theirs.state())
    assert all(torch.equal(value, theirs.state()[key]) for key, value in ours.state().items())
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
    step(model, theirs, 1)
    step(other, ours, 1)
    assert ours.state()["step/norm.weight"] == 2.0
    for key, value in ours.state().items():
        torch.testing.assert_close(value, theirs.state()[key], rtol=1e-4, atol=1e-6, msg=key)
