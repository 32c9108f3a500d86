"""Maps that are trained in FP8 (DeepSeek-V3, section 3.3): all three products of y = x Wᵀ in block-scaled e4m3.

    y = x Wᵀ,   dx = dy W,   dW = dyᵀ x

Along what a product sums over, every 128 numbers of an activation or a gradient share a scale; a weight has one a
block of 128x128, which turned is the same block. So x and dy are rounded twice, along their columns and along the
tokens, both times from the wide numbers. e4m3 throughout, as in the report. Scales are float32 and bring a block's
largest to 448: the report's powers of two keep a tile that is turned in FP8 from being rounded a second time, and
here none is. Sums are float32; weights, their gradients and the optimizer's state stay as wide as they were.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import silu

from abyssal.ops.device import capability
from abyssal.ops.fp8 import BLOCK, FP8_MAX, dequantize, quantize

TINY = 1e-30  # the least that a scale is made for


def fp8_train_linear(x: Tensor, weight: Tensor, path: str | None = None) -> Tensor:
    """`x [..., in]`, `weight [out, in]` -> x Wᵀ `[..., out]` in x's dtype, differentiable; any sizes.

    Paths: "reference" (rounded to FP8 and back, then multiplied in x's dtype; any device) and "fp8" (bf16 x on Hopper,
    CUDA 12.9 or later). None chooses "fp8" where it can be. Relative error of a product of normal numbers: 0.037.
    """
    if x.ndim != 2:
        return fp8_train_linear(x.reshape(-1, x.shape[-1]), weight, path).view(*x.shape[:-1], weight.shape[0])
    if _path(x, path) == "reference":
        return cast(Tensor, _Reference.apply(x, weight))
    from abyssal.kernels.fp8_train_maps import linear

    return linear(x, weight, _learns(weight))


def fp8_train_mlp(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, path: str | None = None) -> Tensor:
    """`x [..., D]`, w1 and w3 `[F, D]`, w2 `[D, F]` -> w2(silu(w1 x) · w3 x) `[..., D]`, the three maps in FP8.

    Paths as in `fp8_train_linear`. In "fp8", with D and F multiples of 128, w1 and w3 are one product and share x as it
    was rounded; silu(a) · b, and the gradients of a and b, are in memory only as they were rounded.
    """
    if x.ndim != 2:
        return fp8_train_mlp(x.reshape(-1, x.shape[-1]), w1, w2, w3, path).view(x.shape)
    path = _path(x, path)
    if path == "fp8" and not any(size % BLOCK for size in w1.shape):
        from abyssal.kernels.fp8_train_maps import gated_mlp

        return gated_mlp(x, w1, w2, w3, _learns(w1, w2, w3))
    a, b = (fp8_train_linear(x, w, path) for w in (w1, w3))
    return fp8_train_linear(silu(a) * b, w2, path)


def serves(x: Tensor) -> bool:
    """Whether "fp8" is there for x: what torch's scaled product asks for block scales."""
    if capability(x)[0] != 9 or x.dtype != torch.bfloat16 or not x.numel():
        return False
    version = torch.version.cuda or "12.9"  # None: a device that is only assumed
    return tuple(int(part) for part in version.split(".")[:2]) >= (12, 9)


def round_rows(x: Tensor) -> Tensor:
    """`x [..., K]` rounded to e4m3 and back, a scale for every 128 columns: what "reference" multiplies."""
    wide = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=TINY) / FP8_MAX
    rounded = (wide / scale).to(torch.float8_e4m3fn)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (rounded.to(dtype) * scale.to(dtype)).flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def round_blocks(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight [out, in]` rounded to e4m3 and back, a scale a block of 128x128."""
    return dequantize(*quantize(weight), dtype)


def _path(x: Tensor, path: str | None) -> str:
    path = path or ("fp8" if serves(x) else "reference")
    if path not in ("reference", "fp8"):
        raise ValueError(f"path: expected 'reference' or 'fp8', got {path!r}")
    if path == "fp8" and x.dtype != torch.bfloat16:
        raise ValueError(f"path 'fp8': expected x in bfloat16, got {x.dtype}")
    return path if x.numel() else "reference"


def _learns(*weights: Tensor) -> bool:
    return torch.is_grad_enabled() and any(w.requires_grad for w in weights)


class _Reference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return round_rows(x) @ round_blocks(weight, x.dtype).T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        dx = round_rows(dy) @ round_blocks(weight, dy.dtype)
        dw = round_rows(dy.T) @ round_rows(x.T).T
        return dx, dw.to(weight.dtype)
