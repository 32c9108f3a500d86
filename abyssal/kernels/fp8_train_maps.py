"""Maps in FP8, forward and backward, of what `fp8_train` rounds and multiplies.

A map keeps x turned, a byte a number, and its weight: rounding the weight again is cheaper than what keeping it in FP8
would hold on to, a sharded weight's whole. A gated MLP keeps its two inner products in bf16, and x and silu(a) · b
turned. Each map is one operator, forward, and one backward: a compiler, a walk over tensors without values and
recomputation by operation see it whole.
"""

from typing import Any

import torch
from torch import Tensor

from abyssal.kernels import fp8_train as kernels

FP8 = torch.float8_e4m3fn


def linear(x: Tensor, weight: Tensor, learns: bool) -> Tensor:
    """`x [T, in]` bf16, `weight [out, in]` -> `[T, out]`, differentiable; `learns`: whether the weight's gradient is
    wanted."""
    return _linear_operator(x, weight, learns)[0]


def gated_mlp(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, learns: bool) -> Tensor:
    """`x [T, D]` bf16, w1 and w3 `[F, D]`, w2 `[D, F]`, D and F multiples of 128 -> `[T, D]`, differentiable."""
    return _mlp_operator(x, w1, w2, w3, learns)[0]


def _linear_forward(x: Tensor, weight: Tensor, learns: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, and x turned with its scales."""
    x, weight = _lying(x), _lying(weight)
    q, scale, turned, turned_scale = kernels.round_rows(x, learns)
    y = kernels.product(q, scale, *kernels.round_weights([weight], False))
    return _cut(y, x.shape[0], weight.shape[0]), turned, turned_scale


def _linear_backward(
    dy: Tensor, weight: Tensor, turned: Tensor, turned_scale: Tensor, asked: bool, learns: bool
) -> tuple[Tensor, Tensor]:
    """dx and dw, empty where they are not wanted."""
    dy, weight = _lying(dy), _lying(weight)
    dx, dw = dy.new_empty(0), weight.new_empty(0)
    q, scale, dy_turned, dy_scale = kernels.round_rows(dy, learns)
    if asked:
        dx = kernels.product(q, scale, *kernels.round_weights([weight], True))
        dx = _cut(dx, dy.shape[0], weight.shape[1])
    if learns:
        dw = kernels.product_of_rows(dy_turned, dy_scale, turned, turned_scale, _gradient(weight))
        dw = _cut(dw, *weight.shape).to(weight.dtype)
    return dx, dw


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight, ctx.learns = inputs
    ctx.save_for_backward(weight, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _linear_gradients(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    asked = ctx.needs_input_grad[0]
    dx, dw = _linear_back(dy, *ctx.saved_tensors, asked, ctx.learns)
    return dx if asked else None, dw if ctx.learns else None, None


def _mlp_forward(
    x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, learns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, the inner products `[T, 2F]`, and x and silu(a) · b turned with their scales."""
    x, w1, w2, w3 = (_lying(t) for t in (x, w1, w2, w3))
    q, scale, x_turned, x_scale = kernels.round_rows(x, learns)
    inner = kernels.product(q, scale, *kernels.round_weights([w1, w3], False))[: x.shape[0]]
    del q, scale
    q, scale, h_turned, h_scale = kernels.round_gated(inner, learns)
    y = kernels.product(q, scale, *kernels.round_weights([w2], False))
    return _cut(y, *x.shape), inner, x_turned, x_scale, h_turned, h_scale


def _mlp_backward(
    dy: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, inner: Tensor, x_turned: Tensor, x_scale: Tensor,
    h_turned: Tensor, h_scale: Tensor, asked: bool, learns: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dw1 above dw3 and dw2, empty where they are not wanted."""
    dy, w1, w2, w3 = (_lying(t) for t in (dy, w1, w2, w3))
    dx, dw13, dw2 = dy.new_empty(0), w1.new_empty(0), w2.new_empty(0)
    q, scale, turned, turned_scale = kernels.round_rows(dy, learns)
    if learns:
        dw2 = kernels.product_of_rows(turned, turned_scale, h_turned, h_scale, _gradient(w2)).to(w2.dtype)
    dh = kernels.product(q, scale, *kernels.round_weights([w2], True))[: dy.shape[0]]
    del q, scale, turned, turned_scale
    q, scale, turned, turned_scale = kernels.round_gated_gradient(inner, dh, learns)
    del dh
    if asked:
        dx = _cut(kernels.product(q, scale, *kernels.round_weights([w1, w3], True)), *dy.shape)
    if learns:
        dw13 = kernels.product_of_rows(turned, turned_scale, x_turned, x_scale, _gradient(w1)).to(w1.dtype)
    return dx, dw13, dw2


def _keep_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, w1, w2, w3, ctx.learns = inputs
    ctx.save_for_backward(w1, w2, w3, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _mlp_gradients(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    asked = ctx.needs_input_grad[0]
    dx, dw13, dw2 = _mlp_back(dy, *ctx.saved_tensors, asked, ctx.learns)
    if not ctx.learns:
        return dx if asked else None, None, None, None, None
    dw1, dw3 = dw13.chunk(2)
    return dx if asked else None, dw1, dw2, dw3, None


def _lying(x: Tensor) -> Tensor:
    """x, its rows contiguous."""
    return x if x.stride(-1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _cut(y: Tensor, rows: int, columns: int) -> Tensor:
    """y without what pads it to whole blocks."""
    return y[:rows, :columns].contiguous()


def _gradient(weight: Tensor) -> torch.dtype:
    """What the product for a weight's gradient is rounded to, once."""
    return torch.float32 if weight.dtype == torch.float32 else torch.bfloat16


_linear_operator = torch.library.custom_op("abyssal::fp8_train_linear", _linear_forward, mutates_args=())
_linear_back = torch.library.custom_op("abyssal::fp8_train_linear_backward", _linear_backward, mutates_args=())
_linear_operator.register_autograd(_linear_gradients, setup_context=_keep_linear)
_mlp_operator = torch.library.custom_op("abyssal::fp8_train_linear_mlp", _mlp_forward, mutates_args=())
_mlp_back = torch.library.custom_op("abyssal::fp8_train_linear_mlp_backward", _mlp_backward, mutates_args=())
_mlp_operator.register_autograd(_mlp_gradients, setup_context=_keep_mlp)


def _turned_room(x: Tensor, width: int, learns: bool) -> tuple[Tensor, Tensor]:
    """Of `[T, width]`, turned, in whole blocks, and its scales."""
    rows, columns = -(-x.shape[0] // 128) if learns else 0, -(-width // 128) * 128 if learns else 0
    return x.new_empty(columns, rows * 128, dtype=FP8), x.new_empty(rows, columns, dtype=torch.float32)


@_linear_operator.register_fake
def _(x: Tensor, weight: Tensor, learns: bool) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape[0], weight.shape[0], dtype=torch.bfloat16)
    return y, *_turned_room(x, weight.shape[1], learns)


@_linear_back.register_fake
def _(
    dy: Tensor, weight: Tensor, turned: Tensor, turned_scale: Tensor, asked: bool, learns: bool
) -> tuple[Tensor, Tensor]:
    dx = dy.new_empty(dy.shape[0], weight.shape[1], dtype=torch.bfloat16) if asked else dy.new_empty(0)
    return dx, weight.new_empty(weight.shape) if learns else weight.new_empty(0)


@_mlp_operator.register_fake
def _(
    x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, learns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inner = x.new_empty(x.shape[0], 2 * w1.shape[0], dtype=torch.bfloat16)
    y = x.new_empty(x.shape[0], w2.shape[0], dtype=torch.bfloat16)
    return y, inner, *_turned_room(x, w1.shape[1], learns), *_turned_room(x, w1.shape[0], learns)


@_mlp_back.register_fake
def _(
    dy: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, inner: Tensor, x_turned: Tensor, x_scale: Tensor,
    h_turned: Tensor, h_scale: Tensor, asked: bool, learns: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx = dy.new_empty(dy.shape, dtype=torch.bfloat16) if asked else dy.new_empty(0)
    if not learns:
        return dx, w1.new_empty(0), w2.new_empty(0)
    return dx, w1.new_empty(2 * w1.shape[0], w1.shape[1]), w2.new_empty(w2.shape)
