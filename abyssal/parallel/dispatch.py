"""Tokens on their way to the ranks that hold their experts, and back, while something else is computed.

A token goes once to each rank that holds any of its experts, however many, with its gate values and choices; that rank
sends back one row for it, weighted and summed, and the token adds up the rows of its ranks. Rows that stay on their
rank are copied, not sent. How many rows each rank gets is not known before: counts are exchanged first, and the host
reads them, which is the only time that it waits.

What is on its way takes two steps, a start and a wait, and so it does on the way back: the backward pass of a wait
starts the exchange of gradients, and the backward pass of the start waits for it. Autograd goes back through what came
later first; so what a forward pass computes between the two lies between them in the backward pass, too.
"""

from dataclasses import dataclass, field
from math import comb
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from abyssal.ops.experts import sum_rows


class Sizes(NamedTuple):
    """How many rows go where."""

    sent: list[int]  # to each rank of the group; none to itself
    received: list[int]  # from each rank
    own: int  # that stay
    choices: int  # that fall on this rank's experts, over all rows it works on


@dataclass(frozen=True)
class Plan:
    """Who gets which tokens. Rows, as their sender numbers them: those that are sent, by rank, then those that stay."""

    group: dist.ProcessGroup
    sizes: Sizes
    token: Tensor  # [rows] int64, the token of each
    place: Tensor  # [T, K] int64, the row that a choice's rank gets; -1 if an earlier choice's is the same
    row: Tensor  # [T, K] int64, the row that a choice's rank gets

    @property
    def leaving(self) -> int:
        """Rows that are sent."""
        return sum(self.sizes.sent)

    @property
    def coming(self) -> int:
        """Rows that are received; those that stay lie behind them."""
        return sum(self.sizes.received)


@dataclass
class Way:
    """What is under way between a start and its wait."""

    works: list[dist.Work] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)  # alive as long as it is sent from or received into
    gradients: tuple[Tensor, Tensor] | None = None  # on the way back: of rows and gate values, as their sender has them

    def send(self, out: Tensor, rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> None:
        """Starts sending `rows`, `sent` of them to each rank, and receiving `out`."""
        work = dist.all_to_all_single(out, rows, received, sent, group=group, async_op=True)
        assert work is not None
        self.works.append(work)
        self.kept += [rows, out]

    def wait(self) -> None:
        """Lets what follows see what was received: on a GPU its stream waits, not the host."""
        for work in self.works:
            work.wait()
        self.works, self.kept = [], []


@torch.no_grad()
def plan(indices: Tensor, experts: int, held: int, group: dist.ProcessGroup) -> Plan:
    """Of the choices `indices [T, K]` among all `experts`, of which each rank holds `held`, one rank's behind the
    other's. Waits for the device once, for the sizes."""
    ranks, me = group.size(), group.rank()
    T, K = indices.shape
    target = indices // held
    counts = torch.zeros(ranks, 2, dtype=torch.int64, device=indices.device)
    goes = torch.zeros(ranks, T, dtype=torch.bool, device=indices.device).scatter_(0, target.T, True)
    torch.sum(goes, 1, out=counts[:, 0])
    counts[:, 1].scatter_add_(0, target.flatten(), torch.ones_like(target).flatten())
    coming = torch.empty_like(counts)
    way = Way()
    even = [1] * ranks
    way.send(coming, counts, even, even, group)

    # This rank's own rows come last.
    turned = torch.cat((goes[:me], goes[me + 1 :], goes[me : me + 1])).flatten()
    slot = turned.cumsum(0) - 1
    most = T * min(ranks, K)
    at = torch.arange(ranks * T, device=indices.device)
    token = torch.empty(most + 1, dtype=torch.int64, device=indices.device)
    token.scatter_(0, torch.where(turned, slot, most), at % max(T, 1))
    turn = torch.where(target == me, ranks - 1, target - (target > me).long())
    row = slot[turn * T + at[:T, None]]
    earlier = (target[:, :, None] == target[:, None, :]).tril(-1).any(-1)
    place = torch.where(earlier, -1, row)

    way.wait()
    found = sizes(counts, coming, T, K, experts, group)
    return Plan(group, found, token[: sum(found.sent) + found.own], place, row)


def sizes(counts: Tensor, coming: Tensor, tokens: int, chosen: int, experts: int, group: dist.ProcessGroup) -> Sizes:
    """Read from what each rank gets and gives, `[ranks, 2]`: rows and choices. The host waits here.

    Where there is nothing to read, under a fake group or with fake tensors, what an even draw of experts comes to.
    """
    ranks, me = group.size(), group.rank()
    if isinstance(counts, FakeTensor) or dist.get_backend(group) == "fake":
        held = experts // ranks
        reached = 1 - comb(experts - held, chosen) / comb(experts, chosen)
        given = got = [[round(tokens * reached), tokens * chosen // ranks]] * ranks
    else:
        given, got = torch.stack((counts, coming)).tolist()
    sent = [0 if r == me else given[r][0] for r in range(ranks)]
    received = [0 if r == me else got[r][0] for r in range(ranks)]
    return Sizes(sent, received, given[me][0], sum(n for _, n in got))


class Arrived(NamedTuple):
    """The rows that a rank works on."""

    x: Tensor  # [R, D]
    weights: Tensor  # [R, K] gate values
    indices: Tensor  # [R, K] int64 experts, of all; some are other ranks'


class Departure(NamedTuple):
    """Rows under way to their experts."""

    x: Tensor  # [R, D]
    meta: Tensor  # [R, 2K]: gate values, and experts as numbers of the same dtype
    way: Way


def depart(x: Tensor, weights: Tensor, indices: Tensor, plan: Plan) -> Departure:
    """Starts sending tokens `x [T, D]`, their gate values and choices `[T, K]`."""
    way = Way()
    rows, meta = _Depart.apply(x, weights, indices, plan, way)
    return Departure(rows, meta, way)


def arrive(departure: Departure, plan: Plan) -> Arrived:
    """Lets what follows wait for what was sent."""
    return Arrived(*_Arrive.apply(departure.x, departure.meta, plan, departure.way))


class Return(NamedTuple):
    """Rows under way to their tokens."""

    y: Tensor  # [R, D] what this rank gives
    back: Tensor  # [rows that it gets, D]
    way: Way


def give_back(y: Tensor, plan: Plan) -> Return:
    """Starts sending back what came of the rows, `y [R, D]`."""
    back, way = y.new_empty(plan.leaving, y.shape[1]), Way()
    return Return(_GiveBack.apply(y, back, plan, way), back, way)


def collect(returned: Return, plan: Plan, plus: Tensor | None = None) -> Tensor:
    """`[T, D]`: waits, and adds up each token's rows, and `plus [T, D]`."""
    out: Tensor = _Collect.apply(returned.y, plus, returned.back, plan, returned.way)
    return out


def _scatter(x: Tensor, plan: Plan, way: Way) -> Tensor:
    """Starts sending each token's row to its ranks: `[T, D]` -> `[R, D]`, filled when `way` is waited for."""
    leaving, coming = plan.leaving, plan.coming
    out = x.new_empty(coming + plan.sizes.own, x.shape[1])
    rows = x.new_empty(leaving, x.shape[1])
    _pick(x, plan.token[:leaving], rows)
    way.send(out[:coming], rows, plan.sizes.received, plan.sizes.sent, plan.group)
    _pick(x, plan.token[leaving:], out[coming:])
    return out


def _pick(x: Tensor, token: Tensor, out: Tensor) -> None:
    """`out [rows, D]` = x[token]. A GPU moves a number a thread: long ones are moved at the rate of the memory."""
    if x.shape[1] * x.element_size() % 8 == 0 and x.element_size() < 8:
        x, out = x.view(torch.int64), out.view(torch.int64)
    torch.index_select(x, 0, token, out=out)


def _gather(rows: Tensor, back: Tensor, plan: Plan, way: Way) -> None:
    """Starts sending what `_scatter` brought the other way: `[R, D]` into `back [rows sent, D]`."""
    way.send(back, rows[: plan.coming], plan.sizes.sent, plan.sizes.received, plan.group)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, indices: Tensor, plan: Plan, way: Way) -> tuple[Tensor, Tensor]:
        ctx.plan, ctx.way = plan, way
        ctx.set_materialize_grads(False)
        # Experts are few enough to be exact in any dtype of gate values.
        meta = _scatter(torch.cat((weights, indices.to(weights.dtype)), 1), plan, way)
        return _scatter(x.contiguous(), plan, way), meta

    @staticmethod
    def backward(ctx: Any, dx_rows: Tensor, _: None) -> tuple[Tensor | None, ...]:
        plan, way = ctx.plan, ctx.way
        way.wait()
        (back, d_weights), way.gradients = way.gradients, None
        dx = sum_rows((back, dx_rows[plan.coming :]), plan.place)
        return dx, d_weights[plan.row, torch.arange(plan.row.shape[1], device=dx.device)], None, None, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, meta: Tensor, plan: Plan, way: Way) -> tuple[Tensor, Tensor, Tensor]:
        ctx.plan, ctx.way = plan, way
        way.wait()
        weights, indices = meta.chunk(2, 1)
        indices = indices.long()
        ctx.mark_non_differentiable(indices)
        # A block is computed again when something that it kept is asked for, up to the last thing it kept. Experts that
        # get no rows may keep nothing: so that their rank, too, takes part in the exchange again, this is kept here.
        ctx.save_for_backward(rows.new_empty(0))
        return rows.view_as(rows), weights.contiguous(), indices

    @staticmethod
    def backward(ctx: Any, dx_rows: Tensor, d_weights: Tensor, _: None) -> tuple[Tensor | None, ...]:
        plan, way, _ = ctx.plan, ctx.way, ctx.saved_tensors
        dx_rows, d_weights = dx_rows.contiguous(), d_weights.contiguous()
        back = dx_rows.new_empty(plan.leaving, dx_rows.shape[1])
        weights_back = d_weights.new_empty(plan.leaving + plan.sizes.own, d_weights.shape[1])
        _gather(dx_rows, back, plan, way)
        _gather(d_weights, weights_back[: plan.leaving], plan, way)
        weights_back[plan.leaving :] = d_weights[plan.coming :]
        way.gradients = back, weights_back
        return dx_rows, None, None, None


class _GiveBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, back: Tensor, plan: Plan, way: Way) -> Tensor:
        ctx.way = way
        y = y.contiguous()
        _gather(y, back, plan, way)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy_rows: Tensor) -> tuple[Tensor | None, ...]:
        ctx.way.wait()
        return dy_rows, None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, plus: Tensor | None, back: Tensor, plan: Plan, way: Way) -> Tensor:
        ctx.plan, ctx.way = plan, way
        way.wait()
        return sum_rows((back, y[plan.coming :]), plan.place, plus)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _scatter(dy.contiguous(), ctx.plan, ctx.way), dy if ctx.needs_input_grad[1] else None, None, None, None
