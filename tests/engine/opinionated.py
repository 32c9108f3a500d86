"""A tiny model for tests of the engine, whose weights are large enough that it has opinions: no two tokens tie."""

import torch

from abyssal import ModelConfig
from abyssal.model.transformer import Transformer


def opinionated(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: object) -> Transformer:
    """`changes` are to the `tiny` preset."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(ModelConfig.load("tiny").replace(**changes)).to(dtype).init_weights(generator)
    for p in model.parameters():
        if p.ndim > 1:
            p.data.mul_(5)
    for gate in model.gates():
        assert gate.bias is not None
        gate.bias.normal_(std=0.1, generator=generator)
    return model
