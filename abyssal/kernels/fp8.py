"""Products with block-scaled e4m3 weights (DeepSeek-V3, section 3.3): one float32 scale a 128x128 block.

Few rows of x: the product waits for the weight to arrive, so the weight is read once as it is, widened in registers
and multiplied with x as it is; only the weight's own rounding is in the result. Many rows: x is rounded to e4m3 too,
with a scale a row and 128 columns, and every 128 columns' product is scaled and added in float32 on the ordinary
cores, since the tensor cores' own sums of FP8 products keep about 14 bits (section 3.3.2).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = tl.constexpr(128)  # columns and rows that share a scale
FP8_MAX = tl.constexpr(448.0)


@triton.jit
def widen(weight, DTYPE: tl.constexpr):
    """e4m3 to `DTYPE`, exact. Devices without FP8 see bytes: moved into a half's bits they are 2^-8 of the value."""
    if weight.dtype == tl.uint8:
        bits = weight.to(tl.uint16)
        half = (((bits & 0x7F) << 7) | ((bits & 0x80) << 8)).to(tl.float16, bitcast=True)
        return (half.to(tl.float32) * 256.0).to(DTYPE)
    # By way of a half and a float: a half goes to bf16 directly at an eighth of the speed.
    return weight.to(tl.float16).to(tl.float32).to(DTYPE)


@triton.jit
def store_quantized(values, q, scales, t, block, tokens, q_stride, scales_stride):
    """A block of 128 columns of rows t, float32: e4m3 and a scale a row, the largest at 448."""
    here, k = t < tokens, block * BLOCK + tl.arange(0, BLOCK)
    scale = tl.maximum(tl.max(tl.abs(values), 1), 1e-12) / FP8_MAX
    at = q + t.to(tl.int64)[:, None] * q_stride + k[None, :]
    tl.store(at, (values / scale[:, None]).to(q.dtype.element_ty), mask=here[:, None])
    tl.store(scales + block * scales_stride + t, scale, mask=here)


@triton.jit(do_not_specialize=["tokens", "scales_stride"])
def _quantize_rows(x, order, q, scales, tokens, width, chosen, x_stride, q_stride, scales_stride, TOKENS: tl.constexpr):
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    block = tl.program_id(1)
    k = block * BLOCK + tl.arange(0, BLOCK)
    if order is None:
        row = t.to(tl.int64)
    else:
        row = (tl.load(order + t, mask=t < tokens, other=0) // chosen).to(tl.int64)
    here = (t < tokens)[:, None] & (k < width)[None, :]
    values = tl.load(x + row[:, None] * x_stride + k[None, :], mask=here, other=0.0).to(tl.float32)
    store_quantized(values, q, scales, t, block, tokens, q_stride, scales_stride)


def quantized_rows(tokens: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for `tokens` rows in e4m3, padded to whole blocks of 128 columns, and their scales `[in/128, T]`."""
    blocks = triton.cdiv(width, BLOCK.value)
    q = torch.empty(tokens, blocks * BLOCK.value, dtype=torch.float8_e4m3fn, device=device)
    return q, torch.empty(blocks, tokens, dtype=torch.float32, device=device)


def quantize_rows(x: Tensor, order: Tensor | None = None, chosen: int = 1) -> tuple[Tensor, Tensor]:
    """`x [T, in]` -> e4m3 `[T, in]` padded with zeros to whole blocks of 128 columns, and float32 `[in/128, T]`:
    for each token and block the largest at 448. With `order [T·chosen]`, row i is that of token order[i] // chosen.

    There are up to 15 rows more than asked for, uninitialised: cuBLAS takes a multiple of 16.
    """
    tokens, width = x.shape[0] if order is None else len(order), x.shape[1]
    q, scales = quantized_rows(triton.cdiv(tokens, 16) * 16, width, x.device)
    rows = 32 if tokens > 64 else 4
    _quantize_rows[(triton.cdiv(tokens, rows), scales.shape[0])](
        x, order, q, scales, tokens, width, chosen, x.stride(0), q.stride(0), scales.stride(0), TOKENS=rows, num_warps=4
    )
    return q, scales


@triton.jit(do_not_specialize=["tokens", "per_split", "y_split"])
def _weight_only(
    x, weight, scale, y, tokens, rows, width, x_stride, per_split, y_split,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of yᵀ: ROWS of the weight, which is the left operand for its many rows, by TOKENS of x."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    t = tl.program_id(2).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    blocks = tl.cdiv(width, BLOCK)
    scale += tl.program_id(0) * ROWS // BLOCK * blocks
    k = tl.arange(0, BLOCK)
    w_at = weight + n.to(tl.int64)[:, None] * width + k[None, :]
    x_at = x + t[None, :] * x_stride + k[:, None]
    w_here, x_here = (n < rows)[:, None], (t < tokens)[None, :]
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    for b in tl.range(split * per_split, min((split + 1) * per_split, blocks), num_stages=STAGES):
        at = b * BLOCK
        if EVEN:
            w = tl.load(w_at + at, mask=w_here, eviction_policy="evict_first")
            xt = tl.load(x_at + at, mask=x_here, other=0.0)
        else:
            w = tl.load(w_at + at, mask=w_here & (at + k < width)[None, :], other=0.0)
            xt = tl.load(x_at + at, mask=x_here & (at + k < width)[:, None], other=0.0)
        sums += tl.dot(widen(w, xt.dtype), xt, input_precision=PRECISION) * tl.load(scale + b)
    out = y + split.to(tl.int64) * y_split + t[None, :] * rows + n[:, None]
    tl.store(out, sums.to(y.dtype.element_ty), mask=w_here & x_here)


@triton.jit(do_not_specialize=["size", "splits"])
def _sum_splits(parts, y, size, splits, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros([SIZE], tl.float32)
    for s in range(splits):
        total += tl.load(parts + s * size.to(tl.int64) + at, mask=at < size, other=0.0)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=at < size)


def weight_bytes(weight: Tensor) -> Tensor:
    """The weight as the device can read it: Triton has e4m3 from compute capability 8.9 on."""
    native = weight.is_cuda and torch.cuda.get_device_capability(weight.device) >= (8, 9)
    return weight if native else weight.view(torch.uint8)


def hopper(weight: Tensor) -> bool:
    """Whether the kernel written for Hopper serves: its copy engine takes rows of whole 16 bytes."""
    aligned = weight.shape[-1] % 16 == 0 and weight.data_ptr() % 16 == 0
    return aligned and weight.is_cuda and torch.cuda.get_device_capability(weight.device)[0] == 9


def library_serves(weight: Tensor) -> bool:
    """Whether cuBLAS has the product: on Hopper, from CUDA 12.9 on, of whole blocks, by fours along the columns."""
    rows, width = weight.shape
    whole = rows % BLOCK.value == 0 and rows > BLOCK.value and width % (4 * BLOCK.value) == 0
    cuda = tuple(int(part) for part in (torch.version.cuda or "0").split(".")[:2])
    return whole and cuda >= (12, 9) and hopper(weight)


def _few_rows_tuning(tokens: int, rows: int, blocks: int, wide: bool) -> tuple[int, ...]:
    """The weight's rows in a tile, parts of the sum, warps, stages; measured on an H100. Many small tiles of one warp
    keep most reads in flight; where the weight has few rows, or their tiles would fetch a large x too often, the sum
    is cut until there are 100 programs or more, in parts of 64 blocks at most."""
    if tokens <= 16 and rows >= 4096 and not wide:
        return 16, 1, 1, 6
    splits = max(triton.cdiv(blocks, 64), min(8, (100 if tokens <= 16 else 200) // triton.cdiv(rows, 64)))
    return 64, splits, 4, 3 if wide else 4


def few_rows(x: Tensor, weight: Tensor, scale: Tensor, tuning: tuple[int, ...] | None = None) -> Tensor:
    """`x [T, in]`, bf16, fp16 or float32, its rows contiguous -> `x · dequantised(weight)ᵀ [T, out]` in its dtype.

    The sum over `in` is cut in parts where the rows alone give too few programs; the parts are added in order, so the
    result is the same each time.
    """
    tokens, width = x.shape
    rows = weight.shape[0]
    blocks = triton.cdiv(width, BLOCK.value)
    wide = x.dtype == torch.float32
    across = max(16, min(64, triton.next_power_of_2(tokens)))
    if tuning is None:
        tuning = _few_rows_tuning(tokens, rows, blocks, wide)
    tile, splits, warps, stages = tuning
    splits = min(splits, blocks)
    per_split = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, per_split)
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    parts = y if splits == 1 else torch.empty(splits, tokens, rows, dtype=torch.float32, device=x.device)
    _weight_only[(triton.cdiv(rows, tile), splits, triton.cdiv(tokens, across))](
        x, weight_bytes(weight), scale, parts, tokens, rows, width, x.stride(0), per_split, tokens * rows,
        ROWS=tile, TOKENS=across, EVEN=width % BLOCK.value == 0, PRECISION="tf32x3" if wide else "tf32", STAGES=stages,
        num_warps=warps,
    )  # fmt: skip
    if splits > 1:
        _sum_splits[(triton.cdiv(y.numel(), 1024),)](parts, y, y.numel(), splits, SIZE=1024, num_warps=4)
    return y


@triton.jit(do_not_specialize=["tokens"])
def _many_rows(
    q, q_scale, weight, scale, y, tokens, rows, width, q_stride, q_scale_stride,
    TOKENS: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Programs that run together share rows and columns: GROUP tiles of tokens by all tiles of the weight.
    across, down = tl.cdiv(rows, BLOCK), tl.cdiv(tokens, TOKENS)
    pid = tl.program_id(0)
    first = pid // (GROUP * across) * GROUP
    high = min(down - first, GROUP)
    i, j = first + pid % (GROUP * across) % high, pid % (GROUP * across) // high
    t = i * TOKENS + tl.arange(0, TOKENS)
    n = j * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK)
    blocks = tl.cdiv(width, BLOCK)
    # Past the edge the first rows are read again, and not written.
    a_at = q + (t % tokens).to(tl.int64)[:, None] * q_stride + k[None, :]
    b_at = weight + (n % rows).to(tl.int64)[None, :] * width + k[:, None]
    sums = tl.zeros([TOKENS, BLOCK], tl.float32)
    for b in tl.range(blocks, num_stages=STAGES):
        left = tl.load(a_at + b * BLOCK)
        if EVEN:
            right = tl.load(b_at + b * BLOCK)
        else:
            right = tl.load(b_at + b * BLOCK, mask=(k + b * BLOCK < width)[:, None], other=0.0)
        factor = tl.load(q_scale + b * q_scale_stride + t, mask=t < tokens, other=0.0) * tl.load(scale + j * blocks + b)
        sums += tl.dot(left, right) * factor[:, None]
    out = y + t.to(tl.int64)[:, None] * rows + n[None, :]
    tl.store(out, sums.to(y.dtype.element_ty), mask=(t < tokens)[:, None] & (n < rows)[None, :])


def many_rows(
    q: Tensor, q_scale: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype, tuning: tuple[int, ...] | None = None
) -> Tensor:
    """Rows as `quantize_rows` made them, times the weight: `[T, out]` of `dtype`."""
    tokens, (rows, width) = q.shape[0], weight.shape
    tile, warps, stages = tuning or (128, 8, 4)
    y = torch.empty(tokens, rows, dtype=dtype, device=q.device)
    _many_rows[(triton.cdiv(tokens, tile) * triton.cdiv(rows, BLOCK.value),)](
        q, q_scale, weight, scale, y, tokens, rows, width, q.stride(0), q_scale.stride(0),
        TOKENS=tile, EVEN=width % BLOCK.value == 0, GROUP=8, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return y
