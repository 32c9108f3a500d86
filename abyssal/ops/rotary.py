"""The rotation of RoPE, on interleaved pairs as DeepSeek's checkpoints have them."""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (x[2i], x[2i+1]) by its angle. `x [T, ..., R]`, `cos`, `sin` `[T, R/2]` -> like x.

    Computed in float32 or wider, rounded once.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    shape = (x.shape[0],) + (1,) * (x.ndim - 2) + (cos.shape[-1],)
    cos, sin = cos.to(wide).view(shape), sin.to(wide).view(shape)
    even, odd = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)
