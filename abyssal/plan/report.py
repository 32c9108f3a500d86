"""`abyssal plan`: what every rank of a run would hold, do and send, as tables."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from abyssal.config import ConfigError
from abyssal.costs import inspect
from abyssal.model.transformer import Transformer
from abyssal.parallel import MeshShape
from abyssal.plan.order import Order
from abyssal.plan.walk import Walk, walk
from abyssal.plan.work import Traffic
from abyssal.train.config import TrainConfig

GIB = 2**30
HIDDEN, EXPOSED = "all traffic hidden", "no traffic hidden"


@dataclass(frozen=True)
class Plan:
    """What was walked, and what follows from it."""

    model: str
    mesh: str
    gpus: int
    microbatches: int  # of a step, a reader
    tokens: int  # a step
    parameters: int  # of the whole model, MTP modules included
    walks: list[Walk]  # the first rank of the pipeline's stages that were walked
    order: Order | None
    seconds: dict[str, float]  # a step, with all traffic hidden behind work and with none
    mfu: dict[str, float]
    rates: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        plain = dataclasses.asdict(self)
        for one, found in zip(plain["walks"], self.walks):
            for key, sent in (("traffic", found.traffic), ("once", found.once)):
                one[key] = [{**t._asdict(), "bytes": n} for t, n in sent.items()]
        plain["order"] = None if self.order is None else {"bubble": self.order.bubble}
        return plain

    def render(self) -> Group:
        return Group(_memory(self), "", _traffic(self), "", _speed(self))


def plan(config: TrainConfig, stages: list[int] | None = None, say: Callable[[str], None] = lambda text: None) -> Plan:
    """Walks the first rank of the pipeline's `stages` (None: the first, the middle and the last).

    Raises ConfigError or ValueError as a run with this configuration would, and ConfigError for one not in bfloat16.
    """
    if config.dtype not in (None, "bfloat16"):
        raise ConfigError(f"dtype: a plan is of a run in bfloat16, got {config.dtype}")
    model = config.model_settings()
    shape = MeshShape.parse(config.mesh)
    chosen = sorted({0, shape.pp // 2, shape.pp - 1}) if stages is None else stages
    walks, order = [], None
    for stage in chosen:
        say(f"walking the first rank of pipeline stage {stage} of {shape.pp}")
        found, order = walk(config, model, stage)
        walks.append(found)
    microbatches = config.accumulate // shape.batches
    tokens = config.batch_tokens * config.accumulate
    rates = measured_rates()
    busiest = max(walks, key=lambda w: _work_seconds(w, rates))
    compute = _work_seconds(busiest, rates) * microbatches / (1 - (order.bubble if order else 0.0))
    update = busiest.numbers * 30 / rates["memory"]["rate"]  # masters, moments, gradient: read; all but it: written
    sent = _sent_seconds(busiest.traffic, rates) * microbatches + _sent_seconds(busiest.once, rates)
    seconds = {HIDDEN: max(compute, sent) + update, EXPOSED: compute + sent + update}
    flops = inspect(model, config.sequence).flops
    useful = (flops.training + flops.training_mtp) * tokens
    mfu = {how: useful / (s * shape.ranks * rates["peak"]["rate"]) for how, s in seconds.items()}
    with torch.device("meta"):
        numbers = sum(p.numel() for p in Transformer(model).parameters())
    return Plan(
        config.model, str(shape), shape.ranks, microbatches, tokens, numbers, walks, order, seconds, mfu, rates
    )  # fmt: skip


def memory_line(made: Plan, capacity: int) -> str:
    """What the fullest of the walked ranks will hold, in words, of a GPU with `capacity` bytes."""
    w = max(made.walks, key=lambda w: w.peak)
    parts = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in w.memory.items() if size)
    where = f" at place {w.stage} of the pipeline, the fullest" if made.order is not None else ""
    line = f"memory of a GPU{where}, GiB: {parts}; peak {w.peak / GIB:.1f} of {capacity / GIB:.1f}"
    return line if w.peak <= capacity else f"{line}, more than there is; recompute=OPERATIONS or a mesh holds less"


def measured_rates() -> dict[str, Any]:
    """What an H100 reaches, operation by operation, and where each figure is from."""
    text = resources.files("abyssal").joinpath("plan", "h100.json").read_text("utf-8")
    rates: dict[str, Any] = json.loads(text)
    return rates


def _work_seconds(w: Walk, rates: dict[str, Any]) -> float:
    products = sum(n / rates[kind]["rate"] for kind, n in w.flops.items())
    return products + w.passed / rates["memory"]["rate"]


def _sent_seconds(traffic: dict[Traffic, int], rates: dict[str, Any]) -> float:
    return sum(n / rates[t.link]["rate"] for t, n in traffic.items())


def _memory(p: Plan) -> Table:
    table = Table(title=f"{p.model} on {p.gpus:,} GPUs, {p.mesh}: GiB of a rank", title_justify="left")
    table.add_column("")
    for w in p.walks:
        table.add_column(f"place {w.stage}", justify="right")
    table.add_row("numbers owned, millions", *(f"{w.numbers / 1e6:,.1f}" for w in p.walks))
    for kind in p.walks[0].memory:
        table.add_row(kind, *(f"{w.memory[kind] / GIB:.2f}" for w in p.walks))
        if kind == "activations" and p.order is not None:
            each = [" and ".join(f"{size / GIB:.2f}" for size in w.kept.values()) for w in p.walks]
            table.add_row("  of a microbatch, by stage", *each, style="dim")
            table.add_row("  passes that wait", *(str(w.waiting) for w in p.walks), style="dim")
    table.add_row("peak", *(f"{w.peak / GIB:.2f}" for w in p.walks), style="bold")
    return table


def _traffic(p: Plan) -> Table:
    table = Table(title="GiB that a rank sends", title_justify="left")
    for name in ("", "over", "ranks", "each"):
        table.add_column(name)
    for w in p.walks:
        table.add_column(f"place {w.stage}", justify="right")
    for each, of in (("microbatch", [w.traffic for w in p.walks]), ("step", [w.once for w in p.walks])):
        for t in sorted({t for traffic in of for t in traffic}):
            table.add_row(t.what, t.link, str(t.ranks), each, *(f"{sent.get(t, 0) / GIB:.3f}" for sent in of))
    if not table.row_count:
        table.add_row("nothing", "", "", "", *("" for _ in p.walks))
    return table


def _speed(p: Plan) -> Group:
    table = Table(title=f"A step of {p.tokens:,} tokens", title_justify="left")
    for name in ("", HIDDEN, EXPOSED):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("seconds", *(f"{p.seconds[how]:.3f}" for how in (HIDDEN, EXPOSED)))
    table.add_row("tokens/s", *(f"{p.tokens / p.seconds[how]:,.0f}" for how in (HIDDEN, EXPOSED)))
    table.add_row("MFU", *(f"{p.mfu[how]:.1%}" for how in (HIDDEN, EXPOSED)))
    if p.order is not None:
        table.add_row("pipeline bubble", f"{p.order.bubble:.1%}", "")
    note = Text(
        "Walked on fake tensors through the code of a real run, routing balanced; speeds from rates of an H100 "
        "(abyssal/plan/h100.json says which are not measured). MFU counts the model's FLOPs, without recomputation.",
        style="dim",
    )
    return Group(table, note)
