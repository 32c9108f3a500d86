"""RMS normalisation over the last dimension (Zhang & Sennrich 2019)."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight, `[..., D]`; the mean in float32 or wider, the result in x's dtype.

    The normalised value is rounded to x's dtype before it is multiplied, as DeepSeek's and transformers' code do.
    """
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normal.to(x.dtype) * weight.to(x.dtype)
