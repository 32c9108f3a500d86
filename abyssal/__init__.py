"""DeepSeek-V3, whole: the model, its training, its public checkpoint format, generation from its latent cache."""

from typing import TYPE_CHECKING, Any

from abyssal.config import ConfigError, ModelConfig

if TYPE_CHECKING:
    from abyssal.checkpoint import load, save
    from abyssal.engine import LLM, Sampling
    from abyssal.model.transformer import Transformer

__version__ = "0.1.0"
__all__ = ["LLM", "ConfigError", "ModelConfig", "Sampling", "Transformer", "load", "save"]

_HOMES = {
    "load": "abyssal.checkpoint", "save": "abyssal.checkpoint", "LLM": "abyssal.engine",
    "Sampling": "abyssal.engine", "Transformer": "abyssal.model.transformer",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """PyTorch takes seconds to import: what needs it is imported when it is first named."""
    if name not in _HOMES:
        raise AttributeError(f"module 'abyssal' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
