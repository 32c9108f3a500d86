"""Models whose every tensor differs, and checkpoints written without our writer."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from abyssal.config import ModelConfig
from abyssal.model.layers import RMSNorm
from abyssal.model.transformer import Transformer
from abyssal.ops.fp8 import quantize


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are only slowed by a second."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests kill processes; none cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def make() -> Callable[..., Transformer]:
    """A model with weights of std 0.2, norms around 1 and router biases that are not 0."""

    def build(config: ModelConfig | None = None, seed: int = 0, dtype: torch.dtype = torch.float32) -> Transformer:
        config = config or ModelConfig.load("tiny")
        generator = torch.Generator().manual_seed(seed)
        model = Transformer(config.replace(initializer_range=0.2)).init_weights(generator)
        model.config = config
        for gate in model.gates():
            if gate.bias is not None:
                gate.bias.normal_(0, 0.1, generator=generator)
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.weight.data.normal_(1, 0.1, generator=generator)
        return model.to(dtype)

    return build


@pytest.fixture
def tensors_of() -> Callable[[Path], dict[str, Tensor]]:
    """Every tensor of a folder, read by the safetensors library."""

    def read(folder: Path) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors = load_file(file)
            assert not found.keys() & tensors.keys()
            found |= tensors
        return found

    return read


@pytest.fixture
def same_bits() -> Callable[[dict[str, Tensor], dict[str, Tensor]], None]:
    def check(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
        assert a.keys() == b.keys()
        for name, t in a.items():
            assert t.dtype == b[name].dtype and t.shape == b[name].shape, name
            assert torch.equal(t.contiguous().view(torch.uint8), b[name].contiguous().view(torch.uint8)), name

    return check


@pytest.fixture
def write() -> Callable[..., Path]:
    """Anybody's folder: no stamp, one file."""

    def fill(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
        return folder

    return fill


@pytest.fixture
def to_fp8() -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """What DeepSeek quantises: every projection; not embedding, head, norms, gates."""

    def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, t in tensors.items():
            if name.endswith(("_proj.weight", "_proj_with_mqa.weight")):
                out[name], out[name + "_scale_inv"] = quantize(t)
            else:
                out[name] = t
        return out

    return convert
