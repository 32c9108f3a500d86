"""The rotation of RoPE, on interleaved pairs as DeepSeek's checkpoints have them."""

import torch
from torch import Tensor

from abyssal.ops.device import capability
from abyssal.ops.norm import rms_norm

NARROW = (torch.bfloat16, torch.float16, torch.float32)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, path: str | None = None) -> Tensor:
    """Rotates each pair (x[2i], x[2i+1]) by its angle. `x [T, ..., R]`, `cos`, `sin` `[T, R/2]` -> like x.

    Computed in float32 or wider, rounded once. Paths: "reference", "triton" (on a GPU, one pass over memory, and one
    backward; x may be a slice; left to the compiler under torch.compile without gradients). None chooses. Raises
    ValueError for another path.
    """
    if path is None:
        path = "triton" if _fits(x, x) else "reference"
    if path == "triton":
        from abyssal.kernels.rotary import rotate as kernel

        return kernel(x, cos, sin, False)
    if path != "reference":
        raise ValueError(f"path: expected 'reference' or 'triton', got {path!r}")
    wide = torch.promote_types(x.dtype, torch.float32)
    shape = (x.shape[0],) + (1,) * (x.ndim - 2) + (cos.shape[-1],)
    cos, sin = cos.to(wide).view(shape), sin.to(wide).view(shape)
    even, odd = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def norm_rotate(
    kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, path: str | None = None
) -> tuple[Tensor, Tensor]:
    """The latent `[T, C]`, normalised, and the rotary key `[T, R]`, rotated, of `kv [T, C + R]` as one product leaves
    them; `weight [C]`. Paths as in `rotate`; on "triton" the gradient of kv arrives whole."""
    C = weight.shape[0]
    if path is None:
        path = "triton" if _fits(kv, weight) and C <= 16384 else "reference"
    if path == "triton" and torch.is_grad_enabled():
        from abyssal.kernels.rotary import norm_rotate as kernel

        return kernel(kv, weight, eps, cos, sin)[:2]
    return rms_norm(kv[:, :C], weight, eps, path), rotate(kv[:, C:], cos, sin, path)


def _fits(x: Tensor, weight: Tensor) -> bool:
    learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return (learns or not torch.compiler.is_compiling()) and x.dtype in NARROW and capability(x)[0] > 0
