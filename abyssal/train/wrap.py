"""Recomputation and compilation of blocks, applied from outside: `model/` knows of neither."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from abyssal.config import ConfigError
from abyssal.model.transformer import Transformer
from abyssal.train.config import TrainConfig
from abyssal.train.fp8 import apply_fp8
from abyssal.train.recompute import NONE, parse, recomputing


def wrap_blocks(model: Transformer, config: TrainConfig) -> None:
    """Lets each block run as the configuration says: in FP8, compiled, and forgetting what is to be recomputed.

    Raises ConfigError if no map of the model is large enough for FP8 to pay.
    """
    operations = parse(config.recompute)
    if config.fp8:
        try:
            apply_fp8(model)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    for block in _blocks(model):
        forward: Any = block.forward
        if config.compile:
            forward = torch.compile(forward)
        forward = recomputing(forward, operations, model.config)
        if forward != block.forward:
            block.__dict__["forward"] = forward


def splits_backward(config: TrainConfig) -> bool:
    """Whether a pipeline may split a block's backward pass: a half of a recomputed or compiled one is no less work."""
    return config.recompute == NONE and not config.compile


@contextmanager
def unwrapped(model: Transformer) -> Iterator[None]:
    """The blocks as `model/` made them, for as long as this lasts."""
    wrapped = {block: block.__dict__.pop("forward") for block in _blocks(model) if "forward" in block.__dict__}
    try:
        yield
    finally:
        for block, forward in wrapped.items():
            block.__dict__["forward"] = forward


def _blocks(model: Transformer) -> list[nn.Module]:
    return [*model.layers, *(module.block for module in model.mtp)]
