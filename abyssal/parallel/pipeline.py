"""Pipeline parallel: a model's blocks over `pp` ranks, its microbatches through them by one of torch's schedules.

With "gpipe" and "1f1b" a rank has one stage. With the others it has two: "interleaved" deals them out in a loop, "zbv"
and "dualpipev" in a V, whose ends lie on the same rank; these two split the backward pass, and compute the gradients of
weights where they would wait otherwise.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)
from torch.distributed.tensor import DTensor

from abyssal.config import ModelConfig
from abyssal.model.balance import Balance, Whole
from abyssal.model.experts import Gate
from abyssal.model.objective import LossScales, Measured, Microbatch, Totals
from abyssal.model.transformer import Transformer
from abyssal.parallel.halves import input_half, weight_half
from abyssal.parallel.mesh import Mesh
from abyssal.parallel.shard import drop_gathered, widen
from abyssal.parallel.stage import Elsewhere, Stage

SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble, "dualpipev": ScheduleDualPipeV,
}  # fmt: skip
ONE_A_RANK = ("gpipe", "1f1b")
HEAD = 1  # what the head and its loss cost, in layers


def check(config: ModelConfig, ranks: int, schedule: str, microbatches: int) -> None:
    """Raises ValueError saying what the schedule needs more of. `microbatches` of a step, a data rank."""
    stages = stage_count(ranks, schedule)
    if config.num_hidden_layers < stages:
        raise ValueError(
            f"mesh pp={ranks}: schedule {schedule}: num_hidden_layers: expected {stages} or more, a stage each, got "
            f"{config.num_hidden_layers}"
        )
    need = {"1f1b": ranks, "dualpipev": stages}.get(schedule, 1)
    if microbatches < need:
        raise ValueError(
            f"mesh pp={ranks}: schedule {schedule}: expected {need} microbatches of a step or more, got {microbatches} "
            f"(accumulate / (dp·ep))"
        )
    rounds = max(1, microbatches // ranks)
    if schedule == "interleaved" and microbatches % rounds:
        raise ValueError(
            f"mesh pp={ranks}: schedule {schedule}: expected a multiple of {ranks} microbatches of a step, got "
            f"{microbatches} (accumulate / (dp·ep))"
        )


def stage_count(ranks: int, schedule: str) -> int:
    return ranks if schedule in ONE_A_RANK else 2 * ranks


def stages_of(rank: int, ranks: int, schedule: str) -> list[int]:
    """The stages of a rank, in ascending order."""
    if schedule in ONE_A_RANK:
        return [rank]
    return [rank, rank + ranks] if schedule == "interleaved" else [rank, 2 * ranks - 1 - rank]


def layers_of(config: ModelConfig, stages: int) -> list[range]:
    """The layers of every stage: about as much work for each. The last has the MTP modules, a layer each, and the head,
    and so fewer layers, but one at least."""
    layers, after = config.num_hidden_layers, config.num_nextn_predict_layers + HEAD
    last = max(1, min((layers + after) // stages - after, layers - (stages - 1)))
    least, more = divmod(layers - last, stages - 1)
    # The first stages hold most microbatches at a time: what is left over goes to the later ones.
    sizes = [least + (s >= stages - 1 - more) for s in range(stages - 1)] + [last]
    ends = [sum(sizes[: s + 1]) for s in range(stages)]
    return [range(end - size, end) for size, end in zip(sizes, ends)]


class Pipeline:
    """This rank's stages of a model, and a step's passes through all ranks'."""

    def __init__(
        self, model: Transformer, mesh: Mesh, dtype: torch.dtype, schedule: str, microbatches: int, halves: bool
    ) -> None:
        """Takes out of a whole model what other ranks have. `dtype`: what it computes in; without `halves` no backward
        pass is split: blocks that are recomputed or compiled would do all of it twice. Raises ValueError as `check`
        does."""
        check(model.config, mesh.shape.pp, schedule, microbatches)
        self.model, self.mesh, self.dtype = model, mesh, dtype
        self.schedule, self.microbatches, self.halves = schedule, microbatches, halves
        self.count = stage_count(mesh.shape.pp, schedule)
        self.own = stages_of(mesh.place("pp"), mesh.shape.pp, schedule)
        self.layers = layers_of(model.config, self.count)
        self.group = mesh.group("pp")
        self.stages: list[Stage] = []
        self._schedule: Any = None
        self._own_rows: Tensor | None = None
        blocks = [*model.layers, *(module.block for module in model.mtp)]
        routed = [b for b, block in enumerate(blocks) if any(isinstance(m, Gate) for m in block.modules())]
        layers = {l for s in self.own for l in self.layers[s]}
        mine = layers | (set(range(len(model.layers), len(blocks))) if self.has_last else set())
        self.gates, self.own_gates = len(routed), [g for g, b in enumerate(routed) if b in mine]
        self.main_gates = sum(b < len(model.layers) for b in routed)
        model.layers = nn.ModuleList(block if l in layers else Elsewhere() for l, block in enumerate(model.layers))
        if not self.has_last:
            model.mtp = nn.ModuleList(Elsewhere() for _ in model.mtp)
            model.norm, model.head = cast(Any, Elsewhere()), cast(Any, Elsewhere())
        copies = model.config.tie_word_embeddings or len(model.mtp) > 0
        if not (self.has_first or (self.has_last and copies)):
            model.embed = cast(Any, Elsewhere())

    @property
    def has_first(self) -> bool:
        return 0 in self.own

    @property
    def has_last(self) -> bool:
        return self.count - 1 in self.own

    @property
    def reshards(self) -> bool:
        """Whether a block's parameters may be dropped between its forward and its backward. Schedules of several stages
        a rank gather and drop a whole stage's, at times of their own."""
        return self.schedule in ONE_A_RANK

    def build(self, whole: Whole) -> list[Stage]:
        """The stages, each to be sharded by itself, once the model's blocks are what they will be."""
        for s in self.own:
            self.stages.append(Stage(self.model, self.layers[s], s == 0, s == self.count - 1, whole))
        if self.has_last:
            # Where the rank has the first stage too, `model.embed` is that one's.
            last = self.stages[-1].model
            self.model.head = last.head
            if not self.has_first:
                self.model.embed = last.embed
        return self.stages

    def copies(self) -> set[nn.Parameter]:
        """Parameters whose owner is another stage."""
        return {p for stage in self.stages if stage.copied for p in stage.model.embed.parameters()}

    def run(self, micros: Sequence[Microbatch], totals: Totals, scales: LossScales, balance: Balance) -> Tensor:
        """Forward and backward over the microbatches, on the device. The sums of the losses of this rank's stages,
        `[3 + modules]`."""
        self._refresh()
        for stage in self.stages:
            stage.begin(micros, totals, scales)
        schedule = self._scheduled(micros[0])
        device = micros[0].tokens.device
        rows = torch.zeros(self.microbatches, 1, device=device)
        inputs = (rows,) if self.has_first else ()
        schedule.step(*inputs, target=rows if self.has_last else None, return_outputs=False)
        self._add_up_copies()
        found = [stage.end() for stage in self.stages]
        if balance.gates:
            balance.counts += torch.cat([counts for _, counts in found])
        return torch.stack([sums for sums, _ in found]).sum(0)

    @torch.no_grad()
    def measure(self, micro: Microbatch) -> Measured:
        """Forward through all stages: of this rank's tokens, the same on every rank of `pp`."""
        self._refresh()
        config, device = self.model.config, micro.tokens.device
        nats = torch.zeros((), dtype=torch.float64, device=device)
        counts = torch.zeros(self.main_gates, config.n_routed_experts or 1, dtype=torch.int64, device=device)
        hits = torch.zeros(len(micro.targets) - 1, 4, dtype=torch.int64, device=device)
        found = []
        x = torch.empty(micro.tokens.shape[0], config.hidden_size, dtype=self.dtype, device=device)
        for s, stage in zip(self.own, self.stages):
            if s > 0 and s - 1 not in self.own:
                dist.recv(x, group=self.group, group_src=self._rank_of(s - 1))
            y, seen, guessed = stage.measure(x, micro)
            found.append(seen)
            if guessed is not None:
                nats += y
                hits += guessed
            elif s + 1 in self.own:
                x = y
            else:
                dist.send(y, group=self.group, group_dst=self._rank_of(s + 1))
        counts[[g for g in self.own_gates if g < self.main_gates]] = torch.cat(found)
        for stage in self.stages:
            drop_gathered(stage)
        dist.all_reduce(nats, group=self.group)
        for sums in (counts, hits):
            dist.all_reduce(sums, group=self.group)
        return Measured(nats, counts, hits)

    def of_all_gates(self, values: Tensor) -> Tensor:
        """A number of each of this rank's gates -> of all gates, in the whole model's order."""
        every = torch.zeros(self.gates, dtype=values.dtype, device=values.device)
        if self._own_rows is None:
            self._own_rows = torch.tensor(self.own_gates, dtype=torch.int64, device=values.device)
        every.index_copy_(0, self._own_rows, values)
        if self.gates:
            dist.all_reduce(every, group=self.group)
        return every

    def _scheduled(self, micro: Microbatch) -> Any:
        """The schedule, made for microbatches of this one's size: all are of the same."""
        if self._schedule is None:
            size = micro.tokens.shape[0], self.model.config.hidden_size
            device, wide = micro.tokens.device, torch.promote_types(self.dtype, torch.float32)
            state = torch.empty(size, dtype=self.dtype, device="meta", requires_grad=True)
            start = torch.empty(1, 1, device="meta")
            loss = torch.empty((), dtype=wide, device="meta", requires_grad=True)
            stages = []
            for s, stage in zip(self.own, self.stages):
                given, made = start if s == 0 else state, loss if s == self.count - 1 else state
                stages.append(_Torch(stage, s, self.count, device, given, made, group=self.group))
                stages[-1].halves = self.halves
            what = stages[0] if self.schedule in ONE_A_RANK else stages
            # NCCL connects the ranks at the first call that all of them make; a schedule's first may be a few ranks'.
            dist.all_reduce(torch.zeros(1, device=device), group=self.group)
            # The losses add up over the step as they are.
            self._schedule = SCHEDULES[self.schedule](what, self.microbatches, loss_fn=_itself, scale_grads=False)
        return self._schedule

    def _rank_of(self, stage: int) -> int:
        ranks = range(self.mesh.shape.pp)
        return next(r for r in ranks if stage in stages_of(r, len(ranks), self.schedule))

    @torch.no_grad()
    def _refresh(self) -> None:
        """Brings the last stage's copy of the embedding up to date."""
        own, copied = self._embeddings()
        if own is not None and copied is not None:
            copied.to_local().copy_(own.to_local())
        elif own is not None:
            dist.send(own.to_local().contiguous(), group=self.group, group_dst=self._rank_of(self.count - 1))
        elif copied is not None:
            dist.recv(copied.to_local(), group=self.group, group_src=0)

    @torch.no_grad()
    def _add_up_copies(self) -> None:
        """Adds the gradient of the last stage's copy of the embedding to its owner's."""
        own, copied = self._embeddings()
        if copied is not None:
            gradient = cast(DTensor, copied.grad).to_local()
            copied.grad = None
            if own is None:
                dist.send(gradient.contiguous(), group=self.group, group_dst=0)
        if own is not None:
            total = cast(DTensor, own.grad).to_local()
            if copied is None:
                gradient = torch.empty_like(total)
                dist.recv(gradient, group=self.group, group_src=self._rank_of(self.count - 1))
            total += gradient

    def _embeddings(self) -> tuple[DTensor | None, DTensor | None]:
        """This rank's piece of the embedding and its piece of the last stage's copy, where it has them and there is a
        copy. Both are divided alike over the ranks of their stages."""
        if not (self.model.config.tie_word_embeddings or len(self.model.mtp) > 0):
            return None, None
        own = cast(DTensor, self.stages[0].model.embed.weight) if self.has_first else None
        copied = cast(DTensor, self.stages[-1].model.embed.weight) if self.has_last else None
        return own, copied


class _Torch(PipelineStage):
    """A stage as the schedules know it."""

    halves = True

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """Of torch before 2.13, which greets the other stages. In a V one is on the same rank: gloo cannot."""
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]

    def forward_one_chunk(
        self, fwd_chunk_id: int, args: Any, kwargs: Any = None, save_forward_output: bool = True
    ) -> Any:
        cast(Stage, self.submod).number = fwd_chunk_id
        return super().forward_one_chunk(fwd_chunk_id, args, kwargs, save_forward_output)

    def backward_maybe_with_nosync(self, backward_type: str, bwd_kwargs: Any, last_backward: bool = False) -> Any:
        """A whole backward pass as torch has it; its halves are this package's."""
        if backward_type == "full":
            return super().backward_maybe_with_nosync("full", bwd_kwargs, last_backward)
        if backward_type == "input" and not self.halves:
            (output,) = bwd_kwargs["stage_output"]
            one = bwd_kwargs | {"stage_output": output if self.is_last else (output,)}
            return super().backward_maybe_with_nosync("full", one, last_backward)
        stage = cast(Any, self.submod)
        stage.set_is_last_backward(False)
        stage.set_reshard_after_backward(False)
        stage.set_requires_gradient_sync(False)
        branches = bwd_kwargs.get("param_groups")
        gradients: tuple[Tensor | None, ...] = ()
        if backward_type == "input":
            gradients, branches = input_half(
                bwd_kwargs["stage_output"], bwd_kwargs["output_grads"], bwd_kwargs["input_values"], stage.parameters()
            )
        elif branches is not None:
            weight_half(branches)
        widen(stage)
        return gradients, branches


def _itself(loss: Tensor, target: Tensor) -> Tensor:
    return loss
