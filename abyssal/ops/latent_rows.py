"""Cached rows in FP8: e4m3 latents with a float32 scale a 128 of them, and the rotary key as it is, in bf16.

A token's row is C bytes, 4 · C/128 bytes and 2 · R bytes: 656 for DeepSeek-V3's 512 + 64 where bf16 takes 1152. The
rotary key stays in bf16: positions differ in its small digits. Scales are powers of two, so that a latent read back
is a bf16 number exactly, and a kernel that works in bf16 adds no error to the quantisation's own.
"""

import torch
from torch import Tensor

GROUP = 128  # latents a scale
FP8_MAX = 448.0
SMALLEST, LARGEST = 2.0**-100, 2.0**7  # of a scale: latents past 57344 saturate


def row_bytes(C: int, R: int) -> int:
    """Bytes of a packed row. Raises ValueError unless C is a multiple of 128 and R is even."""
    if C % GROUP or C == 0 or R % 2:
        raise ValueError(f"packed rows: expected latents in groups of {GROUP} and an even rotary width, got {C}, {R}")
    return C + 4 * (C // GROUP) + 2 * R


def pack_rows(latent: Tensor, k_rope: Tensor | None = None) -> Tensor:
    """`[T, C]` and `[T, R]` -> `[T, row_bytes(C, R)]` uint8. Each scale is the power of two at which its group's
    largest latent is between 224 and 448; rounded to the nearest e4m3."""
    T, C = latent.shape
    k_rope = latent[:, :0] if k_rope is None else k_rope
    out = torch.empty(T, row_bytes(C, k_rope.shape[1]), dtype=torch.uint8, device=latent.device)
    groups = latent.float().unflatten(1, (-1, GROUP))
    scale = power_of_two(groups.abs().amax(-1))
    scaled = (groups / scale[..., None]).clamp(-FP8_MAX, FP8_MAX)
    out[:, :C] = scaled.flatten(1).to(torch.float8_e4m3fn).view(torch.uint8)
    at = C + 4 * scale.shape[1]
    out[:, C:at] = scale.view(torch.uint8)
    out[:, at:] = k_rope.to(torch.bfloat16).contiguous().view(torch.uint8)
    return out


def unpack_rows(rows: Tensor, C: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`[n, row bytes]` uint8 -> `[n, C + R]` of `dtype`: multiplied in float32, then rounded once."""
    at = C + 4 * (C // GROUP)
    if row_bytes(C, (rows.shape[1] - at) // 2) != rows.shape[1]:
        raise ValueError(f"packed rows of {rows.shape[1]} bytes: too short for {C} latents, or no whole rotary key")
    values = rows[:, :C].contiguous().view(torch.float8_e4m3fn).float()
    scale = rows[:, C:at].contiguous().view(torch.float32)
    latent = values.unflatten(1, (-1, GROUP)) * scale[..., None]
    k_rope = rows[:, at:].contiguous().view(torch.bfloat16)
    return torch.cat((latent.flatten(1).to(dtype), k_rope.to(dtype)), 1)


def power_of_two(largest: Tensor) -> Tensor:
    """The smallest power of two that brings `largest` (float32, not negative) to 448 or less, within the limits;
    NaN where `largest` is.

    By frexp: largest / 448 = m · 2^e with m in [0.5, 1), so 2^e, or 2^(e-1) where m is 0.5 exactly.
    """
    m, e = torch.frexp((largest / FP8_MAX).clamp(SMALLEST, LARGEST))
    scale = torch.ldexp(torch.ones_like(largest), e - (m == 0.5).to(e.dtype))
    return torch.where(largest.isnan(), largest, scale)
