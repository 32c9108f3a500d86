"""Where a number first ceased to be one."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from abyssal.model.objective import Microbatch
from abyssal.model.transformer import Transformer
from abyssal.train.wrap import unwrapped


class NotFinite(ArithmeticError):
    """A loss or a gradient that is NaN or infinite. The message tells the step, the layer and the saved state."""


@torch.no_grad()
def first_not_finite(
    model: Transformer, microbatches: Iterable[Microbatch], gradients: Sequence[tuple[str, Tensor]]
) -> str:
    """Runs the microbatches forward again and says in words what is not finite first: a layer's output, or, where
    every output is finite, one of the step's `gradients`, of which the last layer's is computed first."""
    with unwrapped(model), watched(model) as found:
        for micro in microbatches:
            states = model.hidden(micro.tokens, micro.packing).states
            model.logits(states)
            for module in model.predict_states(states, micro.tokens, micro.packing):
                model.logits(module.states)
            if found:
                return f"the output of {found[0]}"
    return first_gradient(gradients)


@contextmanager
def watched(model: Transformer) -> Iterator[list[str]]:
    """While this lasts, the first module whose output is not finite is named in the list."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not _finite(output):
                found.append(name)

        return hook

    hooks = [m.register_forward_hook(watch(name)) for name, m in model.named_modules() if name]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def first_gradient(gradients: Sequence[tuple[str, Tensor]]) -> str:
    """Which of a step's gradients is not finite, the last layer's first; in words."""
    for name, gradient in reversed(gradients):
        if not _finite(gradient):
            return f"the gradient of {name} (every layer's output is finite)"
    return "the gradient (every layer's output is finite)"


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    return all(map(_finite, value)) if isinstance(value, tuple | list) else True
