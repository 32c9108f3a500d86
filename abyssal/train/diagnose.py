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
    name = bad_gradient(gradients)
    return f"the gradient{f' of {name}' if name else ''} (every layer's output is finite)"


def bad_gradient(gradients: Sequence[tuple[str, Tensor]]) -> str | None:
    """The name of the last layer's gradient that is not finite."""
    return next((name for name, gradient in reversed(gradients) if not _finite(gradient)), None)


def first_of_ranks(outputs: Sequence[str | None], gradients: Sequence[str | None]) -> str:
    """What is not finite first, in words, where each rank found the output of one module or none, and likewise a
    gradient."""
    if any(outputs):
        return f"the output of {min((name for name in outputs if name), key=_place)}"
    last = max((name for name in gradients if name), key=_place, default=None)
    return f"the gradient{f' of {last}' if last else ''} (every layer's output is finite)"


def _place(name: str) -> tuple[int, int]:
    """Where a module comes in the whole model, of which a rank may have only a part."""
    part, *rest = name.split(".")
    parts = ("embed", "layers", "norm", "head", "mtp")
    return parts.index(part) if part in parts else len(parts), int(rest[0]) if rest and rest[0].isdecimal() else 0


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    return all(map(_finite, value)) if isinstance(value, tuple | list) else True
