"""RMS normalisation over the last dimension (Zhang & Sennrich 2019)."""

import torch
from torch import Tensor

from abyssal.ops.device import capability


def rms_norm(x: Tensor, weight: Tensor, eps: float, path: str | None = None) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight, `[..., D]`; the mean in float32 or wider, the result in x's dtype.

    The normalised value is rounded to x's dtype before it is multiplied, as DeepSeek's and transformers' code do.
    Paths: "reference", "triton" (on a GPU, one pass over memory forward and one backward, both deterministic; under
    torch.compile without gradients the reference, which it fuses as well). None chooses.
    """
    if path is None:
        path = "triton" if _fits(x, weight) else "reference"
    if path == "triton":
        from abyssal.kernels import norm as kernels

        learns = _learns(x, weight)
        return kernels.trained_rms_norm(x, weight, eps)[0] if learns else kernels.rms_norm(x, weight, eps)
    if path != "reference":
        raise ValueError(f"path: expected 'reference' or 'triton', got {path!r}")
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normal.to(x.dtype) * weight.to(x.dtype)


def add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float, path: str | None = None) -> tuple[Tensor, Tensor]:
    """x + y, and `rms_norm` of that sum: the stream after a part of a layer, and what the next part reads.

    `x`, `y` `[..., D]` of one dtype. The sum is rounded to it before it is normalised, as by two operations. Paths as
    in `rms_norm`.
    """
    if path is None:
        path = "triton" if _fits(x, weight, y) and x.dtype == y.dtype else "reference"
    if path == "triton":
        from abyssal.kernels import norm as kernels

        if _learns(x, weight, y):
            total, out, _ = kernels.trained_add_norm(x, y, weight, eps)
            return total, out
        return kernels.add_norm(x, y, weight, eps)
    total = x + y
    return total, rms_norm(total, weight, eps, path)


def norm_beside(x: Tensor, weight: Tensor, eps: float, path: str | None = None) -> tuple[Tensor, Tensor]:
    """x itself, to be read in the norm's stead by whom the stream goes on to, and `rms_norm(x)`. On "triton" both
    gradients of x are added in the norm's pass. Paths as in `rms_norm`."""
    if path is None:
        path = "triton" if _fits(x, weight) else "reference"
    if path == "triton" and _learns(x, weight):
        from abyssal.kernels.norm import NormBeside

        return NormBeside.apply(x, weight, eps)
    return x, rms_norm(x, weight, eps, path)


def _learns(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _fits(x: Tensor, weight: Tensor, *more: Tensor) -> bool:
    if torch.compiler.is_compiling() and not _learns(x, weight, *more):
        return False
    narrow = x.dtype in (torch.bfloat16, torch.float16, torch.float32) and x.shape[-1] <= 16384
    return narrow and capability(x)[0] > 0
