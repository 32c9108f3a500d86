"""One rank of a run, walked through on nothing: its memory, its work, its traffic.

The model is built of fake tensors (shapes without values), the ranks are a fake process group, and what runs is the
code of a real run: `Spread` or `Alone`, `Optimizer`, the objective's forward and backward. Routing counts as balanced.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.fsdp import FSDPModule

from abyssal.config import ModelConfig
from abyssal.data import Batch
from abyssal.model.balance import Balance
from abyssal.model.objective import LossScales, Microbatch, Totals
from abyssal.model.transformer import Transformer
from abyssal.ops.device import assumed
from abyssal.parallel import Mesh, MeshShape, Spread
from abyssal.parallel.cut import cut
from abyssal.parallel.mesh import STAGE
from abyssal.plan.order import Order, order_of
from abyssal.plan.work import NODE, Traffic, Work
from abyssal.train.alone import Alone, spread_as
from abyssal.train.config import TrainConfig
from abyssal.train.optimizer import Optimizer

DEVICE = torch.device("cpu")  # of the fake tensors: torch's builds without CUDA cannot name another
HOPPER = (9, 0)


@dataclass
class Walk:
    """Of one rank. Bytes, and counts of a microbatch: forward and backward."""

    rank: int
    stage: int
    numbers: int = 0  # of the model that this rank owns
    memory: dict[str, int] = field(default_factory=dict)
    peak: int = 0
    activations: int = 0  # of all microbatches that wait for their backward pass, at most
    kept: dict[int, int] = field(default_factory=dict)  # of one, by the rank's stages
    waiting: int = 1  # at most: forward passes of the rank's stages whose backward pass is yet to come
    flops: dict[str, int] = field(default_factory=dict)
    passed: int = 0  # bytes of memory that operations other than products read and write
    traffic: dict[Traffic, int] = field(default_factory=dict)
    once: dict[Traffic, int] = field(default_factory=dict)  # a step, in a pipeline


def walk(config: TrainConfig, model: ModelConfig, stage: int) -> tuple[Walk, Order | None]:
    """The first rank of a pipeline stage (0 without a pipeline), and the schedule's order where there is one.

    Raises ConfigError or ValueError as a real run would.
    """
    shape = MeshShape.parse(config.mesh)
    rank = stage * (shape.ranks // shape.pp)
    lengths = _lengths(config)
    tokens = torch.zeros(config.batch_tokens, dtype=torch.int64)
    micro = Microbatch.of(Batch(tokens, lengths, torch.ones(config.batch_tokens)), model.num_nextn_predict_layers)
    context = sum(n * (n + 1) / 2 for n in lengths) / config.batch_tokens
    work = Work(context, model.n_routed_experts or 0)
    with _ranks(rank, shape.ranks, bool(config.mesh)):
        mesh = Mesh(shape, DEVICE.type) if config.mesh else None
        with torch.device("meta"):
            made = Transformer(model)
        if mesh is not None:
            micro = cut(micro, mesh)  # where there are values to cut by
        with FakeTensorMode(allow_non_fake_inputs=True), assumed(HOPPER):
            return _walk(config, made, micro, mesh, Walk(rank, stage), work)


def _walk(
    config: TrainConfig, model: Transformer, micro: Microbatch, mesh: Mesh | None, found: Walk, work: Work
) -> tuple[Walk, Order | None]:
    narrow = torch.bfloat16
    ghost(model, torch.float32 if mesh else narrow)
    spread = spread_as(config, model, mesh, DEVICE, narrow)
    kept = spread.parameters()
    optimizer = Optimizer(kept, config)
    balance = Balance(model.gates())
    found.numbers = sum(k.master.numel() for k in kept)
    # On one GPU AdamW reads the gradients of one microbatch as they are, in a pass that makes nothing (`ops/adamw.py`).
    held = mesh is None and config.optimizer == "adamw" and config.accumulate == 1
    scales = LossScales(config.mtp_weight, config.sequence_balance, config.auxiliary_balance)
    memory = MemTracker()
    memory.track_external(model, *optimizer.kept())
    if isinstance(spread, Spread) and spread.pipeline is not None:
        order: Order | None = _stages(found, spread, micro, scales, optimizer, balance, memory, work, config.reshard)
    else:
        order = None
        # The first step makes the optimizer's moments; the second is as all that follow.
        for again in (False, True):
            memory.reset_mod_stats()
            optimizer._taken.held = again and held
            collect = optimizer._taken.collect if again and held else optimizer.collect
            with memory:  # its peak is of what happens within
                before = total(memory)
                with work if again else nullcontext():
                    if isinstance(spread, Alone):
                        spread.run([micro], scales, collect, balance)
                    else:
                        spread.passes([micro], _totals(micro), scales, collect, balance)
                # Gradients come as activations go: the peak has next to none of them.
                found.activations = total(memory, "peak") - before
                found.kept = {0: found.activations}
                if not (again and held):
                    _step(spread, optimizer)
                found.peak = total(memory, "peak")
    found.memory = {
        "parameters, float32": sum(m.numel() * 4 for m in optimizer.masters),
        "parameters, bf16": 0 if mesh else found.numbers * 2,
        "gradients": found.numbers * (2 if held else 4),
        "moments": sum(
            t.numel() * t.element_size() for key, t in optimizer.state().items()
            if key.partition("/")[0] in ("exp_avg", "exp_avg_sq", "momentum_buffer")
        ),
        "activations": found.activations,
    } | found.memory  # fmt: skip
    found.flops, found.passed, found.traffic = dict(work.flops), sum(work.passed.values()), dict(work.traffic)
    return found, order


def _stages(
    found: Walk, spread: Spread, micro: Microbatch, scales: LossScales, optimizer: Optimizer, balance: Balance,
    memory: MemTracker, work: Work, reshard: bool,
) -> Order:  # fmt: skip
    """The rank's stages, one after the other, through two microbatches, and a step's end.

    As a schedule has it no backward pass sums gradients over the ranks: of all the rank's stages, each parameter's
    float32 sum is alive whole from the stage's first backward pass until the stage's last is done. What a rank holds at
    most is either that beside what waits and what a backward pass makes, or what the end needs: gradients are summed
    over the ranks block by block, each a copy beside its sum, and pieces of them appear as sums go. Beside either lie
    torch's buffers for what comes from neighbouring stages, one for each microbatch of a step, which it keeps.
    """
    pipeline = spread.pipeline
    assert pipeline is not None
    totals, local = _totals(micro), micro.to(DEVICE)
    place = spread.mesh.place("pp")
    scheduled = pipeline._scheduled(local)
    order = order_of(scheduled, pipeline.schedule, spread.mesh.shape.pp, pipeline.microbatches, pipeline.halves)
    split = any(kind == "W" for _, kind, _ in order.parts[place])
    width, before = spread.model.config.hidden_size, total(memory)
    transient = gathered = sums = received = 0
    crossing = local.tokens.shape[0] * width * 2  # a microbatch from stage to stage
    once = Work(work.context, work.experts)
    for s, stage in zip(pipeline.own, pipeline.stages):
        stage.begin([local], totals, scales)
        x = torch.empty(local.tokens.shape[0], width, dtype=torch.bfloat16, device=DEVICE)
        with memory:
            x = x.detach()  # is seen, so that it isn't counted as kept
        start = total(memory)
        # A step's first pass gathers parameters, and its end adds gradients up; what is between does neither.
        with memory, once:
            first = stage(x.detach().requires_grad_(s > 0))
        between = total(memory)
        memory.reset_mod_stats()
        counted = work.traffic.copy()
        with memory, work:
            second = stage(x.detach().requires_grad_(s > 0))
        # Blocks that are dropped are gathered once a microbatch: a forward pass finds what a backward pass left.
        work.traffic = Counter({t: n if t.what != "all-gather" else counted[t] for t, n in work.traffic.items()})
        grown = total(memory) - between
        # What comes out stays till the backward pass; a stage of the same rank has it as its buffer.
        found.kept[s] = grown - (crossing if s + 1 in pipeline.own else 0)
        received += pipeline.microbatches * crossing * ((s > 0) + (s + 1 < pipeline.count))
        gathered += between - start - grown
        with memory:
            _backward(stage, first)
            del first
            if reshard and pipeline.reshards:  # by the forward pass that comes next
                for block in (m for m in stage.modules() if m is not stage and isinstance(m, FSDPModule)):
                    block.reshard()
        made = total(memory)
        sums += made - between  # the second is there instead of the first
        with memory, work:
            _backward(stage, second)
            del second
        transient = max(transient, total(memory, "peak") - made)
        if split:  # a half makes the gradients of all of a stage's weights, as wide as these, before it adds them up
            transient = max(transient, between - start - grown)
        for neighbour in (s + 1 if s + 1 < pipeline.count else None, s - 1 if s else None):
            if neighbour is not None and neighbour not in pipeline.own:
                far = spread.mesh.size(*STAGE) >= NODE
                sent = Traffic("send", "InfiniBand" if far else "NVLink", 2)
                work.traffic[sent] += crossing
        del x
        stage.end()
    ends = scheduled._stages if hasattr(scheduled, "_stages") else [scheduled._stage]
    with memory:
        with once:
            for end in ends:
                end.perform_reduce_grad(1)
        ending = total(memory, "peak")
        optimizer.collect()
        _step(spread, optimizer)
        stepped = total(memory, "peak")
    for t, size in once.traffic.items():
        if t.what in ("all-gather", "reduce-scatter"):
            found.once[t] = size
    found.waiting, found.activations = order.waiting(place), order.held(place, found.kept)
    moments = total(memory) - before  # what a step leaves behind, which lies there in all that follow
    during = before + gathered + sums + found.activations + transient
    found.peak = received + max(moments + max(during, ending), stepped)
    found.memory = {"parameters, bf16": gathered, "gradients": sums, "received": received}
    return order


def _backward(stage: nn.Module, y: Tensor) -> None:
    """As the pipeline's stages have it: gradients are added up, and not over the ranks."""
    sharded: Any = stage
    sharded.set_is_last_backward(False)
    sharded.set_reshard_after_backward(False)
    sharded.set_requires_gradient_sync(False)
    y.backward(None if y.ndim == 0 else torch.empty_like(y))


def _step(spread: Alone | Spread, optimizer: Optimizer) -> None:
    norms = spread.norms(optimizer.squares())
    optimizer.update(1e-3, norms[-1], torch.tensor(0.0))  # whose value is known: Muon asks for it


def ghost(model: Transformer, dtype: torch.dtype) -> None:
    """Gives a model on the meta device fake tensors instead."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                made.setdefault(id(p), nn.Parameter(torch.empty(p.shape, dtype=dtype, device=DEVICE)))
                module._parameters[name] = made[id(p)]
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device=DEVICE)


def total(memory: MemTracker, which: str = "current") -> int:
    """Bytes that are held, or were at most."""
    snapshot: Any = memory.get_tracker_snapshot(which)
    return sum(int(kinds["Total"]) for kinds in snapshot.values())


def _totals(micro: Microbatch) -> Totals:
    """Fake ones."""
    depths = len(micro.targets)
    return Totals(torch.empty(()), torch.empty(depths), torch.empty(depths))


def _lengths(config: TrainConfig) -> list[int]:
    """Documents as long as they may be."""
    full, rest = divmod(config.batch_tokens, config.sequence)
    return [config.sequence] * full + ([rest] if rest else [])


@contextmanager
def _ranks(rank: int, ranks: int, wanted: bool) -> Iterator[None]:
    """A process group of ranks that aren't there."""
    if not wanted:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
