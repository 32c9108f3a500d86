"""Pipeline parallel: how layers are divided, the two halves of a backward pass, and each schedule's steps."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import on_ranks
from steps import Steps, settings, take
from torch import Tensor, nn

from abyssal.config import ModelConfig
from abyssal.data import TokenSet
from abyssal.parallel import MeshShape
from abyssal.parallel.halves import input_half, weight_half
from abyssal.parallel.pipeline import check, layers_of, stages_of
from abyssal.train.diagnose import NotFinite
from abyssal.train.trainer import Trainer
from abyssal.train.validation import Validator

TINY = ModelConfig.load("tiny")
Case = tuple[dict[str, Any], dict[str, Any]]  # changes of the model, and of the run

CASES: dict[str, Case] = {
    "gpipe, tied": (
        {"num_nextn_predict_layers": 0, "tie_word_embeddings": True}, {"schedule": "gpipe", "accumulate": 3}
    ),
    "1f1b, recomputed, kept gathered": ({"num_hidden_layers": 3}, {"recompute": "block", "reshard": False}),
    "1f1b, no experts, no MTP": (
        {"num_nextn_predict_layers": 0, "n_routed_experts": None, "n_group": 1, "topk_group": 1}, {}
    ),
    "interleaved, two MTP modules": ({"num_nextn_predict_layers": 2}, {"schedule": "interleaved"}),
    "zbv, two MTP modules, tied": (
        {"num_hidden_layers": 5, "num_nextn_predict_layers": 2, "tie_word_embeddings": True}, {"schedule": "zbv"}
    ),
    "zbv, recomputed, fewer microbatches than stages": ({}, {"schedule": "zbv", "recompute": "block", "accumulate": 2}),
    "zbv, classic balance loss": (
        {"num_nextn_predict_layers": 0}, {"schedule": "zbv", "auxiliary_balance": 0.2, "sequence_balance": 0.0}
    ),
    "dualpipev": ({}, {"schedule": "dualpipev", "accumulate": 5}),
}  # fmt: skip


class Found(NamedTuple):
    steps: Steps
    loss: float  # of validation, after the steps
    load: list[list[float]]
    mtp: list[float]  # how often each MTP module guesses right
    first: str  # what is not finite first where the last layer is not


def run(tokens: Path, out: Path, mesh: str, cases: list[Case], steps: int) -> list[Found]:
    found = []
    for model, changes in cases:
        made: list[Trainer] = []
        config = settings(tokens, out, mesh, model, **({"dtype": "float64"} | changes))
        taken = take(config, steps, made)
        modules = len(made[0].model.mtp)
        measured = Validator(TokenSet.open(tokens), 500, 128, 64, modules).measure(made[0].spread.measure)
        first = poisoned(made[0]) if not found else ""
        found.append(Found(taken, measured.loss, measured.expert_load, measured.mtp_accuracy, first))
    return found


def poisoned(trainer: Trainer) -> str:
    name = f"layers.{trainer.model.config.num_hidden_layers - 1}.attn.wo.weight"
    for key, master in zip(trainer.optimizer.names, trainer.optimizer.masters, strict=True):
        if key == name:
            master.detach().fill_(torch.inf)
    with trainer.stream() as stream, pytest.raises(NotFinite) as error:
        trainer.step(next(stream))
    return str(error.value).partition("first: ")[2]


def check_cases(tokens: Path, out: Path, mesh: str, cases: dict[str, Case], ranks: int, steps: int = 2) -> None:
    """Raises AssertionError unless every run over `mesh` is one process's, but for float64's rounding."""
    expected = run(tokens, out, "", list(cases.values()), steps)
    found = on_ranks(ranks, run, tokens, out, mesh, list(cases.values()), steps)
    for name, one, *of_ranks in zip(cases, expected, *found, strict=True):
        # A rank has its stages' gradients, and the ranks of all stages all of them.
        assert set().union(*(ours.steps.gradients for ours in of_ranks)) == set(one.steps.gradients), name
        for ours in of_ranks:
            for key, gradient in ours.steps.gradients.items():
                torch.testing.assert_close(
                    gradient, one.steps.gradients[key], rtol=1e-7, atol=1e-10,
                    msg=lambda m, n=name, k=key: f"{n}: {k}: {m}",
                )  # fmt: skip
            a, b = (torch.tensor(f.steps.losses, dtype=torch.float64) for f in (ours, one))
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: losses: {m}")
            assert ours.steps.violations == one.steps.violations, name
            for key, bias in ours.steps.biases.items():
                assert torch.equal(bias, one.steps.biases[key]), f"{name}: {key}"
            assert ours.loss == pytest.approx(one.loss, rel=1e-9), name
            assert ours.load == one.load and ours.mtp == one.mtp, name
            assert ours.first == one.first, name


def test_every_schedule_takes_the_steps_of_one_process(tokens: Path, tmp_path: Path) -> None:
    of_four = ("1f1b, recomputed, kept gathered", "1f1b, no experts, no MTP", "zbv, classic balance loss")
    check_cases(tokens, tmp_path, "pp=2", {name: case for name, case in CASES.items() if name not in of_four}, 2)


FOUR: dict[str, dict[str, Case]] = {  # a mesh: runs over it
    "pp=4": {
        "1f1b": ({}, {}),
        "zbv": ({"num_hidden_layers": 9, "num_nextn_predict_layers": 2}, {"schedule": "zbv", "accumulate": 7}),
        "dualpipev": ({"num_hidden_layers": 8}, {"schedule": "dualpipev", "accumulate": 8}),
        "interleaved": ({"num_hidden_layers": 8}, {"schedule": "interleaved", "accumulate": 8}),
        "interleaved, fewer microbatches than ranks": (
            {"num_hidden_layers": 8},
            {"schedule": "interleaved", "accumulate": 3},
        ),
    },
    "pp=2,dp=2": CASES,
    "pp=2,tp=2": {"1f1b": ({}, {}), "zbv": ({}, {"schedule": "zbv"})},
    "pp=2,cp=2": {"1f1b": ({}, {}), "interleaved": ({}, {"schedule": "interleaved"})},
    "pp=2,ep=2": {"1f1b": ({}, {}), "dualpipev": ({}, {"schedule": "dualpipev"})},
}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", FOUR)
def test_four_ranks_take_the_steps_of_one_process(mesh: str, tokens: Path, tmp_path: Path) -> None:
    batches = MeshShape.parse(mesh).batches
    cases = {
        name: (model, changes | {"accumulate": changes.get("accumulate", 4) * batches})
        for name, (model, changes) in FOUR[mesh].items()
    }
    check_cases(tokens, tmp_path, mesh, cases, 4)


@given(st.integers(1, 80), st.integers(2, 16), st.integers(0, 3))
def test_stages_have_each_layer_once_and_about_as_many(layers: int, stages: int, modules: int) -> None:
    stages = min(stages, layers)
    if stages < 2:
        return
    found = layers_of(TINY.replace(num_hidden_layers=layers, num_nextn_predict_layers=modules), stages)
    assert [l for part in found for l in part] == list(range(layers))
    sizes = [len(part) for part in found]
    assert min(sizes) >= 1
    assert max(sizes[:-1]) - min(sizes[:-1]) <= 1
    if sizes[-1] > 1:  # the modules and the head count as layers
        assert abs(sizes[-1] + modules + 1 - max(sizes[:-1])) <= 1


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zbv", "dualpipev"])
def test_ranks_have_each_stage_once(schedule: str) -> None:
    stages = [s for rank in range(3) for s in stages_of(rank, 3, schedule)]
    assert sorted(stages) == list(range(len(stages)))


@pytest.mark.parametrize(
    ("layers", "ranks", "schedule", "microbatches", "what"),
    [
        (3, 4, "1f1b", 8, "num_hidden_layers: expected 4 or more, a stage each, got 3"),
        (7, 4, "zbv", 8, "num_hidden_layers: expected 8 or more, a stage each, got 7"),
        (8, 4, "1f1b", 3, "expected 4 microbatches of a step or more, got 3"),
        (8, 4, "dualpipev", 7, "expected 8 microbatches of a step or more, got 7"),
        (8, 4, "interleaved", 9, "expected a multiple of 4 microbatches of a step, got 9"),
    ],
)
def test_what_a_schedule_lacks_is_named(layers: int, ranks: int, schedule: str, microbatches: int, what: str) -> None:
    with pytest.raises(ValueError, match=f"mesh pp={ranks}: schedule {schedule}: {what}"):
        check(TINY.replace(num_hidden_layers=layers), ranks, schedule, microbatches)


class Both(torch.autograd.Function):
    """Two outputs of one node, of different shapes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, w)
        return x @ w, (x * w.sum()).sum(-1)

    @staticmethod
    def backward(ctx: Any, da: Tensor, db: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return da @ w.T + db[:, None] * w.sum(), x.T @ da + (db[:, None] * x).sum()


class Odd(nn.Module):
    """A weight at several places, one below another, and beside them; a node of two outputs; a weight that waits."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.other, self.both, self.bias, self.idle = (
            nn.Parameter(torch.randn(4, 4, dtype=torch.float64)) for _ in range(5)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.tanh(x @ self.shared)
        a, b = Both.apply(y, self.both)
        z = torch.sin(a @ self.other) @ self.shared + (self.shared * self.bias).sum(0)
        return z * b[:, None], (z @ self.bias).sum()


class Last(nn.Module):
    """What Python defines, and nothing above it."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.bias = (nn.Parameter(torch.randn(4, 4, dtype=torch.float64)) for _ in range(2))
        self.both = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.tanh(x @ self.shared) @ self.shared + (self.shared * self.bias).sum(0)
        a, b = Both.apply(y, self.both)
        return a, b.sum()


@pytest.mark.parametrize(("made", "early"), [(Odd, {"shared", "bias"}), (Last, {"shared"})])
def test_the_halves_of_a_backward_pass_make_the_gradients_of_the_whole(made: type[nn.Module], early: set[str]) -> None:
    torch.manual_seed(0)
    module = made()
    for gradients in ((torch.randn(3, 4, dtype=torch.float64), torch.randn((), dtype=torch.float64)), None):
        x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        outputs = module(x)
        given = gradients or [torch.ones_like(o) for o in outputs]
        torch.autograd.backward(outputs, given)
        expected = {name: p.grad for name, p in module.named_parameters()}
        dx, x.grad = x.grad, None
        module.zero_grad()
        plain = torch.ones(3)  # what needs no gradient, and what is no tensor
        outputs = module(x)
        found, branches = input_half(outputs, gradients, [x, plain, "text"], module.parameters())
        assert {name for name, p in module.named_parameters() if p.grad is not None} == early
        assert found[1:] == (None, None)
        torch.testing.assert_close(found[0], dx)
        weight_half(branches)
        for name, p in module.named_parameters():
            torch.testing.assert_close(p.grad, expected[name], msg=name)
        module.zero_grad()
