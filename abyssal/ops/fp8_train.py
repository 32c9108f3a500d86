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
    by: Any = _Reference if _path(x, path) == "reference" else _Linear
    return cast(Tensor, by.apply(x, weight, _learns(weight)))


def fp8_train_mlp(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, path: str | None = None) -> Tensor:
    """`x [..., D]`, w1 and w3 `[F, D]`, w2 `[D, F]` -> w2(silu(w1 x) · w3 x) `[..., D]`, the three maps in FP8.

    Paths as in `fp8_train_linear`. In "fp8", with D and F multiples of 128, w1 and w3 are one product and share x as it
    was rounded; what lies between the products, and its gradient, is in memory only as it was rounded.
    """
    if x.ndim != 2:
        return fp8_train_mlp(x.reshape(-1, x.shape[-1]), w1, w2, w3, path).view(x.shape)
    path = _path(x, path)
    if path == "fp8" and not any(size % BLOCK for size in w1.shape):
        return cast(Tensor, _MLP.apply(x, w1, w2, w3, _learns(w1, w2, w3)))
    a, b = (fp8_train_linear(x, w, path) for w in (w1, w3))
    return fp8_train_linear(silu(a) * b, w2, path)


def serves(x: Tensor) -> bool:
    """Whether "fp8" is there for x: what torch's scaled product asks for block scales."""
    if capability(x)[0] != 9 or x.dtype != torch.bfloat16 or not x.numel():
        return False
    return tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2]) >= (12, 9)


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
    def forward(ctx: Any, x: Tensor, weight: Tensor, learns: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        return round_rows(x) @ round_blocks(weight, x.dtype).T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        dx = round_rows(dy) @ round_blocks(weight, dy.dtype)
        dw = round_rows(dy.T) @ round_rows(x.T).T
        return dx, dw.to(weight.dtype), None


class _Linear(torch.autograd.Function):
    """Keeps x turned, a byte a number, and the weight: rounding it again is cheaper than what it would keep alive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, learns: bool) -> Tensor:
        from abyssal.kernels import fp8_train as kernels

        x = _lying(x)
        q, scale, turned, turned_scale = kernels.round_rows(x, learns)
        ctx.save_for_backward(weight, turned, turned_scale)
        ctx.learns = learns
        return _cut(kernels.product(q, scale, *kernels.round_weights([_lying(weight)], False)), x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        from abyssal.kernels import fp8_train as kernels

        weight, turned, turned_scale = ctx.saved_tensors
        dy, dx, dw = _lying(dy), None, None
        q, scale, dy_turned, dy_scale = kernels.round_rows(dy, ctx.learns)
        if _asked(ctx):
            dx = kernels.product(q, scale, *kernels.round_weights([_lying(weight)], True))
            dx = dx[: dy.shape[0], : weight.shape[1]]
        if ctx.learns:
            dw = kernels.product_of_rows(dy_turned, dy_scale, turned, turned_scale, _gradient(weight))
            dw = dw[: weight.shape[0], : weight.shape[1]].to(weight.dtype)
        return dx, dw, None


class _MLP(torch.autograd.Function):
    """Keeps a and b as bf16, x and silu(a) · b turned in FP8, and the weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, learns: bool) -> Tensor:
        from abyssal.kernels import fp8_train as kernels

        x, w1, w2, w3 = (_lying(t) for t in (x, w1, w2, w3))
        q, scale, x_turned, x_scale = kernels.round_rows(x, learns)
        inner = kernels.product(q, scale, *kernels.round_weights([w1, w3], False))
        del q, scale
        inner = inner[: x.shape[0]]
        q, scale, h_turned, h_scale = kernels.round_gated(inner, learns)
        ctx.save_for_backward(w1, w2, w3, inner, x_turned, x_scale, h_turned, h_scale)
        ctx.learns = learns
        return _cut(kernels.product(q, scale, *kernels.round_weights([w2], False)), x, w2)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from abyssal.kernels import fp8_train as kernels

        w1, w2, w3, inner, x_turned, x_scale, h_turned, h_scale = ctx.saved_tensors
        learns, tokens, inner_width = ctx.learns, dy.shape[0], w1.shape[0]
        dx = dw1 = dw2 = dw3 = None
        q, scale, turned, turned_scale = kernels.round_rows(_lying(dy), learns)
        if learns:
            dw2 = kernels.product_of_rows(turned, turned_scale, h_turned, h_scale, _gradient(w2)).to(w2.dtype)
        dh = kernels.product(q, scale, *kernels.round_weights([w2], True))[:tokens]
        del q, scale, turned, turned_scale
        q, scale, turned, turned_scale = kernels.round_gated_gradient(inner, dh, learns)
        del dh
        if _asked(ctx):
            dx = kernels.product(q, scale, *kernels.round_weights([w1, w3], True))[:tokens]
        if learns:
            both = kernels.product_of_rows(turned, turned_scale, x_turned, x_scale, _gradient(w1)).to(w1.dtype)
            dw1, dw3 = both.split(inner_width)
        return dx, dw1, dw2, dw3, None


def _lying(x: Tensor) -> Tensor:
    """x, its rows contiguous."""
    return x if x.stride(-1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _asked(ctx: Any) -> bool:
    """Whether x's gradient is wanted. A compiler may not know it of what lies between two maps, and says no."""
    return bool(ctx.needs_input_grad[0]) or torch.compiler.is_compiling()


def _cut(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return y[: x.shape[0], : weight.shape[0]].contiguous()


def _gradient(weight: Tensor) -> torch.dtype:
    """What the product for a weight's gradient is rounded to, once."""
    return torch.float32 if weight.dtype == torch.float32 else torch.bfloat16
