"""Tensor parallel with sequence parallel: odd models, and what cannot be divided."""

from pathlib import Path

import pytest
from cases import CASES, check_cases

from abyssal.config import ModelConfig
from abyssal.parallel.tensor import check

QUICK = ["queries not compressed, two MTP modules, recomputed", "mqa"]


def test_two_ranks_train_odd_models_as_one_does(tokens: Path, tmp_path: Path) -> None:
    check_cases(tokens, tmp_path, "tp=2", QUICK)


@pytest.mark.slow
def test_two_ranks_train_odder_models_as_one_does(tokens: Path, tmp_path: Path) -> None:
    check_cases(tokens, tmp_path, "tp=2", [name for name in CASES if name not in QUICK])


TINY = ModelConfig.load("tiny")


@pytest.mark.parametrize(
    ("changes", "tp", "what"),
    [
        ({"num_attention_heads": 6}, 4, "num_attention_heads: expected a multiple of 4, got 6"),
        ({"intermediate_size": 45}, 2, "intermediate_size: expected a multiple of 2, got 45"),
        ({"moe_intermediate_size": 15}, 2, "n_shared_experts · moe_intermediate_size: expected a multiple of 2, got"),
        ({"position": "binary", "qk_rope_head_dim": 0}, 2, "position: expected none, rope or decoupled, got 'binary'"),
        ({"attention": "gqa", "num_attention_heads": 4, "num_key_value_heads": 1, "position": "none",
          "qk_rope_head_dim": 0}, 2, "num_key_value_heads: expected a multiple of 2, got 1"),
    ],
)  # fmt: skip
def test_what_tensor_parallel_cannot_divide_is_named(changes: dict, tp: int, what: str) -> None:
    with pytest.raises(ValueError, match=f"mesh tp={tp}: {what}"):
        check(TINY.replace(**changes), tp)


def test_sizes_that_no_layer_has_need_not_be_divided() -> None:
    check(TINY.replace(intermediate_size=45, first_k_dense_replace=0), 2)
    check(TINY.replace(moe_intermediate_size=15, n_shared_experts=0), 2)
    check(TINY.replace(intermediate_size=45, num_attention_heads=7), 1)
