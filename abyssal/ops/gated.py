"""silu(a) · b: what a gated MLP does between its products (Shazeer 2020)."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from abyssal.ops.device import capability


def gated(a: Tensor, b: Tensor, path: str | None = None) -> Tensor:
    """silu(a) · b, `[..., F]`, in a's dtype; silu(a) is rounded before it is multiplied.

    Paths: "reference", "triton" (on a GPU, one pass over memory forward and one backward; a and b may be slices of one
    product). None chooses. Raises ValueError for another path.
    """
    if path is None:
        path = "triton" if _fits(a, b) else "reference"
    if path == "triton":
        from abyssal.kernels import gated as kernels

        return kernels.trained_gated(a, b) if _learns(a, b) else kernels.gated(a, b)
    if path != "reference":
        raise ValueError(f"path: expected 'reference' or 'triton', got {path!r}")
    return silu(a) * b


def gated_halves(ab: Tensor, path: str | None = None) -> Tensor:
    """`gated` of the two halves of one product, `[..., 2 F]` -> `[..., F]`. On "triton" the gradient arrives whole."""
    a, b = ab.chunk(2, -1)
    if path is None:
        path = "triton" if _fits(a, b) else "reference"
    if path == "triton" and _learns(ab):
        from abyssal.kernels.gated import trained_gated_halves

        return trained_gated_halves(ab)
    return gated(a, b, path)


def _learns(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _fits(a: Tensor, b: Tensor) -> bool:
    if torch.compiler.is_compiling() and not _learns(a, b):
        return False
    narrow = a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return narrow and capability(a)[0] > 0
