"""The corpus and the settings of the training tests, with more layers and heads to divide."""

import json
import random
from pathlib import Path

import pytest

from abyssal.data import Tokenizer, prepare

WORDS = ["the cat", "sat on", "a mat", "and", "saw 1234", "größer", "birds;\n"]


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token set's folder: ninety short documents, a vocabulary of at most 320."""
    draw = random.Random(0)
    folder = tmp_path_factory.mktemp("parallel")
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(5, 60))) for _ in range(90)]
    file = folder / "corpus.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts), "utf-8")
    return prepare(file, Tokenizer.train(texts, 320), folder / "tokens", validation=0.1, progress=False).folder
