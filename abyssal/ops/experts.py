"""The routed experts: each token's K gated MLPs, weighted and summed (DeepSeek-V3, equation 12)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from abyssal.ops.device import capability, on_cpu
from abyssal.ops.gated import gated
from abyssal.ops.linear import adjoining, linear

# Up to this many choices of an expert a compiled multiply-and-sum reads the weights faster than products do.
FEW_CHOICES = 32
# Up to this many choices a GPU reads the touched experts' weights faster than grouped products do (docs/kernels.md).
FEW_READ = 960


def experts(
    x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, indices: Tensor, weights: Tensor, path: str | None = None,
    choices: int | None = None,
) -> Tensor:  # fmt: skip
    """`[T, D]`: Σ_k weights[t, k] · w2(silu(w1 x_t) · w3 x_t) with the weights of expert indices[t, k].

    `x [T, D]`, `w1`, `w3` `[E, F, D]`, `w2 [E, D, F]`, `indices [T, K]` int64, `weights [T, K]` of any float dtype.

    An index outside 0..E - 1 is no choice: it adds nothing, and its weight's gradient is 0. `choices`: how many indices
    are choices, where the caller knows it and it isn't all of them; rows are then kept for so many. On "decode", which
    doesn't look, indices may lie outside only where it is given.

    Paths: "reference" (every expert sees every token; any device and dtype), "loop" (a product an expert, on a
    CPU), "rowwise" (a multiply-and-sum a choice, for few choices in a graph compiled for a CPU), "grouped" (torch's
    grouped products; no host synchronisation on a GPU), "fused" (our grouped products on Hopper, gathers and gates
    inside), "decode" (few tokens on a GPU, without gradients). None chooses.
    """
    if path is None:
        path = _chosen(x, w1, w2, w3, indices, weights)
    if path == "reference":
        return _reference(x, w1, w2, w3, indices, weights)
    if path == "rowwise":
        return _rowwise(x, w1, w2, w3, indices, weights)
    if path == "grouped":
        return _grouped(x, w1, w2, w3, indices, weights, choices)
    if path == "fused":
        from abyssal.kernels.experts import grouped_experts

        return grouped_experts(x, w1, w2, w3, indices, weights, choices)
    if path == "decode":
        if choices is not None:
            inside = _inside(indices, w1.shape[0])
            indices, weights = torch.where(inside, indices, 0), torch.where(inside, weights, 0)
        few = _opaque_decode if torch.compiler.is_compiling() else _decode
        return few(x, w1, w2, w3, indices, weights)
    if path == "loop":
        return _Loop.apply(x, w1, w2, w3, indices, weights.to(x.dtype))
    if path == "opaque loop":
        return _opaque_loop(x, w1, w2, w3, indices, weights)
    names = "'reference', 'loop', 'rowwise', 'grouped', 'fused' or 'decode'"
    raise ValueError(f"path: expected {names}, got {path!r}")


def _chosen(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, indices: Tensor, weights: Tensor) -> str:
    if on_cpu(x):
        if not torch.compiler.is_compiling():
            return "loop"
        return "rowwise" if indices.numel() <= FEW_CHOICES else "opaque loop"
    if x.dtype != torch.bfloat16 or any(width % 8 for width in w1.shape[1:]):  # rows of 16 bytes
        return "reference"
    generation = capability(x)[0]
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w1, w2, w3, weights))
    if generation and not learns and 0 < indices.numel() <= FEW_READ:
        return "decode"
    return "fused" if generation == 9 and indices.numel() else "grouped"


def read_together(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, indices: Tensor, shared_w1: Tensor) -> bool:
    """Whether `with_shared` serves: routed and shared experts in the same launches, or the sum of both in one. bf16 on
    a GPU, no gradient, nothing being compiled."""
    if torch.compiler.is_compiling() or not x.dtype == w1.dtype == shared_w1.dtype:
        return False
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w1, w2, w3, shared_w1))
    path = _chosen(x, w1, w2, w3, indices, x)
    return not learns and (path == "fused" or (path == "decode" and shared_w1.shape[0] % w1.shape[1] == 0))


def with_shared(
    x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, indices: Tensor, weights: Tensor,
    shared_w1: Tensor, shared_w2: Tensor, shared_w3: Tensor, path: str | None = None,
) -> Tensor:  # fmt: skip
    """`[T, D]`: `experts`, and beside them the shared experts w2(silu(w1 x) · w3 x), which see every token.

    `shared_w1`, `shared_w3` `[F', D]`, `shared_w2 [D, F']`, F' a multiple of F. Paths as in `experts`; on "decode" the
    shared experts are read in the same launches, on "fused" their result is added where the choices' are summed.
    Neither has gradients.
    """
    path = path or _chosen(x, w1, w2, w3, indices, weights)
    if path == "decode":
        from abyssal.kernels.experts_decode import moe_decode

        return moe_decode(x, w1, w2, w3, indices, weights, shared_w1, shared_w2, shared_w3)
    joined = adjoining([shared_w1, shared_w3])
    a, b = (linear(x, shared_w1), linear(x, shared_w3)) if joined is None else linear(x, joined).chunk(2, -1)
    shared = linear(gated(a, b), shared_w2)
    if path == "fused":
        from abyssal.kernels.experts import grouped_experts_plus

        return grouped_experts_plus(x, w1, w2, w3, indices, weights, shared)
    return experts(x, w1, w2, w3, indices, weights, path) + shared


def sum_rows(parts: Sequence[Tensor], place: Tensor, plus: Tensor | None = None, path: str | None = None) -> Tensor:
    """`[T, D]`: for each token the sum of the rows `place[t, k]` of `parts`, `[N_0, D]`, `[N_1, D]`, which count as one
    behind the other, and of `plus [T, D]`; a negative place is none. No gradients.

    Paths: "reference" (any device and dtype) and "fused" (a GPU with Triton; summed in float32). None chooses.
    """
    first, second = parts
    if path is None:
        narrow = first.dtype in (torch.bfloat16, torch.float16, torch.float32)
        path = "fused" if narrow and capability(first)[0] else "reference"
    if path == "fused":
        return _fused_sum(first, second, place, plus)
    if path != "reference":
        raise ValueError(f"path: expected 'reference' or 'fused', got {path!r}")
    rows = torch.cat((first, second, first.new_zeros(1, first.shape[1])))
    total = rows.new_zeros(place.shape[0], rows.shape[1]) if plus is None else plus
    for column in place.unbind(1):
        total = total + rows[torch.where(column < 0, rows.shape[0] - 1, column)]
    return total


@torch.library.custom_op("abyssal::sum_rows", mutates_args=())
def _fused_sum(first: Tensor, second: Tensor, place: Tensor, plus: Tensor | None) -> Tensor:
    from abyssal.kernels.experts_rows import sum_rows as fused

    return fused(first, place, plus, second)


@_fused_sum.register_fake
def _(first: Tensor, second: Tensor, place: Tensor, plus: Tensor | None) -> Tensor:
    return first.new_empty(place.shape[0], first.shape[1])


def _reference(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for e in range(w1.shape[0]):
        gate = (weights * (indices == e)).sum(-1, keepdim=True).to(x.dtype)
        y = y + gate * ((silu(x @ w1[e].T) * (x @ w3[e].T)) @ w2[e].T)
    return y


def _rowwise(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """A compiler fuses the indexing of the weights into the sums: no expert is copied. Several tokens' choices are
    sorted, so that an expert picked twice is met again while it is in the cache."""
    wide = torch.promote_types(x.dtype, torch.float32)
    tokens, chosen = indices.shape
    expert, order = indices.flatten(), torch.arange(tokens * chosen, device=x.device)
    if tokens > 1:
        expert, order = expert.sort(stable=True)
    live = _inside(expert, w1.shape[0])
    expert = torch.where(live, expert, 0)
    rows = x.to(wide)[order // chosen, None]
    gate = weights.flatten()[order, None]
    hidden = silu((w1[expert].to(wide) * rows).sum(-1)) * (w3[expert].to(wide) * rows).sum(-1) * gate
    hidden = torch.where(live[:, None], hidden, 0).to(x.dtype).to(wide)
    y = (w2[expert].to(wide) * hidden[:, None]).sum(-1)
    if tokens > 1:
        y = y[order.argsort()]
    return y.unflatten(0, (tokens, chosen)).sum(1).to(x.dtype)


def _sorted(indices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The (token, choice) pairs in the order of their experts `[T·K]`, those that are no choices last, and each
    expert's count `[E]`."""
    flat = indices.flatten()
    flat = torch.where(_inside(flat, experts), flat, experts)
    order = flat.argsort(stable=True)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=flat.device)
    return order, counts.scatter_add_(0, flat, torch.ones_like(flat))[:-1]


def _inside(indices: Tensor, experts: int) -> Tensor:
    return (indices >= 0) & (indices < experts)


def _grouped(
    x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, indices: Tensor, weights: Tensor, choices: int | None
) -> Tensor:
    chosen = indices.shape[1]
    order, counts = _sorted(indices, w1.shape[0])
    order = order[:choices]
    if not order.numel():
        return x * 0 + (weights.sum() + w1.sum() + w2.sum() + w3.sum()).to(x.dtype) * 0
    ends = counts.cumsum(0).to(torch.int32)
    # What products leave in rows behind the last expert's, here and on the way back, is anything.
    live = (torch.arange(order.numel(), device=x.device) < ends[-1])[:, None]
    rows = torch.where(live, x[order // chosen], 0)
    product = torch.nn.functional.grouped_mm
    hidden = silu(product(rows, w1.transpose(1, 2), offs=ends)) * product(rows, w3.transpose(1, 2), offs=ends)
    y = torch.where(live, product(hidden, w2.transpose(1, 2), offs=ends), 0)
    back = y.new_zeros(indices.numel(), y.shape[1]).index_copy(0, order, y)
    return (back.unflatten(0, indices.shape) * weights[..., None].to(x.dtype)).sum(1)


class _Loop(torch.autograd.Function):
    """A product an expert over the tokens that chose it. The gate value is folded into the hidden row, so that the
    experts' outputs are never kept: its gradient is the product of that row with what comes back through w2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        order, counts = _sorted(indices, w1.shape[0])
        sizes = counts.tolist()
        order = order[: sum(sizes)]
        token = order // indices.shape[1]
        rows, gate = x[token], weights.flatten()[order][:, None]
        a, b = (x.new_empty(rows.shape[0], w1.shape[1]) for _ in range(2))
        y_rows = torch.empty_like(rows)
        start = 0
        for e, size in enumerate(sizes):
            if size:
                part = slice(start, start + size)
                torch.mm(rows[part], w1[e].T, out=a[part])
                torch.mm(rows[part], w3[e].T, out=b[part])
                hidden = silu(a[part]).mul_(b[part]).mul_(gate[part])
                torch.mm(hidden, w2[e].T, out=y_rows[part])
                start += size
        ctx.save_for_backward(x, w1, w2, w3, order, gate, a, b)
        ctx.sizes, ctx.shape = sizes, indices.shape
        return _back(y_rows, order, indices.numel()).unflatten(0, indices.shape).sum(1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2, w3, order, gate, a, b = ctx.saved_tensors
        token = order // ctx.shape[1]
        rows, dy_rows = x[token], dy[token]
        dx_rows, d_gate = torch.empty_like(rows), torch.empty_like(gate)
        dw1, dw2, dw3 = torch.empty_like(w1), torch.empty_like(w2), torch.empty_like(w3)
        start = 0
        for e, size in enumerate(ctx.sizes):
            if not size:
                for unused in (dw1[e], dw2[e], dw3[e]):
                    unused.zero_()
                continue
            part = slice(start, start + size)
            sigmoid = a[part].sigmoid()
            act = a[part] * sigmoid
            hidden = act * b[part]
            back = dy_rows[part] @ w2[e]
            torch.sum(back * hidden, 1, keepdim=True, out=d_gate[part])
            back.mul_(gate[part])
            torch.mm(dy_rows[part].T, hidden.mul_(gate[part]), out=dw2[e])
            db = back * act
            da = back.mul_(b[part]).mul_(sigmoid + act * (1 - sigmoid))
            torch.mm(da.T, rows[part], out=dw1[e])
            torch.mm(db.T, rows[part], out=dw3[e])
            torch.addmm(torch.mm(da, w1[e]), db, w3[e], out=dx_rows[part])
            start += size
        dx = _back(dx_rows, order, ctx.shape.numel()).unflatten(0, ctx.shape).sum(1)
        d_weights = _back(d_gate, order, ctx.shape.numel()).view(ctx.shape)
        return dx, dw1, dw2, dw3, None, d_weights


def _back(rows: Tensor, order: Tensor, pairs: int) -> Tensor:
    """Rows, back in the order of the pairs; 0 where a pair is no choice."""
    return rows.new_zeros(pairs, *rows.shape[1:]).index_copy_(0, order, rows)


@torch.library.custom_op("abyssal::experts_loop", mutates_args=())
def _opaque_loop(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return _Loop.apply(x, w1, w2, w3, indices, weights.to(x.dtype))


@_opaque_loop.register_fake
def _(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return torch.empty_like(x)


def _decode(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    from abyssal.kernels.experts_decode import experts_decode

    return experts_decode(x, w1, w2, w3, indices, weights)


_opaque_decode = torch.library.custom_op("abyssal::experts_decode", _decode, mutates_args=())


@_opaque_decode.register_fake
def _(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
