"""Training of the 961M shape on one GPU and on several, at the same batch a GPU: tokens/s, memory, what overlaps.

    python benchmarks/two_gpus.py [--meshes alone dp=2 ep=2] [--trace FILE.json.gz] [--json FILE] [--eager]

Each mesh is a run by itself, under torchrun where it has several ranks. A step is Spread.run (or Alone's) and the
optimizer's update, over a microbatch of 16 x 2048 random tokens a GPU. Before it is timed the routers' biases are
settled, by steps with a fast bias update: random routers favour some experts far more than trained ones do. With
--trace one more step of each mesh runs under torch.profiler on rank 0; its trace goes to FILE with the mesh in its
name, and of each kind of NCCL kernel is told how much of its time other kernels ran beside it. Without a GPU it runs
on the CPU, which only shows that it runs.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from abyssal.bench.machine import device_name, versions
from abyssal.config import ModelConfig
from abyssal.data import Batch
from abyssal.model.balance import Balance, max_violation
from abyssal.model.objective import LossScales, Microbatch
from abyssal.model.transformer import Transformer
from abyssal.parallel import Mesh, MeshShape
from abyssal.parallel.accord import Accord
from abyssal.parallel.mesh import start
from abyssal.parallel.replay import Replay, own_stream
from abyssal.train.alone import spread_as
from abyssal.train.config import TrainConfig
from abyssal.train.optimizer import Optimizer

Interval = tuple[float, float]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTLE = 20  # steps; their bias updates go from FAST down to the usual 0.001
FAST, USUAL = 0.03, 0.001


class Run:
    """A model, its optimizer and its batches, alone or spread over the ranks that torchrun started."""

    def __init__(self, wanted: argparse.Namespace) -> None:
        shape = MeshShape.parse("" if wanted.mesh == "alone" else wanted.mesh)
        device = DEVICE
        config = TrainConfig.of(
            {"model": wanted.model, "out": "unused", "steps": 1, "batch_tokens": wanted.sequences * wanted.length,
             "sequence": wanted.length, "accumulate": shape.batches, "reshard": not wanted.keep,
             "mesh": "" if wanted.mesh == "alone" else wanted.mesh, "recompute": wanted.recompute}
        )  # fmt: skip
        device = start(device) if config.mesh else device
        graphs = wanted.graphs and device.type == "cuda"
        if graphs:
            own_stream(device)
        mesh = Mesh(shape, device.type) if config.mesh else None
        self.spread = spread_as(config, drawn(config.model_settings(), device), mesh, device, torch.bfloat16)
        self.optimizer = Optimizer(self.spread.parameters(), config)
        if graphs:
            self.spread.replay = Replay(self.optimizer.snapshot, Accord(bool(config.mesh)).most)
        model = self.spread.model
        self.balance = Balance(model.gates())
        self.first = not dist.is_initialized() or dist.get_rank() == 0
        self.tokens = config.batch_tokens * shape.batches
        self.scales = LossScales(0.3, 0.0001)
        self.stopped = torch.zeros((), device=device)
        generator = torch.Generator().manual_seed(self.spread.reader[0])
        lengths = [wanted.length] * wanted.sequences
        self.batches = [
            Microbatch.of(
                Batch(torch.randint(model.config.vocab_size, (sum(lengths),), generator=generator), lengths,
                      torch.ones(sum(lengths))), len(model.mtp),
            ) for _ in range(4)
        ]  # fmt: skip
        self.number = 0

    def step(self, speed: float = USUAL) -> tuple[Tensor, Tensor]:
        """As `Trainer.step`: the losses' sums, and the loads of the gates' experts."""
        sums = self.spread.run(
            [self.batches[self.number % len(self.batches)]], self.scales, self.optimizer.collect, self.balance
        )
        norms = self.spread.norms(self.optimizer.squares())
        self.optimizer.update(1e-4, norms[-1], self.stopped)
        self.spread.add_up(self.balance.counts)
        counts = self.balance.counts.clone()
        self.balance.update(torch.full((), speed, device=counts.device))
        self.number += 1
        return sums, counts


def drawn(settings: ModelConfig, device: torch.device) -> Transformer:
    """Weights of one seed, drawn on the GPU: alike on ranks that have the same kind."""
    with device:
        model = Transformer(settings)
    return model.init_weights(torch.Generator(device).manual_seed(0))


def measure(wanted: argparse.Namespace) -> None:
    """One mesh, as one of its ranks; the first prints a line of JSON."""
    run = Run(wanted)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # before passes are captured: a replay allocates nothing
    loads = [run.step(FAST + (USUAL - FAST) * i / SETTLE)[1] for i in range(SETTLE)]
    for _ in range(wanted.warm):
        first, _ = run.step()
    together()
    begun = time.perf_counter()
    for _ in range(wanted.steps):
        sums, counts = run.step()
    issued = time.perf_counter() - begun
    together()
    seconds = (time.perf_counter() - begun) / wanted.steps
    peak = torch.tensor(torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else 0.0, device=DEVICE)
    if dist.is_initialized():
        dist.all_reduce(peak, dist.ReduceOp.MAX)
    overlaps: list[dict[str, Any]] = []
    if wanted.trace:
        overlaps = traced(run, run.step, wanted)
    if run.first:
        found = {
            "mesh": wanted.mesh, "gpus": dist.get_world_size() if dist.is_initialized() else 1,
            "tokens_per_second": run.tokens / seconds, "step_ms": seconds * 1e3,
            "host_ms": issued / wanted.steps * 1e3, "peak_GiB": float(peak), "loss": [float(first[0]), float(sums[0])],
            "max_violation": [float(max_violation(c).mean()) for c in (loads[0], counts)], "overlap": overlaps,
        }  # fmt: skip
        print(RESULT + json.dumps(found), flush=True)
    if run.spread.replay is not None:
        run.spread.replay.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


RESULT = "result: "


def together() -> None:
    """Returns when all ranks' devices have done what they were told."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def traced(run: Run, step: Callable[[], Any], wanted: argparse.Namespace) -> list[dict[str, Any]]:
    """One step under the profiler on the first rank."""
    if not run.first:
        step()
        together()
        return []
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CUDA, kinds.CPU]) as profile:
        step()
        together()
    path = Path(wanted.trace)
    name = path.name.split(".", 1)[0] + "-" + wanted.mesh.replace("=", "").replace(",", "-")
    file = path.with_name(f"{name}.json.gz")
    profile.export_chrome_trace(str(file))
    return overlap(file)


def overlap(file: Path) -> list[dict[str, Any]]:
    """Of each kind of NCCL kernel in a trace: how many, how long in all, and how long other kernels ran meanwhile, in
    milliseconds. A kernel that waits for another rank counts as running."""
    with gzip.open(file, "rt") as f:
        events = json.load(f)["traceEvents"]
    kernels = [(e["name"], (e["ts"], e["ts"] + e["dur"])) for e in events if e.get("cat") == "kernel"]
    others = union(span for name, span in kernels if "nccl" not in name.lower())
    kinds: dict[str, list[Interval]] = {}
    for name, span in kernels:
        if "nccl" in name.lower():
            kind = name.split("(")[0].removeprefix("ncclDevKernel_").removeprefix("ncclKernel_")
            kinds.setdefault("all-to-all" if kind.startswith("SendRecv") else kind, []).append(span)
    return [
        {"kind": kind, "kernels": len(spans), "ms": sum(b - a for a, b in spans) / 1e3,
         "beside_others_ms": sum(b - a for a, b in spans for a, b in within(a, b, others)) / 1e3}
        for kind, spans in sorted(kinds.items())
    ]  # fmt: skip


def union(spans: Iterable[Interval]) -> list[Interval]:
    """The same time in intervals that don't touch, in order."""
    joined: list[Interval] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return joined


def within(start: float, end: float, spans: Iterable[Interval]) -> list[Interval]:
    """What of `spans` lies between `start` and `end`."""
    return [(max(a, start), min(b, end)) for a, b in spans if a < end and b > start]


def launch(mesh: str, arguments: list[str]) -> dict[str, Any]:
    """The result of a mesh's own run, whose output is passed on. Raises RuntimeError if it has none."""
    ranks = 1 if mesh == "alone" else MeshShape.parse(mesh).ranks
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *torchrun, __file__, "--mesh", mesh, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "4"})
    assert process.stdout is not None
    found = None
    for line in process.stdout:
        if line.startswith(RESULT):
            found = json.loads(line.removeprefix(RESULT))
        else:
            print(line, end="", flush=True)
    if process.wait() or found is None:
        raise RuntimeError(f"mesh {mesh}: ended with {process.returncode}")
    return dict(found)


def tell(found: dict[str, Any], base: float | None) -> None:
    rate = found["tokens_per_second"]
    ratio = f"{rate / base:5.2f}x" if base else "     -"
    loss, violation = ([f"{x:.3f}" for x in found[key]] for key in ("loss", "max_violation"))
    print(f"{found['mesh']:12} {found['gpus']} GPU  {rate:9.0f} tokens/s {ratio}  {found['step_ms']:7.2f} ms a step "
          f"(host {found['host_ms']:.1f})  peak {found['peak_GiB']:5.2f} GiB  loss {' -> '.join(loss)}  "
          f"MaxVio {' -> '.join(violation)}")  # fmt: skip
    for kind in found["overlap"]:
        share = kind["beside_others_ms"] / kind["ms"] if kind["ms"] else 0.0
        print(f"    {kind['kernels']:4} x {kind['kind']:28} {kind['ms']:8.2f} ms, of which beside other kernels "
              f"{kind['beside_others_ms']:8.2f} ms ({share:.0%})", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meshes", nargs="+", default=["alone", "dp=2", "ep=2"])
    parser.add_argument("--mesh", help=argparse.SUPPRESS)  # set in the runs that this one starts
    parser.add_argument("--model", default="reference-961m")
    parser.add_argument("--sequences", type=int, default=16, help="of a GPU's microbatch")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="parameters stay gathered between forward and backward")
    parser.add_argument("--eager", dest="graphs", action="store_false", help="without CUDA graphs")
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--trace", metavar="FILE.json.gz")
    parser.add_argument("--json", type=Path, metavar="FILE")
    wanted = parser.parse_args()
    if wanted.mesh:
        measure(wanted)
        return
    keys = ("model", "sequences", "length", "steps", "warm", "recompute")
    passed = [f"--{key}={getattr(wanted, key)}" for key in keys]
    passed += ["--keep"] if wanted.keep else []
    passed += [] if wanted.graphs else ["--eager"]
    passed += [f"--trace={wanted.trace}"] if wanted.trace else []
    machine = {"device": device_name(DEVICE), **versions(DEVICE.type == "cuda")}
    if DEVICE.type == "cuda":
        machine["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    results: list[dict[str, Any]] = []
    for mesh in wanted.meshes:
        results.append(launch(mesh, passed))
        base = next((r["tokens_per_second"] for r in results if r["mesh"] == "alone"), None)
        tell(results[-1], base)
    if wanted.json:
        wanted.json.write_text(json.dumps({"machine": machine, "runs": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
