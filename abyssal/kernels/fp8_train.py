"""FP8 for training on Hopper: rounding in both layouts in one pass over memory (Triton); the products are cuBLAS's.

A product sums over the columns of both its operands, with a scale a row and 128 columns (activations and gradients)
or 128x128 (weights). Three products make a map (DeepSeek-V3, section 3.3): y = x Wᵀ, dx = dy W and dW = dyᵀ x. So x
and dy are needed twice: as they lie, rounded along their columns, and turned, rounded along 128 tokens. A program
reads a tile of 128x128 once and writes both, each rounded from the wide numbers: nothing is rounded twice.

Everything is padded with zeros to whole blocks of 128. Scales of rows are stored a block at a time, `[blocks, rows]`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

BLOCK = tl.constexpr(128)
FP8_MAX = tl.constexpr(448.0)
# The least that a scale is made for, at 448. Gradients are small: far below the 1e-12 of weights in inference.
TINY = tl.constexpr(1e-30)


@triton.jit
def _store_both(
    values, i, j, q, scale, turned, turned_scale, q_stride, scale_stride, turned_stride, turned_scale_stride,
    TURNED: tl.constexpr,
):  # fmt: skip
    """Tile i, j, `[128, 128]` float32, rounded along its columns and, turned, along its rows."""
    t, k = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    own = tl.maximum(tl.max(tl.abs(values), 1), TINY) / FP8_MAX
    at = q + t.to(tl.int64)[:, None] * q_stride + k[None, :]
    tl.store(at, (values * (1.0 / own)[:, None]).to(q.dtype.element_ty))
    tl.store(scale + j * scale_stride + t, own)
    if TURNED:
        own = tl.maximum(tl.max(tl.abs(values), 0), TINY) / FP8_MAX
        at = turned + k.to(tl.int64)[None, :] * turned_stride + t[:, None]
        tl.store(at, (values * (1.0 / own)[None, :]).to(turned.dtype.element_ty))
        tl.store(turned_scale + i * turned_scale_stride + k, own)


@triton.jit
def _tile(x, i, j, tokens, width, stride):
    t, k = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    here = (t < tokens)[:, None] & (k < width)[None, :]
    return tl.load(x + t.to(tl.int64)[:, None] * stride + k[None, :], mask=here, other=0.0).to(tl.float32)


@triton.jit
def _round_rows(
    x, q, scale, turned, turned_scale, tokens, width, x_stride, q_stride, scale_stride, turned_stride,
    turned_scale_stride, TURNED: tl.constexpr,
):  # fmt: skip
    i, j = tl.program_id(1), tl.program_id(0)
    _store_both(
        _tile(x, i, j, tokens, width, x_stride), i, j, q, scale, turned, turned_scale, q_stride, scale_stride,
        turned_stride, turned_scale_stride, TURNED,
    )  # fmt: skip


@triton.jit
def _round_gated(
    inner, q, scale, turned, turned_scale, tokens, width, x_stride, q_stride, scale_stride, turned_stride,
    turned_scale_stride, TURNED: tl.constexpr,
):  # fmt: skip
    """silu(a) · b, of the halves `inner` = [a, b]: never in memory but as it is rounded here."""
    i, j = tl.program_id(1), tl.program_id(0)
    a = _tile(inner, i, j, tokens, width, x_stride)
    b = _tile(inner + width, i, j, tokens, width, x_stride)
    _store_both(
        a / (1.0 + tl.exp(-a)) * b, i, j, q, scale, turned, turned_scale, q_stride, scale_stride, turned_stride,
        turned_scale_stride, TURNED,
    )  # fmt: skip


@triton.jit
def _round_gated_gradient(
    inner, dh, q, scale, turned, turned_scale, tokens, width, x_stride, dh_stride, q_stride, scale_stride,
    turned_stride, turned_scale_stride, TURNED: tl.constexpr,
):  # fmt: skip
    """The gradients of the halves, [dh · b · silu'(a), dh · silu(a)]: two programs that run side by side share what
    they read through L2, and each keeps a tile less in registers than one for both would."""
    i, j, half = tl.program_id(1), tl.program_id(0) // 2, tl.program_id(0) % 2
    a = _tile(inner, i, j, tokens, width, x_stride)
    s = 1.0 / (1.0 + tl.exp(-a))
    if half == 0:
        values = _tile(inner + width, i, j, tokens, width, x_stride) * (s * (1.0 + a * (1.0 - s)))
    else:
        values = a * s
    _store_both(
        values * _tile(dh, i, j, tokens, width, dh_stride), i, half * (width // BLOCK) + j, q, scale, turned,
        turned_scale, q_stride, scale_stride, turned_stride, turned_scale_stride, TURNED,
    )  # fmt: skip


@triton.jit
def _round_blocks(weight, q, scale, rows, width, stride, q_stride, scale_stride, TURNED: tl.constexpr):
    i, j = tl.program_id(1), tl.program_id(0)
    values = _tile(weight, i, j, rows, width, stride)
    own = tl.maximum(tl.max(tl.max(tl.abs(values), 1), 0), TINY) / FP8_MAX
    n, k = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    rounded = (values * (1.0 / own)).to(q.dtype.element_ty)
    if TURNED:
        tl.store(q + k.to(tl.int64)[None, :] * q_stride + n[:, None], rounded)
        tl.store(scale + j * scale_stride + i, own)
    else:
        tl.store(q + n.to(tl.int64)[:, None] * q_stride + k[None, :], rounded)
        tl.store(scale + i * scale_stride + j, own)


Rounded = tuple[Tensor, Tensor, Tensor, Tensor]  # numbers and scales, and the same turned


def _room(rows: int, columns: int, turned: bool, like: Tensor) -> Rounded:
    """For `[rows, columns]`, both in blocks: numbers and scales, and the same turned where they are wanted."""
    down, across = rows * 128, columns * 128
    q = like.new_empty(down, across, dtype=torch.float8_e4m3fn)
    scale = like.new_empty(columns, down, dtype=torch.float32)
    if not turned:
        return q, scale, like.new_empty(0, 0, dtype=torch.float8_e4m3fn), like.new_empty(0, 0, dtype=torch.float32)
    turned_q = like.new_empty(across, down, dtype=torch.float8_e4m3fn)
    return q, scale, turned_q, like.new_empty(rows, across, dtype=torch.float32)


def round_rows(x: Tensor, turned: bool) -> Rounded:
    """`x [T, K]`, rows contiguous -> e4m3 `[T', K']` and its scales `[K'/128, T']`; the same of xᵀ, `[K', T']` and
    `[T'/128, K']`, where `turned`. T' and K' are whole blocks; what is past the edge is 0."""
    q, scale, t, t_scale = _room(triton.cdiv(x.shape[0], 128), triton.cdiv(x.shape[1], 128), turned, x)
    _round_rows[(scale.shape[0], q.shape[0] // 128)](
        x, q, scale, t, t_scale, *x.shape, x.stride(0), q.stride(0), scale.stride(0), t.stride(0), t_scale.stride(0),
        TURNED=turned, num_warps=4,
    )  # fmt: skip
    return q, scale, t, t_scale


def round_gated(inner: Tensor, turned: bool) -> Rounded:
    """`round_rows` of silu(a) · b, where `inner [T, 2F]` is [a, b] and F a multiple of 128."""
    q, scale, t, t_scale = _room(triton.cdiv(inner.shape[0], 128), inner.shape[1] // 256, turned, inner)
    _round_gated[(scale.shape[0], q.shape[0] // 128)](
        inner, q, scale, t, t_scale, inner.shape[0], inner.shape[1] // 2, inner.stride(0), q.stride(0), scale.stride(0),
        t.stride(0), t_scale.stride(0), TURNED=turned, num_warps=4,
    )  # fmt: skip
    return q, scale, t, t_scale


def round_gated_gradient(inner: Tensor, dh: Tensor, turned: bool) -> Rounded:
    """`round_rows` of the gradient of `inner [T, 2F]`, where `dh [T, F]` is that of silu(a) · b."""
    q, scale, t, t_scale = _room(triton.cdiv(inner.shape[0], 128), inner.shape[1] // 128, turned, inner)
    _round_gated_gradient[(scale.shape[0], q.shape[0] // 128)](
        inner, dh, q, scale, t, t_scale, *dh.shape, inner.stride(0), dh.stride(0), q.stride(0), scale.stride(0),
        t.stride(0), t_scale.stride(0), TURNED=turned, num_warps=8, maxnreg=128,
    )  # fmt: skip
    return q, scale, t, t_scale


def round_weights(weights: Sequence[Tensor], turned: bool) -> tuple[Tensor, Tensor]:
    """Weights `[out, in]` of one width, one below the other -> e4m3 `[Σ out', in']` and a scale a block of 128x128,
    `[Σ out'/128, ≥ in'/128]`; or both turned. Rows are contiguous."""
    blocks = sum(triton.cdiv(w.shape[0], 128) for w in weights), triton.cdiv(weights[0].shape[1], 128)
    down, across = reversed(blocks) if turned else blocks
    q = weights[0].new_empty(down * 128, across * 128, dtype=torch.float8_e4m3fn)
    # cuBLAS reads a weight's scales by fours.
    scale = weights[0].new_zeros(down, triton.cdiv(across, 4) * 4, dtype=torch.float32)
    start = 0
    for w in weights:
        rows, columns = triton.cdiv(w.shape[0], 128), triton.cdiv(w.shape[1], 128)
        own = q[:, start * 128 :] if turned else q[start * 128 :]
        own_scale = scale[:, start:] if turned else scale[start:]
        _round_blocks[(columns, rows)](
            w, own, own_scale, *w.shape, w.stride(0), q.stride(0), scale.stride(0), TURNED=turned, num_warps=4
        )
        start += rows
    return q, scale


def product(q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """`[T', out']` bf16: rows as `round_rows` made them, times a weight as `round_weights` made it."""
    by_row, by_block = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
    return scaled_mm(q, weight.T, scale.T, by_row, weight_scale.T, by_block, output_dtype=torch.bfloat16)


def product_of_rows(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`[M, N]` of `dtype`, bf16 or float32: a bᵀ, both as `round_rows` made them."""
    by_row = ScalingType.BlockWise1x128
    return scaled_mm(a, b.T, a_scale.T, by_row, b_scale.T, by_row, output_dtype=dtype)
