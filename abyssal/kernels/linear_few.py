"""y = x Wᵀ for a few rows of x, where reading W is all that takes time (Triton).

A program asks for its whole share of W at once, into registers, and only then waits for the kernel before it: W is on
its way while that one ends (a programmatic dependent, see experts_decode.py), and so must not be what that one writes.
Sums are in float32, in an order that no other row of x has a part in.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from abyssal.kernels.gate import dependent

SMS = 132  # of an H100
SHARE = 4096  # numbers of W a warp, 64 registers of each thread
WIDEST = 4096  # columns


@triton.jit
def _linear(
    x, weight, out, N, stride_x,
    T: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, KP)
    w = tl.load(weight + n.to(tl.int64)[:, None] * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for t in tl.static_range(T):
        row = tl.load(x + t * stride_x + k, mask=k < K, other=0.0).to(tl.float32)
        y = tl.sum(w.to(tl.float32) * row[None, :], 1)
        tl.store(out + t * N + n, y.to(out.dtype.element_ty), mask=n < N)


def linear(x: Tensor, weight: Tensor, cut: tuple[int, int] | None = None) -> Tensor:
    """`x [T, in]`, `weight [out, in]` contiguous, in at most WIDEST -> `[T, out]`. For T of at most 8.
    `cut`: rows of W a program, and warps."""
    (T, K), N = x.shape, weight.shape[0]
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(T, N, dtype=x.dtype, device=x.device)
    KP = max(triton.next_power_of_2(K), 256)
    rows, warps = cut or ((16, 8) if N <= 16 * SMS else (8, 4))
    rows = max(min(rows, warps * SHARE // KP), 1)
    pdl = dependent(x)
    _linear[(triton.cdiv(N, rows),)](
        x, weight, out, N, x.stride(0), T=T, K=K, KP=KP, BN=rows, PDL=pdl, num_warps=warps, launch_pdl=pdl
    )
    return out
