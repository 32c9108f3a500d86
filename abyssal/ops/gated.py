"""silu(a) · b: what a gated MLP does between its products (Shazeer 2020)."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from abyssal.ops.device import capability


def gated(a: Tensor, b: Tensor, path: str | None = None) -> Tensor:
    """silu(a) · b, `[..., F]`, in a's dtype; silu(a) is rounded before it is multiplied.

    Paths: "reference" (differentiable), "triton" (one pass over memory, on a GPU where no gradient is asked for; a
    and b may be slices of one product). None chooses. Raises ValueError for another path.
    """
    if path is None:
        path = "triton" if _fits(a, b) else "reference"
    if path == "triton":
        from abyssal.kernels.gated import gated as kernel

        return kernel(a, b)
    if path != "reference":
        raise ValueError(f"path: expected 'reference' or 'triton', got {path!r}")
    return silu(a) * b


def _fits(a: Tensor, b: Tensor) -> bool:
    asked = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    narrow = a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return not (asked or torch.compiler.is_compiling()) and narrow and capability(a) > (0, 0)
