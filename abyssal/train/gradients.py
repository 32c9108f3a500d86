"""A step's gradients: what autograd leaves at the parameters, summed over the microbatches.

A sum is float32 where the parameter is narrower. Where a step has several microbatches it lies in a buffer that is kept
from step to step: every step finds the same memory. Where it has one there is nothing to add up, and its gradients may
stay as they are.
"""

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from abyssal.ops.adamw import widen


class Gradients:
    """Of `params`, in their order. A gradient is in the dtype of its `master`, or, of a first microbatch, in the
    parameter's where `held`."""

    def __init__(self, params: Sequence[nn.Parameter], masters: Sequence[Tensor], held: bool, several: bool) -> None:
        """`several`: sums are kept, and a gradient is added as soon as autograd has made it, so that never all of them
        are there beside the sums; otherwise `collect` takes them in."""
        self.params, self.held, self.several = list(params), held, several
        self.found: list[Tensor | None] = [None] * len(params)
        self._dtypes = [m.dtype for m in masters]
        self._buffers: list[Tensor | None] = [None] * len(params)
        if several:
            # Made now: made in a backward pass they would lie where activations were, and these elsewhere ever after.
            for i in range(len(params)):
                self._buffer(i)
            mine = weakref.ref(self)  # else the parameters would keep alive whatever holds them

            def hook(i: int) -> None:
                def take(param: Tensor) -> None:
                    if (found := mine()) is not None:
                        found.take(i)

                self.params[i].register_post_accumulate_grad_hook(take)

            for i in range(len(params)):
                hook(i)

    @torch.no_grad()
    def take(self, i: int) -> None:
        """Takes in the gradient that parameter `i` has, if it has one."""
        gradient = self.params[i].grad
        if gradient is None:
            return
        self.params[i].grad = None
        before = self.found[i]
        if before is None:
            self.found[i] = gradient if self.held else self._widened(i, gradient)
        else:
            total = self._widened(i, before)
            widen(total, gradient, add=True)
            self.found[i] = total

    def collect(self) -> None:
        """Takes in what there is."""
        for i in range(len(self.params)):
            self.take(i)

    @torch.no_grad()
    def alike(self) -> None:
        """Brings all to one dtype, where only some were added to."""
        if any(g is not None and g.dtype == wide for g, wide in zip(self.found, self._dtypes)):
            self.found = [None if g is None else self._widened(i, g) for i, g in enumerate(self.found)]

    def kept(self) -> list[Tensor]:
        """The buffers that there are."""
        return [buffer for buffer in self._buffers if buffer is not None]

    def snapshot(self) -> Callable[[], None]:
        """What makes the gradients that there are now, here and at the parameters, be there again; their memory has
        been written anew by then."""
        found, at = list(self.found), [p.grad for p in self.params]

        def again() -> None:
            self.found = list(found)
            for p, gradient in zip(self.params, at, strict=True):
                p.grad = gradient

        return again

    def drop(self) -> None:
        """Forgets them; buffers of several microbatches' sums stay."""
        if not self.several:
            self._buffers = [None] * len(self.params)
        self.found = [None] * len(self.params)
        for p in self.params:
            p.grad = None

    def _widened(self, i: int, gradient: Tensor) -> Tensor:
        """The gradient in the buffer."""
        buffer = self._buffer(i)
        if gradient is not buffer:
            widen(buffer, gradient, add=False)
        return buffer

    def _buffer(self, i: int) -> Tensor:
        buffer = self._buffers[i]
        if buffer is None:
            like = self.params[i].detach()
            buffer = torch.empty_like(like, dtype=self._dtypes[i], memory_format=torch.contiguous_format)
            self._buffers[i] = buffer
        return buffer
