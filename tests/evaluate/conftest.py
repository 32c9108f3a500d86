"""The checkpoints that all tests of the evaluation read."""

from pathlib import Path

import pytest
from evaluate_model import checkpoint


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def folder_with_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model-bos"), add_bos=True)
