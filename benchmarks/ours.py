"""abyssal's worker: one job of `cpu.py`, through the engine's Runner and the trainer's own losses and optimizer."""

import time
from collections.abc import Sequence
from pathlib import Path

import measure
import numpy as np
import torch
from measure import Job

import abyssal
from abyssal.costs import cache_bytes
from abyssal.data import Batch
from abyssal.engine.compiled import can_compile
from abyssal.engine.decode import Kind
from abyssal.engine.prefill import Chunk
from abyssal.engine.runner import PAGE, Lap, Runner
from abyssal.model.balance import Balance
from abyssal.model.objective import LossScales, Microbatch
from abyssal.model.packing import Packing
from abyssal.model.transformer import Transformer
from abyssal.train.alone import Alone
from abyssal.train.config import TrainConfig
from abyssal.train.optimizer import Optimizer

CHUNK = 2048  # tokens of a prompt taken at once: what `LLM` takes on a CPU


class Engine:
    """The engine's Runner with a slot for each sequence of a job, on pages that follow each other, as it gives them
    on a CPU; and its compiled step where there is a compiler."""

    def __init__(self, model: Transformer, job: Job) -> None:
        model.eval().requires_grad_(False)
        self.job, self.each = job, -(-(job.context + job.steps + 2) // PAGE)
        self.compiled = job.variant.get("compiled", True) and can_compile(model.embed.weight.device)
        self.runner = Runner(
            model, pages=1 + job.batch * self.each, running=job.batch, context=job.context + job.steps, drafts=0,
            compiled=self.compiled,
        )  # fmt: skip
        self.slots = self.runner.slots
        self.slots.write_tables([(s, i, page) for s in range(job.batch) for i, page in enumerate(self.pages(s))])

    def pages(self, slot: int) -> range:
        return range(1 + slot * self.each, 1 + (slot + 1) * self.each)

    def prompt(self, tokens: Sequence[int]) -> None:
        """All tokens but the last into slot 0, as the engine takes a prompt: the last is the first that is decoded."""
        for start in range(0, len(tokens) - 1, CHUNK):
            end = min(start + CHUNK, len(tokens) - 1)
            self.runner.chunks([Chunk(0, tokens, self.pages(0), start, end, 0)], Lap(self.runner.device))

    def fill(self) -> list[int]:
        """A prompt of `context` tokens, all but its last, into every slot: what each would hold had it been given the
        same. Returns the last, once a sequence: what step -1 takes."""
        tokens = measure.prompt(self.job)
        self.prompt(tokens)
        pairs = [pair for s in range(1, self.job.batch) for pair in zip(self.pages(0), self.pages(s))]
        self.runner.copy_pages(pairs)
        return tokens[-1:] * self.job.batch

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int], before: int) -> torch.Tensor:
        """`[S, vocab]` after one token more of each sequence, `before` of which stand in the cache: the main part of a
        step."""
        start = torch.full((len(tokens),), before)
        packing = self.runner.decoder.placed(self.slots.tables[: len(tokens)], start, 1)
        return self.runner.decoder.main(torch.tensor(tokens), packing)[1]

    @torch.inference_mode()
    def step(self, i: int, tokens: Sequence[int]) -> list[int]:
        """One decoding step of the sequences that are given a token, and the greedy choice after it: all that the
        engine does, but for what it would feed itself."""
        size = len(tokens)
        self.slots.known[:size] = self.job.context + i + 1
        self.slots.last[:size, 0] = torch.tensor(tokens)
        pending = self.runner.step(range(size), Kind(size, 1, 0), Lap(self.runner.device))
        return [result.token for result in pending.read()]


def decode(job: Job, model: Transformer) -> None:
    run = Engine(model, job)
    last = run.fill()
    start = time.perf_counter()
    run.step(-1, last)
    first = time.perf_counter() - start
    rates = measure.decode_rates(run.step, lambda: None, job)  # a step overwrites the rows of the pass before
    measure.report({"rates": rates, "first_step_seconds": first, "compiled": run.compiled})


def prefill(job: Job, model: Transformer) -> None:
    run, tokens = Engine(model, job), measure.prompt(job)

    def call() -> None:
        run.prompt(tokens)
        run.step(-1, tokens[-1:])

    measure.report({"rates": measure.call_rates(call, job.context, job)})


def logits(job: Job, model: Transformer) -> None:
    """After a prompt, and of every sequence after each decoding step, by the path that is timed."""
    run = Engine(model, job)
    rows = [run.logits(run.fill(), job.context - 1)[:1]]
    for i, tokens in enumerate(measure.step_tokens(job)):
        rows.append(run.logits(tokens, job.context + i))
    np.save(job.out, torch.cat(rows).float().numpy())
    measure.report({"compiled": run.compiled})


@torch.inference_mode()
def routing(job: Job, model: Transformer) -> None:
    """How tokens spread over experts: of all layers, the busiest expert's share against an even one, the share of
    experts that a prompt uses, and how many of a layer's a step of 8 tokens meets."""
    tokens = torch.tensor(measure.prompt(job))
    busiest, used, step, chosen = [], [], [], 0.0
    for found in model.hidden(tokens, Packing.of([len(tokens)], tokens)).routings:
        experts = found.scores.shape[1]
        counts = found.indices.flatten().bincount(minlength=experts)
        busiest.append(float(counts.max() / counts.float().mean()))
        used.append(float((counts > 0).float().mean()))
        step += [len(rows.unique()) / experts for rows in found.indices.split(8)]
        chosen = found.indices.shape[1] / experts
    by_8 = sum(step) / len(step)
    measure.report({"busiest": max(busiest), "used": min(used), "used_by_1_token": chosen, "used_by_8_tokens": by_8})


def train(job: Job, model: Transformer) -> None:
    """Forward, backward, the gradient's norm and clipping, and AdamW, of one packed batch."""
    settings = TrainConfig(model=job.model, out=Path("."), steps=100, sequence_balance=0.0)
    alone = Alone(model, settings, torch.device("cpu"), getattr(torch, job.dtype))
    optimizer, balance = Optimizer(alone.parameters(), settings), Balance(model.gates())
    tokens = torch.tensor(measure.random_tokens(job.batch * job.context, job.vocab, seed=3))
    micro = Microbatch.of(Batch(tokens, [job.context] * job.batch, torch.ones(tokens.shape[0])), 0)
    seen, going = [], torch.zeros(())

    def call() -> None:
        sums = alone.run([micro], LossScales(mtp=0.0), optimizer.collect, balance)
        optimizer.update(settings.lr, alone.norms(optimizer.squares())[-1], going)
        seen.append(float(sums[0]))

    rates = measure.call_rates(call, tokens.shape[0], job)
    measure.report({"rates": rates, "losses": seen[: measure.COMPARED_LOSSES]})


def memory(job: Job) -> None:
    """Peaks above what the imports take, phase by phase: loading, filling the cache, compiling, decoding. The
    compiler counts as imported once it has compiled a trivial function."""
    imported = measure.anonymous_bytes()
    torch.compile(lambda x: x.sin() + 1)(torch.zeros(8))
    with_compiler = measure.anonymous_bytes()
    watch = measure.MemoryWatch()
    watch.phase("load")
    model = abyssal.load(job.model)
    run = Engine(model, job)
    watch.phase("fill")
    last = run.fill()
    watch.phase("first step")
    run.step(-1, last)
    watch.phase("decode")
    for i, row in enumerate(measure.step_tokens(job)):
        run.step(i, row)
    peaks = watch.stop()
    peaks.pop("start")
    weights = sum(t.nbytes for t in model.state_dict().values())
    latents = cache_bytes(model.config, job.batch * job.context, model.embed.weight.element_size())
    measure.report(
        {"imports": imported, "with_compiler": with_compiler, "peaks": peaks, "weights": weights, "latents": latents}
    )


def bandwidth(job: Job) -> None:
    """Bytes a second that a sum of 400 MB reads, the best of ten."""
    x = torch.ones(100_000_000)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        x.sum()
        seconds.append(time.perf_counter() - start)
    measure.report({"bytes_per_second": x.nbytes / min(seconds)})


def main() -> None:
    job = Job.received()
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    if job.kind == "bandwidth":
        bandwidth(job)
    elif job.kind == "memory":
        memory(job)
    else:
        cells = {"decode": decode, "prefill": prefill, "logits": logits, "routing": routing, "train": train}
        cells[job.kind](job, abyssal.load(job.model))


if __name__ == "__main__":
    main()
