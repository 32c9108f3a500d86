"""Odd models and settings under tensor and context parallel: steps in float64, several runs in one set of ranks."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from ranks import on_ranks
from steps import Steps, settings, take

from abyssal.data import TokenSet
from abyssal.train.trainer import Trainer
from abyssal.train.validation import Validator

Case = tuple[dict[str, Any], dict[str, Any]]  # changes of the model, and of the run

CASES: dict[str, Case] = {
    "queries not compressed, two MTP modules, recomputed": (
        {"q_lora_rank": None, "num_nextn_predict_layers": 2}, {"recompute": "block"}
    ),
    "up-projections recomputed": ({"num_hidden_layers": 2}, {"recompute": "up"}),
    "classic balance loss, documents of one token": (
        {"num_hidden_layers": 2, "topk_method": "greedy", "n_group": 1, "scoring_func": "softmax"},
        {"auxiliary_balance": 0.2, "sequence_balance": 0.0, "sequence": 1},
    ),
    "one long document": ({"num_hidden_layers": 2}, {"sequence": 128, "reshard": False}),
    "coupled RoPE, dense, tied": (
        {"num_hidden_layers": 2, "position": "rope", "qk_rope_head_dim": 0, "n_routed_experts": None,
         "n_group": 1, "topk_group": 1, "tie_word_embeddings": True, "num_nextn_predict_layers": 0}, {}
    ),
    "gqa": ({"num_hidden_layers": 2, "attention": "gqa", "num_key_value_heads": 2, "position": "rope",
             "qk_rope_head_dim": 0}, {}),
    "mqa": ({"num_hidden_layers": 2, "attention": "mqa", "position": "none", "qk_rope_head_dim": 0}, {}),
}  # fmt: skip


class Found(NamedTuple):
    steps: Steps
    loss: float  # of validation after them, over batches whose tokens cannot be divided
    shares: list[list[float]]  # the experts' loads, and how often each MTP module guesses right


def run(tokens: Path, out: Path, mesh: str, cases: list[Case], steps: int = 2) -> list[Found]:
    found = []
    for model, changes in cases:
        options = {"dtype": "float64", "accumulate": 2} | changes
        made: list[Trainer] = []
        taken = take(settings(tokens, out, mesh, model, **options), steps, made)
        measured = Validator(TokenSet.open(tokens), 250, 99, 64, len(made[0].model.mtp)).measure(made[0].spread.measure)
        found.append(Found(taken, measured.loss, [*measured.expert_load, measured.mtp_accuracy]))
    return found


def check_cases(tokens: Path, out: Path, mesh: str, names: list[str], ranks: int = 2) -> None:
    """Raises AssertionError unless the runs over `mesh` are one process's, but for float64's rounding."""
    cases = [CASES[name] for name in names]
    expected = run(tokens, out, "", cases)
    for found in on_ranks(ranks, run, tokens, out, mesh, cases):
        for name, (ours, loss, load), (one, loss_one, load_one) in zip(names, found, expected, strict=True):
            assert abs(loss - loss_one) < 1e-10 and load == load_one, name
            for key, gradient in ours.gradients.items():
                torch.testing.assert_close(
                    gradient, one.gradients[key], rtol=1e-7, atol=1e-10, msg=lambda m, n=name, k=key: f"{n}: {k}: {m}"
                )
            a, b = (torch.tensor(s.losses, dtype=torch.float64) for s in (ours, one))
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: losses: {m}")
            assert ours.violations == one.violations, name
