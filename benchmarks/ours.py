"""abyssal's worker: one job of `cpu.py`, through the engine's Runner and the trainer's own losses and optimizer."""

import time
from collections.abc import Callable
from pathlib import Path

import measure
import numpy as np
import torch
from measure import Job

import abyssal
from abyssal.costs import cache_bytes
from abyssal.data import Batch
from abyssal.engine.compiled import can_compile
from abyssal.engine.runner import Runner
from abyssal.model.packing import Packing
from abyssal.model.transformer import Transformer
from abyssal.train.config import TrainConfig
from abyssal.train.loss import Microbatch, Totals, losses
from abyssal.train.optimizer import Optimizer

ROUND = 256  # the engine's own rounding of a page


def runner(model: Transformer, job: Job) -> Runner:
    """As the engine makes it, with its compiled step where there is a compiler."""
    model.eval().requires_grad_(False)
    size = -(-(job.context + job.steps + 1) // ROUND) * ROUND
    return Runner(
        model, job.batch, size, 1, job.variant.get("compiled", True) and can_compile(model.embed.weight.device)
    )


def fill(run: Runner, job: Job) -> torch.Tensor:
    """A prompt of `context` tokens into page 0, and its rows into every other page: what each would hold had it been
    given the same prompt. Returns the logits `[1, vocab]` after it."""
    _, last = run.prefill(0, measure.prompt(job))
    for layer in run.cache.layers:
        for rows in layer.values():
            pages = rows.view(run.pages, run.cache.page_size, -1)
            for other in range(1, run.pages):
                pages[other].copy_(pages[0])
    return last[None]


def stepper(run: Runner, job: Job) -> Callable[[int, list[int]], list[int]]:
    """One decoding step of every sequence, and the greedy choice after it."""

    def step(i: int, tokens: list[int]) -> list[int]:
        _, logits = run.decode(range(job.batch), [[token] for token in tokens], [job.context + i] * job.batch)
        return torch.cat(logits).argmax(-1).tolist()

    return step


def decode(job: Job, model: Transformer) -> None:
    run = runner(model, job)
    fill(run, job)
    step, tokens = stepper(run, job), measure.step_tokens(job)
    start = time.perf_counter()
    step(0, tokens[0])
    first = time.perf_counter() - start
    rates = measure.decode_rates(step, lambda: None, job)  # a step overwrites the rows of the pass before
    measure.report({"rates": rates, "first_step_seconds": first, "compiled": run.compiled})


def prefill(job: Job, model: Transformer) -> None:
    run, tokens = runner(model, job), measure.prompt(job)
    call = lambda: int(run.prefill(0, tokens)[1].argmax())  # noqa: E731
    measure.report({"rates": measure.call_rates(call, job.context, job)})


def logits(job: Job, model: Transformer) -> None:
    """After a prompt, and of every sequence after each decoding step, by the path that is timed."""
    run = runner(model, job)
    rows = [fill(run, job)]
    for i, tokens in enumerate(measure.step_tokens(job)):
        rows += run.decode(range(job.batch), [[token] for token in tokens], [job.context + i] * job.batch)[1]
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
    optimizer = Optimizer(model, settings, getattr(torch, job.dtype))
    tokens = torch.tensor(measure.random_tokens(job.batch * job.context, job.vocab, seed=3))
    micro = Microbatch.of(Batch(tokens, [job.context] * job.batch, torch.ones(tokens.shape[0])), 0)
    totals, seen = Totals.of([micro]), []

    def call() -> None:
        loss = losses(model, micro, totals, settings, 0.0).total
        loss.backward()
        optimizer.collect()
        optimizer.update(settings.lr, float(optimizer.norm()))
        seen.append(float(loss.detach()))

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
    run = runner(model, job)
    watch.phase("fill")
    fill(run, job)
    watch.phase("first step")
    step, tokens = stepper(run, job), measure.step_tokens(job)
    step(0, tokens[0])
    watch.phase("decode")
    for i, row in enumerate(tokens):
        step(i, row)
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
