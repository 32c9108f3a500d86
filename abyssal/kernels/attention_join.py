"""What a kernel of one query and one key needs around it: the halves joined, and the shared key's gradient summed.

Sequences of one length go to cuDNN's dense backward, which reads `[T, H, N + R]`. Joining costs a read and a write at
the speed of the memory (`join` makes queries and keys in one launch, the rotary key copied to every head on the way),
and is done anew for the backward rather than kept. Queries that lie side by side already are not copied at all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from abyssal.kernels.rotary import rotate_into


@triton.jit
def join_kernel(
    q_nope, q_rope, k_nope, k_rope, q, k, q_nope_row, q_nope_head, q_rope_row, q_rope_head,
    k_nope_row, k_nope_head, k_rope_row, rows, heads,
    N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """ROWS rows (a token's head each) of k, and of q if QUERIES: what is behind the nope half is the rotary half."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    t = (row // heads)[:, None]
    h = (row % heads)[:, None]
    inside = (row < rows)[:, None]
    n = tl.arange(0, NP)[None, :]
    r = tl.arange(0, RP)[None, :]
    to = row[:, None] * (N + R)
    nope = inside & (n < N)
    rope = inside & (r < R)
    tl.store(k + to + n, tl.load(k_nope + t * k_nope_row + h * k_nope_head + n, mask=nope), mask=nope)
    tl.store(k + to + N + r, tl.load(k_rope + t * k_rope_row + r, mask=rope), mask=rope)
    if QUERIES:
        tl.store(q + to + n, tl.load(q_nope + t * q_nope_row + h * q_nope_head + n, mask=nope), mask=nope)
        tl.store(q + to + N + r, tl.load(q_rope + t * q_rope_row + h * q_rope_head + r, mask=rope), mask=rope)


@triton.jit
def sum_heads_kernel(x, out, x_row, x_head, tokens, heads, R: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr):
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    r = tl.arange(0, RP)
    mask = (t < tokens)[:, None] & (r < R)[None, :]
    at = x + t.to(tl.int64)[:, None] * x_row + r[None, :]
    total = tl.zeros([ROWS, RP], tl.float32)
    for h in range(heads):
        total += tl.load(at + h * x_head, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + t.to(tl.int64)[:, None] * R + r[None, :], total.to(out.dtype.element_ty), mask=mask)


def sum_heads(x: Tensor) -> Tensor:
    """`[T, H, R]` -> `[T, R]`, summed in float32, head by head."""
    T, H, R = x.shape
    out = x.new_empty(T, R)
    if not out.numel():
        return out
    ROWS = 8 if T < 32768 else 16
    with torch.cuda.device_of(x):
        sum_heads_kernel[(triton.cdiv(T, ROWS),)](
            x, out, x.stride(0), x.stride(1), T, H, R, triton.next_power_of_2(R), ROWS, num_warps=2
        )
    return out


def beside(a: Tensor, b: Tensor) -> Tensor | None:
    """The tensor of which `a [T, H, N]` and `b [T, H, R]` are the two parts of the last dimension, if there is one."""
    same = a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.stride() == b.stride()
    if same and a.stride(-1) == 1 and b.storage_offset() == a.storage_offset() + a.shape[-1]:
        return a.as_strided((*a.shape[:-1], a.shape[-1] + b.shape[-1]), a.stride())
    return None


def join(q_nope: Tensor, q_rope: Tensor | None, k_nope: Tensor, k_rope: Tensor | None) -> tuple[Tensor, Tensor]:
    """`q`, `k [T, H, N + R]` of the halves, a view where that is enough; the rotary key `[T, R]` goes to every head."""
    if q_rope is None or k_rope is None:
        return q_nope, k_nope
    (T, H, N), R = q_nope.shape, q_rope.shape[-1]
    whole = beside(q_nope, q_rope)
    q_nope, q_rope, k_nope, k_rope = (
        t if t.stride(-1) == 1 else t.contiguous() for t in (q_nope, q_rope, k_nope, k_rope)
    )
    k = k_nope.new_empty(T, H, N + R)
    q = q_nope.new_empty(T, H, N + R) if whole is None else whole
    ROWS = 16
    with torch.cuda.device_of(k):
        join_kernel[(triton.cdiv(T * H, ROWS),)](
            q_nope, q_rope, k_nope, k_rope, q, k, *q_nope.stride()[:2], *q_rope.stride()[:2], *k_nope.stride()[:2],
            k_rope.stride(0), T * H, H, N, triton.next_power_of_2(N), R, triton.next_power_of_2(R), ROWS, whole is None,
            num_warps=4,
        )  # fmt: skip
    return q, k


def dense(t: Tensor, sequences: int) -> Tensor:
    """`[T, H, W]` of equally long sequences as `[S, H, T / S, W]`, a view."""
    return t.unflatten(0, (sequences, -1)).transpose(1, 2)


def cudnn_takes(N: int, R: int, V: int, sequences: int, longest: int, tokens: int) -> bool:
    """Whether these are sequences of one length (the host sees S · longest = T) and widths at which it is faster."""
    alike = sequences * longest == tokens and longest >= 128
    return alike and (N + R, V) in {(64, 64), (128, 128), (256, 256)}


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, sequences: int, scale: float) -> tuple[Tensor, Tensor]:
    """`out [T, H, V]` and `lse [H, T]` of `sequences` equally long ones."""
    parts = (dense(t, sequences) for t in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*parts, None, True, 0.0, True, False, scale=scale)
    T, H, V = v.shape
    return out.transpose(1, 2).reshape(T, H, V), lse.view(sequences, H, -1).transpose(0, 1).reshape(H, T)


def cudnn_backward(
    d_out: Tensor, q_nope: Tensor, q_rope: Tensor | None, k_nope: Tensor, k_rope: Tensor | None, v: Tensor,
    out: Tensor, lse: Tensor, sequences: int, scale: float, angles: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients `attention_backward` gives, of `sequences` equally long ones, by cuDNN."""
    (T, H, N), L = q_nope.shape, q_nope.shape[0] // sequences
    q, k = join(q_nope, q_rope, k_nope, k_rope)
    parts = (dense(t, sequences) for t in (d_out, q, k, v, out))
    stats = lse.view(H, sequences, L).transpose(0, 1).contiguous()[..., None]  # cuDNN: natural logarithm, [S, H, L, 1]
    nothing = lse.new_empty(0, dtype=torch.int64)  # the seed and the place of a dropout there isn't
    dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *parts, stats, nothing, nothing, None, None, None, L, L, 0.0, True, scale=scale
    )
    dq, dk, dv = (t.transpose(1, 2).reshape(T, H, -1) for t in (dq, dk, dv))
    if angles is not None:
        rotate_into(dq[..., N:], *angles, dq[..., N:], back=True)
    return dq, torch.cat((dk[..., :N], dv), -1), sum_heads(dk[..., N:])
