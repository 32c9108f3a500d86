"""silu(a) · b in one pass over memory (Triton), where a and b may be halves of one product. Forward only."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from abyssal.kernels.gate import dependent

BLOCK = 1024  # columns a program


@triton.jit
def _gated(a, b, out, F, stride_a, stride_b, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = a.dtype.element_ty
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    u = tl.load(a + row * stride_a + f, mask=f < F, other=0.0).to(tl.float32)
    v = tl.load(b + row * stride_b + f, mask=f < F, other=0.0).to(tl.float32)
    act = (u / (1 + tl.exp(-u))).to(dtype).to(tl.float32)
    tl.store(out + row * F + f, (act * v).to(dtype), mask=f < F)


def gated(a: Tensor, b: Tensor) -> Tensor:
    """As the operation, for a and b of one shape and dtype."""
    F = a.shape[-1]
    out = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    a, b = (t if t.stride(-1) == 1 else t.contiguous() for t in (a.reshape(-1, F), b.reshape(-1, F)))
    if out.numel():
        block = min(BLOCK, triton.next_power_of_2(F))
        pdl = dependent(a)
        _gated[(a.shape[0], triton.cdiv(F, block))](
            a, b, out, F, a.stride(0), b.stride(0), BLOCK=block, PDL=pdl, num_warps=4, launch_pdl=pdl
        )
    return out
