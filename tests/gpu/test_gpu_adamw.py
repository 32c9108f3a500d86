"""AdamW in one pass on a GPU against torch's fused one, and a training step that uses it."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from abyssal.model.transformer import Transformer
from abyssal.ops.adamw import OnePass, Stepped, fits, widen
from abyssal.train.alone import Alone
from abyssal.train.config import TrainConfig
from abyssal.train.optimizer import Optimizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BETAS, EPS, LR, DECAY = (0.9, 0.95), 1e-8, 3e-3, 0.1
SIZES = (1, 513, 4096, 4104, 1 << 20, (1 << 22) + 3)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def test_what_fits() -> None:
    narrow, wide = normal(64, dtype=torch.bfloat16), normal(64)
    assert fits([narrow], [wide]) and fits([wide], [wide])  # its own master
    assert not fits([], [])
    assert not fits([wide], [wide.clone()]) and not fits([narrow, wide], [wide, wide])
    assert not fits([narrow], [wide.double()]) and not fits([narrow.cpu()], [wide.cpu()])
    assert not fits([narrow[1:]], [wide[1:]])  # off the step that is read at a time
    assert not fits([narrow.view(8, 8).T], [wide.view(8, 8)])


class Both:
    """The same parameters, stepped by the kernels and by torch."""

    def __init__(self, sizes: Sequence[int], own: bool = False) -> None:
        masters = [normal(n, seed=i) * 0.02 for i, n in enumerate(sizes)]
        self.theirs = [nn.Parameter(m.clone()) for m in masters]
        groups = [{"params": [p], "weight_decay": DECAY * (i % 2)} for i, p in enumerate(self.theirs)]
        self.adamw = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)
        self.ours = [Stepped(m if own else m.bfloat16(), m, torch.zeros_like(m), torch.zeros_like(m)) for m in masters]
        self.steps = torch.zeros(len(sizes), device="cuda")
        decays = [DECAY * (i % 2) for i in range(len(sizes))]
        self.one = OnePass(self.ours, self.steps, decays, [i % 2 for i in range(len(sizes))])

    def step(self, gradients: Sequence[Tensor], scale: float, stopped: float = 0.0) -> None:
        for p, gradient in zip(self.theirs, gradients, strict=True):
            p.grad = gradient.float().clone()
        given = torch.tensor(scale, device="cuda"), torch.tensor(stopped, device="cuda")
        self.adamw.grad_scale, self.adamw.found_inf = given
        self.adamw.step()
        self.one.step(gradients, LR, BETAS, EPS, *given)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_steps_are_torchs_to_a_few_last_places(dtype: torch.dtype, own: bool) -> None:
    both = Both(SIZES, own)
    for seed in range(12):
        both.step([normal(n, seed=100 * seed + i, dtype=dtype) for i, n in enumerate(SIZES)], 1.0 + seed % 3)
    for p, ours in zip(both.theirs, both.ours, strict=True):
        state = both.adamw.state[p]
        torch.testing.assert_close(ours.exp_avg, state["exp_avg"], rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(ours.exp_avg_sq, state["exp_avg_sq"], rtol=2e-6, atol=1e-9)
        torch.testing.assert_close(ours.master, p.detach(), rtol=1e-6, atol=1e-7)
        assert torch.equal(ours.param, ours.master if own else ours.master.bfloat16())
    assert both.steps.tolist() == [12.0] * len(SIZES)


def test_a_stopped_step_changes_nothing() -> None:
    both = Both(SIZES)
    both.step([normal(n, dtype=torch.bfloat16) for n in SIZES], 1.0)
    before = [t.clone() for ours in both.ours for t in ours]
    both.step([torch.full((n,), float("nan"), device="cuda", dtype=torch.bfloat16) for n in SIZES], 1.0, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, (t for ours in both.ours for t in ours), strict=True))
    assert both.steps.tolist() == [1.0] * len(SIZES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_of_squares_repeat_bit_by_bit(dtype: torch.dtype) -> None:
    both = Both(SIZES)
    gradients = [normal(n, seed=i, dtype=dtype) for i, n in enumerate(SIZES)]
    exact = torch.stack([sum(g.double().square().sum() for g in gradients[part::2]) for part in (0, 1)])
    found = both.one.squares(gradients, 2)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0.0)
    assert torch.equal(both.one.squares(gradients, 2), found)


@pytest.mark.parametrize("n", [1, 4096, 4097, 1 << 22])
def test_widen_is_torchs_sum(n: int) -> None:
    total, part = normal(n), normal(n, seed=1, dtype=torch.bfloat16)
    found = total.clone()
    widen(found, part, add=True)
    assert torch.equal(found, total + part)
    widen(found, part, add=False)
    assert torch.equal(found, part.float())


def build(accumulate: int) -> tuple[Transformer, Optimizer]:
    settings = {"model": "tiny", "out": "run", "steps": 8, "accumulate": accumulate}
    config = TrainConfig.of(settings)
    model = Transformer(config.model_settings()).init_weights(torch.Generator().manual_seed(0))
    return model, Optimizer(Alone(model, config, torch.device("cuda"), torch.bfloat16).parameters(), config)


def fill(model: Transformer, seed: int) -> list[Tensor]:
    """Gives every parameter a gradient, as autograd does, and returns them."""
    made = []
    for i, p in enumerate(model.parameters()):
        made.append(normal(*p.shape, seed=1000 * seed + i, dtype=torch.bfloat16))
        (p * made[-1]).sum().backward()
    return made


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_optimizer_is_torchs_with_its_norm_and_clipping(accumulate: int) -> None:
    model, ours = build(accumulate)
    theirs = [nn.Parameter(m.detach().clone()) for m in ours.masters]
    config = ours.config
    decayed, plain = [p for p in theirs if p.ndim >= 2], [p for p in theirs if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-3, betas=config.betas, eps=config.eps)
    for step in range(3):
        for micro in range(accumulate):
            made = fill(model, step * accumulate + micro)
            ours.collect()
            for p, gradient in zip(theirs, made, strict=True):
                p.grad = gradient.float() if micro == 0 else p.grad + gradient
        norm = ours.squares().sum().sqrt()
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, 1.0), rtol=1e-5, atol=0.0)
        ours.update(1e-3, norm, torch.zeros((), device="cuda"))
        adamw.step()
    assert ours.gradients() == []
    for p, master, param in zip(theirs, ours.masters, model.parameters(), strict=True):
        torch.testing.assert_close(master.detach(), p.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(param, master.bfloat16())


def test_microbatches_beyond_the_settings_are_summed_in_float32() -> None:
    model, optimizer = build(1)
    for _ in range(600):  # in bfloat16 the sum of ones would stop at 256
        model.norm.weight.grad = torch.ones_like(model.norm.weight)
        optimizer.collect()
    assert dict(optimizer.gradients())["norm.weight"].unique().tolist() == [600.0]
    assert float(optimizer.squares().sum()) == 600.0**2 * model.norm.weight.numel()


def test_the_state_goes_through_a_file(tmp_path: Path) -> None:
    """Under torch's names; the steps after it have the same bits."""
    model, optimizer = build(1)

    def step(model: Transformer, optimizer: Optimizer, seed: int) -> None:
        fill(model, seed)
        optimizer.collect()
        optimizer.update(1e-3, optimizer.squares().sum().sqrt(), torch.zeros((), device="cuda"))

    step(model, optimizer, 1)
    save_file(optimizer.state(), tmp_path / "optimizer.safetensors")
    other, restored = build(1)
    step(other, restored, 5)
    restored.load_state(load_file(tmp_path / "optimizer.safetensors"))
    for m, o in ((model, optimizer), (other, restored)):
        step(m, o, 2)
    state = optimizer.state()
    assert {key.partition("/")[0] for key in state} == {"master", "step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(t, restored.state()[key]) for key, t in state.items())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
