"""Linear maps, norms and the gated MLP: what attention and experts are made of."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from abyssal.ops.fp8 import dequantize
from abyssal.ops.fp8_linear import fp8_linear
from abyssal.ops.gated import gated, gated_halves
from abyssal.ops.linear import adjoin, adjoining, linear, linears
from abyssal.ops.norm import add_norm, norm_beside, rms_norm


class Pinned(nn.Module):
    """A module some of whose tensors keep their dtype under `.to(dtype)`, `.half()` and the like: router biases
    and FP8 scales are float32 whatever the rest is, and FP8 weights are not numbers without their scales."""

    def pinned(self) -> list[str]:
        """Names of own parameters and buffers that only ever change device."""
        return [name for name, t in {**self._parameters, **self._buffers}.items()
                if t is not None and t.dtype == torch.float8_e4m3fn]  # fmt: skip

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before: dict[str, Any] = {name: getattr(self, name) for name in self.pinned()}
        kept = {name: t.data for name, t in before.items()}
        super()._apply(fn, recurse)
        for name, t in kept.items():
            moved = getattr(self, name)
            if moved.dtype != t.dtype:
                moved.data = t.to(moved.device)
        return self


class Linear(Pinned):
    """y = x Wᵀ, without a bias. `weight` is `[out, in]`; with FP8 weights `scale` is `[out/128, in/128]`."""

    scale: Tensor | None

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.register_buffer("scale", None)

    def pinned(self) -> list[str]:
        return [*super().pinned(), *(["scale"] if self.scale is not None else [])]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight as numbers of `dtype`, dequantised where it is FP8."""
        return dequantize(self.weight, self.scale, dtype) if self.scale is not None else self.weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is not None:
            return fp8_linear(x, self.weight, self.scale)
        return linear(x, self.weight.to(x.dtype), settled=self.weight.dtype == x.dtype)


def beside(x: Tensor, *maps: Linear) -> tuple[Tensor, ...]:
    """Several maps of one input: one product where their weights adjoin (`join`), else one after the other; in
    training on a GPU their products back add to one gradient."""
    if _trained(x, *maps):
        return linears(x, *(m.weight for m in maps))
    plain = all(type(m) is Linear and m.scale is None for m in maps)
    joined = adjoining([m.weight for m in maps]) if plain else None
    if joined is None or joined.dtype != x.dtype:
        return tuple(m(x) for m in maps)
    return linear(x, joined, settled=True).split([m.weight.shape[0] for m in maps], -1)


def join(*maps: Linear) -> None:
    """Lays the maps' weights one behind the other, for `beside`; those in FP8 are left as they are."""
    if all(m.scale is None for m in maps):
        adjoin([m.weight for m in maps])


def trained_together(x: Tensor, *maps: Linear) -> Tensor | None:
    """In training on a GPU, several maps of one input as one product, `[T, sum of their outputs]`, and one backward:
    the weights are copied together, which is little beside the rows of a batch. None elsewhere."""
    if not (_trained(x, *maps) and x.shape[0] >= 512):
        return None
    return linear(x, torch.cat([m.weight for m in maps]))


def _trained(x: Tensor, *maps: Linear) -> bool:
    """Whether gradients are wanted of maps on a GPU that are no more than their weights (a map may have another class,
    which computes in FP8 or gathers its weight first)."""
    plain = all(type(m) is Linear and "forward" not in m.__dict__ and m.weight.dtype == x.dtype for m in maps)
    return plain and x.is_cuda and torch.is_grad_enabled() and all(m.weight.requires_grad for m in maps)


class RMSNorm(nn.Module):
    """x / rms(x) · weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x, and the norm of it."""
        return norm_beside(x, self.weight, self.eps)

    def of_sum(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x + y, and the norm of that."""
        return add_norm(x, y, self.weight, self.eps)


def add_map(y: Tensor, x: Tensor, linear_map: Linear) -> Tensor:
    """y + linear_map(x), on a GPU added by the product itself, in y's place: nothing else may read y."""
    if _trained(x, linear_map) and y.dtype == x.dtype:
        return y.addmm_(x, linear_map.weight.T)
    return y + linear_map(x)


class MLP(nn.Module):
    """The gated MLP of the dense layers and the shared experts: w2(silu(w1 x) · w3 x)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1 = Linear(width, inner)
        self.w2 = Linear(inner, width)
        self.w3 = Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.hidden(x))

    @property
    def whole(self) -> bool:
        """Whether it computes as it does here: nothing has given it another class or another forward."""
        return type(self) is MLP and "forward" not in self.__dict__

    @property
    def plain(self) -> bool:
        """Whether it is no more than its weights, which are numbers as they lie: no FP8, kept or computed in."""
        maps = (self.w1, self.w2, self.w3)
        return self.whole and all(type(m) is Linear and "forward" not in m.__dict__ and m.scale is None for m in maps)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """y + self(x), perhaps in y's place."""
        return add_map(y, self.hidden(x), self.w2) if self.whole else y + self(x)

    def hidden(self, x: Tensor) -> Tensor:
        """`[T, inner]`: what w2 reads."""
        both = trained_together(x, self.w1, self.w3)
        if both is not None:
            return gated_halves(both)
        a, b = beside(x, self.w1, self.w3)
        return gated(a, b)

    def join(self) -> None:
        """See `Transformer.join`."""
        join(self.w1, self.w3)
