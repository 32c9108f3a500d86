"""FP8 weights in blocks: e4m3 values, one float32 scale a 128x128 block (DeepSeek-V3, section 3.3)."""

import torch
from torch import Tensor

BLOCK = 128
FP8_MAX = 448.0


def _spread(scale: Tensor, rows: int, cols: int) -> Tensor:
    """[..., rows/128, cols/128] -> [..., rows, cols]: each scale over its block, ragged edges cut."""
    wide = scale.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
    return wide[..., :rows, :cols]


def scale_shape(rows: int, cols: int) -> tuple[int, int]:
    """How many blocks cover a `[rows, cols]` weight, the last of each side perhaps ragged."""
    return -(-rows // BLOCK), -(-cols // BLOCK)


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`[..., rows, cols]` e4m3 and `[..., rows/128, cols/128]` float32 -> `[..., rows, cols]` of `dtype`.

    Multiplied in float32, then rounded once. Raises ValueError if the scale does not cover the weight.
    """
    rows, cols = weight.shape[-2:]
    if tuple(scale.shape[-2:]) != scale_shape(rows, cols):
        raise ValueError(
            f"scale {list(scale.shape)}: expected {list(scale_shape(rows, cols))} blocks of {BLOCK}x{BLOCK} "
            f"for a weight {list(weight.shape)}"
        )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (weight.to(wide) * _spread(scale.to(wide), rows, cols)).to(dtype)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`[..., rows, cols]` -> e4m3 values of the same shape and float32 scales, each block's largest at 448."""
    rows, cols = weight.shape[-2:]
    down, across = scale_shape(rows, cols)
    padded = torch.nn.functional.pad(weight.float(), (0, across * BLOCK - cols, 0, down * BLOCK - rows))
    blocks = padded.unflatten(-1, (across, BLOCK)).unflatten(-3, (down, BLOCK))
    scale = blocks.abs().amax((-3, -1)).clamp(min=1e-12) / FP8_MAX
    return (weight.float() / _spread(scale, rows, cols)).to(torch.float8_e4m3fn), scale
