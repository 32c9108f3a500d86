"""Tokens on their way to the ranks that hold their experts, and back, while something else is computed.

A token goes once to each other rank that holds any of its experts, however many, with its gate values and choices; that
rank sends back one row for it, weighted and summed, and the token adds up the rows of its ranks. Rows that stay are
worked on by themselves, while those of other ranks are on their way back. How many rows each rank gets is not known
before: counts are exchanged first, and the host reads them, which is the only time that it waits. Of two ranks nearly
every token goes to both: then all go, nothing is counted, and they can start before their experts are known.

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
    choices: int  # that fall on this rank's experts, over the rows it receives; as many at most, if all rows go
    own_choices: int  # the same of the rows that stay


@dataclass(frozen=True)
class Plan:
    """Who gets which tokens. Rows, as their sender numbers them: those that are sent, by rank, then those that stay."""

    group: dist.ProcessGroup
    sizes: Sizes
    place: Tensor  # [T, n] int64, a token's rows, each once; -1 where it has fewer than n
    chosen: "Chosen | None" = None  # None: all tokens go to every rank

    @property
    def leaving(self) -> int:
        """Rows that are sent."""
        return sum(self.sizes.sent)

    @property
    def coming(self) -> int:
        """Rows that are received."""
        return sum(self.sizes.received)


class Chosen(NamedTuple):
    """Which tokens go where, if not all go everywhere."""

    sent: Tensor  # [rows] int64, the token of each row that is sent
    stay: Tensor  # [own] int64, the tokens that stay
    row: Tensor  # [T, K] int64, the row that a choice's rank gets
    place: Tensor  # [T, n] int64, as the plan's, of rows that are sent alone


@dataclass
class Way:
    """What is under way between a start and its wait."""

    works: list[dist.Work] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)  # alive as long as it is sent from or received into
    gradient: Tensor | None = None  # on the way back: of what was sent, as its sender has it
    back: Tensor | None = None  # on the way back: [rows sent, D] what this rank gets, for nobody to see before the wait

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
    leaving = sum(found.sent)
    rows = token[:leaving], token[leaving : leaving + found.own]
    return Plan(group, found, place, Chosen(*rows, row, torch.where(place < leaving, place, -1)))


def plan_of_all(tokens: int, chosen: int, group: dist.ProcessGroup, device: torch.device) -> Plan:
    """All of a rank's tokens go to every rank, of which each has so many."""
    ranks, me = group.size(), group.rank()
    others, picks = [0 if r == me else tokens for r in range(ranks)], tokens * chosen
    place = torch.arange(ranks * tokens, device=device).view(ranks, tokens).T.contiguous()
    return Plan(group, Sizes(others, others, tokens, (ranks - 1) * picks, picks), place)


def reached(experts: int, held: int, chosen: int) -> float:
    """How likely an even draw of `chosen` experts has one of those that a rank holds."""
    return 1 - comb(experts - held, chosen) / comb(experts, chosen)


def sizes(counts: Tensor, coming: Tensor, tokens: int, chosen: int, experts: int, group: dist.ProcessGroup) -> Sizes:
    """Read from what each rank gets and gives, `[ranks, 2]`: rows and choices. The host waits here.

    Where there is nothing to read, under a fake group or with fake tensors, what an even draw of experts comes to.
    """
    ranks, me = group.size(), group.rank()
    if isinstance(counts, FakeTensor) or dist.get_backend(group) == "fake":
        held = experts // ranks
        given = got = [[round(tokens * reached(experts, held, chosen)), tokens * chosen // ranks]] * ranks
    else:
        given, got = torch.stack((counts, coming)).tolist()
    sent = [0 if r == me else given[r][0] for r in range(ranks)]
    received = [0 if r == me else got[r][0] for r in range(ranks)]
    return Sizes(sent, received, given[me][0], sum(got[r][1] for r in range(ranks) if r != me), given[me][1])


class Arrived(NamedTuple):
    """The rows that a rank works on."""

    x: Tensor  # [R, D]
    weights: Tensor  # [R, K] gate values
    indices: Tensor  # [R, K] int64 experts, of all; some are other ranks'


class Departure(NamedTuple):
    """Under way to the ranks of the experts."""

    rows: Tensor  # [R, D] tokens, or [R, 2K]: gate values, and experts as numbers of the same dtype
    way: Way


def depart(x: Tensor, plan: Plan) -> Departure:
    """Starts sending tokens `x [T, D]`."""
    way = Way()
    return Departure(_Depart.apply(x, plan, way), way)


def depart_choices(weights: Tensor, indices: Tensor, plan: Plan) -> Departure:
    """Starts sending the tokens' gate values and choices, `[T, K]`."""
    way = Way()
    return Departure(_DepartChoices.apply(weights, indices, plan, way), way)


def stays(x: Tensor, weights: Tensor, indices: Tensor, plan: Plan) -> Arrived:
    """The rows that this rank works on of its own."""
    if plan.chosen is None:
        return Arrived(x, weights, indices)
    own = plan.chosen.stay
    return Arrived(_Stay.apply(x, own), weights.index_select(0, own), indices.index_select(0, own))


def arrive(tokens: Departure, choices: Departure, plan: Plan) -> Arrived:
    """Lets what follows wait for what was sent."""
    return Arrived(*_Arrive.apply(tokens.rows, choices.rows, plan, tokens.way, choices.way))


class Return(NamedTuple):
    """Rows under way to their tokens."""

    y: Tensor  # [rows received, D] what this rank gives
    way: Way


def give_back(y: Tensor, plan: Plan) -> Return:
    """Starts sending back what came of the rows that were received, `y [R, D]`."""
    way = Way()
    return Return(_GiveBack.apply(y, plan, way), way)


def collect(returned: Return, own: Tensor, plan: Plan, plus: Tensor | None = None) -> Tensor:
    """`[T, D]`: waits, and adds up each token's rows, `own` of those that stayed, and `plus [T, D]`."""
    out: Tensor = _Collect.apply(returned.y, own, plus, plan, returned.way)
    return out


def _scatter(x: Tensor, plan: Plan, way: Way) -> Tensor:
    """Starts sending each token's row to its other ranks: `[T, D]` -> `[R, D]`, filled when `way` is waited for."""
    leaving, chosen = plan.leaving, plan.chosen
    out = x.new_empty(plan.coming, x.shape[1])
    if chosen is not None:
        rows = _picked(x, chosen.sent)
    else:
        rows = x if leaving == x.shape[0] else x.repeat(leaving // x.shape[0], 1)
    way.send(out, rows, plan.sizes.received, plan.sizes.sent, plan.group)
    return out


def _picked(x: Tensor, token: Tensor) -> Tensor:
    """x[token]. A GPU moves a number a thread: long ones are moved at the rate of the memory."""
    out = x.new_empty(token.shape[0], x.shape[1])
    x, wide = x.contiguous(), out
    if x.shape[1] * x.element_size() % 8 == 0 and x.element_size() < 8:
        x, wide = x.view(torch.int64), out.view(torch.int64)
    torch.index_select(x, 0, token, out=wide)
    return out


def _gather(rows: Tensor, back: Tensor, plan: Plan, way: Way) -> None:
    """Starts sending what `_scatter` brought the other way: `[R, D]` into `back [rows sent, D]`."""
    way.send(back, rows, plan.sizes.sent, plan.sizes.received, plan.group)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan, way: Way) -> Tensor:
        ctx.plan, ctx.way = plan, way
        return _scatter(x.contiguous(), plan, way)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        plan, way = ctx.plan, ctx.way
        way.wait()
        back, way.gradient = way.gradient, None
        if plan.chosen is not None:
            return sum_rows((back, back[:0]), plan.chosen.place), None, None
        others = plan.group.size() - 1
        return back if others == 1 else back.view(others, -1, back.shape[1]).sum(0), None, None


class _DepartChoices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, indices: Tensor, plan: Plan, way: Way) -> Tensor:
        ctx.plan, ctx.way, ctx.chosen = plan, way, weights.shape[1]
        ctx.set_materialize_grads(False)
        # Experts are few enough to be exact in any dtype of gate values.
        return _scatter(torch.cat((weights, indices.to(weights.dtype)), 1), plan, way)

    @staticmethod
    def backward(ctx: Any, _: None) -> tuple[Tensor | None, ...]:
        plan, way = ctx.plan, ctx.way
        way.wait()
        back, way.gradient = way.gradient, None
        if plan.chosen is None:  # of experts that a rank doesn't hold it sent zeros
            return back.view(plan.group.size() - 1, -1, ctx.chosen).sum(0), None, None, None
        row = plan.chosen.row.clamp(max=plan.leaving)  # rows that stayed have their gradient elsewhere
        back = torch.cat((back, back.new_zeros(1, ctx.chosen)))
        return back[row, torch.arange(ctx.chosen, device=row.device)], None, None, None


class _Stay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, own: Tensor) -> Tensor:
        ctx.save_for_backward(own)
        ctx.tokens = x.shape[0]
        return _picked(x, own)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        (own,) = ctx.saved_tensors
        return dx.new_zeros(ctx.tokens, dx.shape[1]).index_copy_(0, own, dx), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, choices: Tensor, plan: Plan, way: Way, way_of_choices: Way
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.plan, ctx.way, ctx.way_of_choices = plan, way, way_of_choices
        way.wait()
        way_of_choices.wait()
        weights, indices = choices.chunk(2, 1)
        indices = indices.long()
        ctx.mark_non_differentiable(indices)
        # A block is computed again when something that it kept is asked for, up to the last thing it kept. Experts that
        # get no rows may keep nothing: so that their rank, too, takes part in the exchange again, this is kept here.
        ctx.save_for_backward(rows.new_empty(0))
        return rows.view_as(rows), weights.contiguous(), indices

    @staticmethod
    def backward(ctx: Any, dx_rows: Tensor, d_weights: Tensor, _: None) -> tuple[Tensor | None, ...]:
        plan, way, way_of_choices, _ = ctx.plan, ctx.way, ctx.way_of_choices, ctx.saved_tensors
        dx_rows, d_weights = dx_rows.contiguous(), d_weights.contiguous()
        # Gate values first: they are few, and the gate's own backward pass lies before the tokens are waited for.
        way_of_choices.gradient = d_weights.new_empty(plan.leaving, d_weights.shape[1])
        _gather(d_weights, way_of_choices.gradient, plan, way_of_choices)
        way.gradient = dx_rows.new_empty(plan.leaving, dx_rows.shape[1])
        _gather(dx_rows, way.gradient, plan, way)
        return dx_rows, None, None, None, None


class _GiveBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, plan: Plan, way: Way) -> Tensor:
        ctx.way = way
        y = y.contiguous()
        way.back = y.new_empty(plan.leaving, y.shape[1])
        _gather(y, way.back, plan, way)
        ctx.save_for_backward(y.new_empty(0))  # as in `_Arrive`: own rows may keep nothing
        return y.detach()  # FSDP2 warns of views that a module returns

    @staticmethod
    def backward(ctx: Any, dy_rows: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        ctx.way.wait()
        return dy_rows, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, own: Tensor, plus: Tensor | None, plan: Plan, way: Way) -> Tensor:
        ctx.plan, ctx.way = plan, way
        way.wait()
        back, way.back = way.back, None  # the way lasts until the backward pass
        assert back is not None
        # Kept so that a block that is computed again comes as far as this wait. What is on its way would be let go of
        # before it is there, and in a CUDA graph nobody else keeps it.
        ctx.save_for_backward(own.new_empty(0))
        return sum_rows((back, own), plan.place, plus)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dy, chosen = dy.contiguous(), ctx.plan.chosen
        sent = _scatter(dy, ctx.plan, ctx.way)
        own = dy if chosen is None else _picked(dy, chosen.stay)
        return sent, own, dy if ctx.needs_input_grad[2] else None, None, None
