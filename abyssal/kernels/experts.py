"""The routed experts in training and prefill on Hopper: launches, memory and gradients.

Rows are kept in the order of their experts. Forward: hidden = weight · silu(x w1) · (x w3), x's rows gathered while
they are loaded; hidden w2 row by row; each token adds up its K rows. Backward: the products of `experts_gradients`,
then dx = da w1 + db w3 row by row and the same sum. Nothing is added atomically: results repeat bit by bit. Kept for
the backward pass are x, the order, and the two inner products `[2, N, F]`. N = T·K, or the number of choices where
the host knows that some indices are none.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from abyssal.kernels.experts_gradients import hidden_kernel, weights_kernel
from abyssal.kernels.experts_products import PIECE, rows_kernel
from abyssal.kernels.experts_rows import clear_behind, sum_parts, sum_rows
from abyssal.kernels.experts_sort import Order, by_load, order_by_expert

GROUP = 16  # row tiles that share a weight tile while it is in L2: 16 · 128 rows beside 8 · 256 columns, about a wave
STAGES = 4  # 192 of the 227 KiB of shared memory
OPTIONS = {"num_warps": 4, "maxnreg": 168}  # of each of 384 threads; the warpgroups share them out anew


def _programs(device: torch.device) -> int:
    """One a multiprocessor, but for those that torch is told to leave to what runs beside (`parallel/mesh.py`): a
    program that has to wait until another one ends would make a launch take twice as long."""
    spared: int | None = torch._C._get_sm_carveout_experimental()
    return torch.cuda.get_device_properties(device).multi_processor_count - (spared or 0)


def _view(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """`t`, as a matrix of its last dimension, in boxes of `[rows, columns]` for the copy engine."""
    height, width = t.numel() // t.shape[-1], t.shape[-1]
    return TensorDescriptor(t, [height, width], [width, 1], [rows, columns], PIECE.value)


def up_product(x: Tensor, w1: Tensor, w3: Tensor, order: Order, keep: bool) -> tuple[Tensor, Tensor]:
    """hidden `[N, F]`, and the two inner products `[2, N, F]` (`[2, 0, F]` without `keep`)."""
    (_, F, D), N = w1.shape, order.token.numel()
    hidden = x.new_empty(N, F)
    kept = x.new_empty(2, N if keep else 0, F)
    pieces = [_view(kept[0], 64, 64), kept[0], _view(kept[1], 64, 64), kept[1]] if keep else [None] * 4
    rows_kernel[(_programs(x.device),)](
        None, None, x, order.token, _view(w1, 128, 64), _view(w3, 128, 64), _view(hidden, 64, 64), hidden, *pieces,
        order.weight, order.table, D // 8, F // 8, "up", keep, GROUP, STAGES, **OPTIONS,
    )  # fmt: skip
    return hidden, kept


def down_product(hidden: Tensor, w2: Tensor, order: Order) -> Tensor:
    """`[N, D]`: each row of hidden times its expert's w2."""
    (_, D, F), N = w2.shape, hidden.shape[0]
    out = hidden.new_empty(N, D)
    rows_kernel[(_programs(hidden.device),)](
        _view(hidden, 64, 64), None, None, None, _view(w2, 256, 64), None, _view(out, 64, 64), out, *[None] * 5,
        order.table, D // 8, F // 8, "down", False, GROUP, STAGES, **OPTIONS,
    )  # fmt: skip
    return out


def input_product(da: Tensor, db: Tensor, w1: Tensor, w3: Tensor, order: Order) -> Tensor:
    """`[N, D]`: da w1 + db w3 of each row's expert."""
    (_, F, D), N = w1.shape, da.shape[0]
    out = da.new_empty(N, D)
    rows_kernel[(_programs(da.device),)](
        _view(da, 64, 64), _view(db, 64, 64), None, None, _view(w1, 64, 256), _view(w3, 64, 256), _view(out, 64, 64),
        out, *[None] * 5, order.table, D // 8, F // 8, "input", False, GROUP, STAGES, **OPTIONS,
    )  # fmt: skip
    return out


def hidden_product(dy: Tensor, w2: Tensor, kept: Tensor, order: Order) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """da, db, hidden `[N, F]`, and parts of the weights' gradients `[⌈F / 256⌉, N]` float32. Where rows are left
    behind the last choice's, the first 64 are zero: sums over an expert's rows read whole steps, and multiply by zero
    what isn't of it."""
    (_, D, F), N = w2.shape, kept.shape[1]
    da, db, hidden = (dy.new_empty(N, F) for _ in range(3))
    parts = torch.empty(triton.cdiv(F, 256), N, dtype=torch.float32, device=dy.device)
    hidden_kernel[(_programs(dy.device),)](
        dy, order.token, _view(w2, 64, 256), _view(kept[0], 64, 64), _view(kept[1], 64, 64), _view(da, 64, 64), da,
        _view(db, 64, 64), db, _view(hidden, 64, 64), hidden, parts, N, order.weight, order.table, D // 8, F // 8,
        GROUP, STAGES, **OPTIONS,
    )  # fmt: skip
    clear_behind(da, db, hidden, order.starts[-1:], 64)
    return da, db, hidden, parts


def inner_weights_product(x: Tensor, da: Tensor, db: Tensor, order: Order, busiest: Tensor) -> tuple[Tensor, Tensor]:
    """dw1, dw3 `[E, F, D]`."""
    E, F, D = order.starts.numel() - 1, da.shape[1], x.shape[1]
    dw1, dw3 = (x.new_empty(E, F, D) for _ in range(2))
    weights_kernel[(_programs(x.device),)](
        _view(da, 64, 64), _view(db, 64, 64), x, order.token, order.starts, busiest, _view(dw1, 64, 64), dw1,
        _view(dw3, 64, 64), dw3, E, D // 8, F // 8, 2, GROUP, STAGES, **OPTIONS,
    )  # fmt: skip
    return dw1, dw3


def outer_weights_product(dy: Tensor, hidden: Tensor, order: Order, busiest: Tensor) -> Tensor:
    """dw2 `[E, D, F]`."""
    E, F, D = order.starts.numel() - 1, hidden.shape[1], dy.shape[1]
    dw2 = dy.new_empty(E, D, F)
    weights_kernel[(_programs(dy.device),)](
        _view(hidden, 64, 64), None, dy, order.token, order.starts, busiest, _view(dw2, 64, 64), dw2, None, None, E,
        D // 8, F // 8, 1, GROUP, STAGES, **OPTIONS,
    )  # fmt: skip
    return dw2


def _packed(order: Order) -> Tensor:
    """The order's integers in one tensor: an operator's outputs mustn't share memory."""
    return torch.cat([order.token, order.place, order.starts, order.table.flatten()])


def _unpacked(integers: Tensor, weight: Tensor, experts: int, pairs: int) -> Order:
    sizes = [weight.numel(), pairs, experts + 1]
    token, place, starts, table = integers.split([*sizes, integers.numel() - sum(sizes)])
    return Order(token, weight, place, starts, table.view(-1, 4))


@torch.library.custom_op("abyssal::grouped_experts", mutates_args=())
def _forward(
    x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, indices: Tensor, weights: Tensor, rows: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, and with `keep` what the backward pass needs: inner products, the order's integers, its weights."""
    order = order_by_expert(indices, weights, w1.shape[0], rows)
    hidden, kept = up_product(x, w1, w3, order, keep)
    y = sum_rows(down_product(hidden, w2, order), order.place.view(indices.shape))
    if not keep:
        return y, kept, order.token.new_empty(0), order.weight.new_empty(0)
    return y, kept, _packed(order), order.weight


@_forward.register_fake
def _(
    x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, indices: Tensor, weights: Tensor, rows: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    E, F, _ = w1.shape
    N = rows if keep else 0
    integers = N + indices.numel() + E + 1 + 4 * ((N + 127) // 128 + E + 1) if keep else 0
    kept = x.new_empty(2, N, F)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        kept,
        x.new_empty(integers, dtype=torch.int32),
        x.new_empty(N, dtype=torch.float32),
    )


@torch.library.custom_op("abyssal::grouped_experts_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, kept: Tensor, integers: Tensor, weight: Tensor,
    chosen: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    order = _unpacked(integers, weight, w1.shape[0], x.shape[0] * chosen)
    dy = dy.contiguous()
    da, db, hidden, parts = hidden_product(dy, w2, kept, order)
    d_weights = sum_parts(parts, order.place, dtype).view(x.shape[0], -1)
    busiest = by_load(order.starts)
    dw2 = outer_weights_product(dy, hidden, order, busiest)
    del hidden, parts
    dw1, dw3 = inner_weights_product(x, da, db, order, busiest)
    dx = sum_rows(input_product(da, db, w1, w3, order), order.place.view(-1, chosen))
    return dx, dw1, dw2, dw3, d_weights


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, kept: Tensor, integers: Tensor, weight: Tensor,
    chosen: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dw1, dw2, dw3 = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, w1, w2, w3))
    return dx, dw1, dw2, dw3, weight.new_empty(x.shape[0], chosen, dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w1, w2, w3, _, weights, *_ = inputs
    _, kept, integers, weight = output
    ctx.save_for_backward(x, w1, w2, w3, kept, integers, weight)
    ctx.chosen, ctx.dtype = weights.shape[1], weights.dtype
    ctx.mark_non_differentiable(kept, integers, weight)
    ctx.set_materialize_grads(False)  # zeros for what is kept would be a pass over memory


def _differentiate(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 8
    dx, dw1, dw2, dw3, d_weights = torch.ops.abyssal.grouped_experts_backward(
        dy, *ctx.saved_tensors, ctx.chosen, ctx.dtype
    )
    return dx, dw1, dw2, dw3, None, d_weights, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def grouped_experts(
    x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, indices: Tensor, weights: Tensor, choices: int | None = None
) -> Tensor:
    """`[T, D]`: Σ_k weights[t, k] · w2(silu(w1 x_t) · w3 x_t), differentiable, on a Hopper GPU.

    `x [T, D]`, `w1`, `w3` `[E, F, D]`, `w2 [E, D, F]` contiguous bfloat16 or float16, D and F multiples of 8;
    `indices [T, K]` integers, no choice where outside 0..E - 1, `weights [T, K]` floating. Experts may be uneven and
    empty. `choices`: how many choices there are (None: the host doesn't know; room is made for T·K).
    """
    rows = indices.numel() if choices is None else choices
    if not x.numel() or not rows:
        return x * 0 + weights.sum() * 0 + (w1.sum() + w2.sum() + w3.sum()) * 0
    x, w1, w2, w3 = (t.contiguous() for t in (x, w1, w2, w3))
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w1, w2, w3, weights))
    return _forward(x, w1, w2, w3, indices, weights, rows, keep)[0]


def grouped_experts_plus(
    x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, indices: Tensor, weights: Tensor, plus: Tensor
) -> Tensor:
    """`grouped_experts` and `plus [T, D]`, added before rounding; for at least one choice, without gradients."""
    x, w1, w2, w3 = (t.contiguous() for t in (x, w1, w2, w3))
    order = order_by_expert(indices, weights, w1.shape[0])
    hidden, _ = up_product(x, w1, w3, order, keep=False)
    return sum_rows(down_product(hidden, w2, order), order.place.view(indices.shape), plus)
