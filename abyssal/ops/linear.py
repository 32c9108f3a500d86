"""y = x Wᵀ for a few rows or many."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from abyssal.ops.device import capability

# Up to so many columns a GPU's kernel for one row holds its share of W in registers.
WIDEST = 4096

# Up to this many rows a CPU is limited by how fast it reads W, and one fused multiply-and-sum over W's rows
# reads it faster than a matrix product does (docs/benchmarks.md).
FEW_ROWS = 4


def linear(x: Tensor, weight: Tensor, path: str | None = None, settled: bool = False) -> Tensor:
    """`x [..., in]`, `weight [out, in]` -> `[..., out]` in x's dtype.

    `settled`: the weight was written long ago, as parameters are, and not by what was launched last: a kernel may read
    it while that is still running.

    Paths: "matmul", the library's product; "rowwise", a multiply-and-sum that only pays when compiled; "one row", a
    kernel for inference on a GPU (Triton). None chooses "rowwise" for up to FEW_ROWS rows in a graph being compiled
    for a CPU, and "one row" in bf16 on Hopper, where the weight is settled, for one.
    """
    if path is None:
        few = torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() <= FEW_ROWS * x.shape[-1]
        path = "rowwise" if few else "one row" if settled and _is_one_row(x, weight) else "matmul"
    if path == "matmul":
        return torch.nn.functional.linear(x, weight)
    if path == "one row":
        from abyssal.kernels.linear_few import linear as kernel

        return kernel(x, weight)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    flat = x.reshape(-1, x.shape[-1])
    # A sum a row of x, which a compiler makes in one loop: each row of W is fetched once and met by every x. As one sum
    # the result would lie transposed in memory, and everything after it with it, which vectorises badly.
    rows = [(weight.to(wide) * row).sum(-1) for row in flat.to(wide)]
    y = torch.stack(rows) if rows else flat.new_empty(0, weight.shape[0])
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def linears(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """`x [T, in]`, each weight `[out, in]` -> each `[T, out]`, all of one dtype. Of the gradients of x, the second and
    later ones are added by the products that make them, where autograd would add them afterwards."""
    return cast(tuple[Tensor, ...], _Linears.apply(x, *weights))


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        ctx.set_materialize_grads(False)
        return tuple(torch.nn.functional.linear(x, weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        dx: Tensor | None = None
        d_weights: list[Tensor | None] = []
        for grad, weight, wanted in zip(grads, weights, ctx.needs_input_grad[1:]):
            d_weights.append(grad.T @ x if grad is not None and wanted else None)
            if grad is not None and ctx.needs_input_grad[0]:
                dx = grad @ weight if dx is None else dx.addmm_(grad, weight)
        return dx, *d_weights


def _is_one_row(x: Tensor, weight: Tensor) -> bool:
    one = x.ndim == 2 and x.shape[0] == 1 and x.dtype == weight.dtype == torch.bfloat16 and x.shape[1] <= WIDEST
    if not one or torch.compiler.is_compiling() or capability(x)[0] != 9 or not weight.is_contiguous():
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))


def per_head(x: Tensor, weight: Tensor, path: str | None = None) -> Tensor:
    """A product a head: `x [T, H, in]`, `weight [H, out, in]` -> `[T, H, out]`, contiguous on a GPU in inference.
    Paths as in `linear`."""
    if path is None:
        few = torch.compiler.is_compiling() and x.device.type == "cpu" and x.shape[0] <= FEW_ROWS
        path = "rowwise" if few else "matmul"
    if path == "matmul":
        if x.device.type == "cuda" and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            out = x.new_empty(*x.shape[:2], weight.shape[1])  # written in place, for what flattens it next
            torch.bmm(x.transpose(0, 1), weight.transpose(1, 2), out=out.transpose(0, 1))
            return out
        return torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (weight.to(wide)[None] * x.to(wide)[:, :, None]).sum(-1).to(x.dtype)


def adjoin(weights: Sequence[torch.nn.Parameter]) -> None:
    """Lays weights of the same number of columns one behind the other in memory: each becomes a view of one storage,
    with the same numbers, name and shape. For inference, where nothing moves them afterwards."""
    joined = torch.cat([w.data for w in weights])
    for w, part in zip(weights, joined.split([w.shape[0] for w in weights])):
        w.data = part


def adjoining(weights: Sequence[Tensor]) -> Tensor | None:
    """The weights `[out, in]` as one `[sum of outs, in]`, a view, where they lie one behind the other (`adjoin`) and
    no gradient may be asked for; None otherwise. Reads no value: only where tensors lie."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(w.requires_grad for w in weights)):
        return None
    first, at, columns = weights[0], weights[0].data_ptr(), weights[0].shape[1]
    for w in weights:
        alike = w.dtype == first.dtype and w.shape[1] == columns and w.is_contiguous()
        if not alike or w.data_ptr() != at or w.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        at += w.numel() * w.element_size()
    return first.as_strided((sum(w.shape[0] for w in weights), columns), (columns, 1))
