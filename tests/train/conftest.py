"""A corpus that is learnt in seconds, tokenised once, and the settings of a run on it."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from abyssal.data import Batch, Tokenizer, TokenSet, prepare
from abyssal.train import TrainConfig

torch.set_num_threads(1)  # the models are tiny, and the cores belong to pytest's workers

OVERRIDES = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 8,
    "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_nextn_predict_layers": 1,
}  # fmt: skip


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ninety short documents as JSON lines."""
    draw = random.Random(0)
    words = ["the cat", "sat on", "a mat", "and", "saw 1234", "größer", "birds;\n"]
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=draw.randint(5, 60)))}) for _ in range(90)]
    file = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    file.write_text("\n".join(lines), "utf-8")
    return file


@pytest.fixture(scope="session")
def token_set(text: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenSet:
    """The documents as tokens of a vocabulary of at most 320."""
    texts = [json.loads(line)["text"] for line in text.read_text("utf-8").splitlines()]
    out = tmp_path_factory.mktemp("tokens")
    return prepare(text, Tokenizer.train(texts, 320), out, validation=0.1, progress=False)


@pytest.fixture
def make_config(token_set: TokenSet, tmp_path: Path) -> Callable[..., TrainConfig]:
    """A small run's configuration; keywords change it, and `model` its model's settings."""

    def make(model: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            "model": "tiny", "model_overrides": OVERRIDES | (model or {}), "data": str(token_set.folder),
            "out": str(tmp_path / "run"), "steps": 8, "batch_tokens": 128, "sequence": 64, "lr": 3e-3,
            "log_every": 1, "validate_every": 4, "validation_tokens": 512, "save_every": 4, "device": "cpu",
        }  # fmt: skip
        return TrainConfig.of(settings | changes)

    return make


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """A batch of random tokens in sequences of the given lengths, with random weights."""

    def make(lengths: list[int], seed: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        total = sum(lengths)
        tokens = torch.randint(0, 320, (total,), generator=generator)
        weights = torch.rand(total, generator=generator) * (torch.rand(total, generator=generator) > 0.2)
        return Batch(tokens, lengths, weights)

    return make
