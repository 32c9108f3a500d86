"""Where a decoding step and a prefill of DeepSeek-V2-Lite's shape spend their time on one GPU; random weights.

    python benchmarks/gpu_step.py [--decode 1x1024,32x1024] [--prefill 32768,8192] [--profile]

A decoding step is the whole model, head and greedy choice, in one CUDA graph, over a paged cache whose pages lie in a
random order; "SxL" is S sequences of L tokens. Prefill is 8 prompts of 4096, so many tokens at a time.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import abyssal
from abyssal.model.cache import Cache
from abyssal.model.packing import Packing
from abyssal.model.transformer import Transformer
from abyssal.ops.paged import cumulative

PAGE = 64


def build(preset: str, layers: int | None, joined: bool) -> Transformer:
    """Every matrix from N(0, 0.02), which spreads the routing."""
    config = abyssal.ModelConfig.load(preset)
    if layers is not None:
        config = config.replace(num_hidden_layers=layers)
    with torch.device("cuda"):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        model = Transformer(config)
        torch.set_default_dtype(before)
    model = model.to(torch.bfloat16)
    model.init_weights(torch.Generator("cuda").manual_seed(0))
    return model.join() if joined and hasattr(model, "join") else model


class Paged(NamedTuple):
    """A cache with room for S contexts of L tokens, its pages dealt out at random."""

    cache: Cache
    table: Tensor  # [S, pages] int32

    @staticmethod
    def of(model: Transformer, sequences: int, length: int) -> "Paged":
        pages = -(-length // PAGE)
        cache = Cache.allocate(model.leaves(), sequences * pages, PAGE, torch.bfloat16, "cuda")
        for layer in cache.layers:
            layer["latent"].normal_()
        generator = torch.Generator("cuda").manual_seed(1)
        table = torch.randperm(sequences * pages, device="cuda", generator=generator).view(sequences, pages)
        return Paged(cache, table.to(torch.int32))

    def rows(self, sequence: int, positions: Tensor) -> Tensor:
        return self.table[sequence].long()[positions // PAGE] * PAGE + positions % PAGE


def decoding(model: Transformer, sequences: int, length: int) -> Callable[[], None]:
    """A step of `sequences`, each with `length` tokens in the cache, captured: replays it."""
    paged = Paged.of(model, sequences, length)
    positions = torch.full((sequences,), length - 1, device="cuda")
    packing = Packing(
        cu_seqlens=torch.arange(sequences + 1, dtype=torch.int32, device="cuda"),
        positions=positions,
        max_len=1,
        slots=torch.cat([paged.rows(s, positions[:1]) for s in range(sequences)]),
        block_table=paged.table,
        context_lens=torch.full((sequences,), length, dtype=torch.int32, device="cuda"),
        page_size=PAGE,
        fresh=False,
    )
    tokens = torch.randint(0, model.config.vocab_size, (sequences,), device="cuda")

    def step() -> None:
        tokens.copy_(model.logits(model.hidden(tokens, packing, paged.cache).states).argmax(-1))

    return captured(step)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return partial(_replay, graph, step)


def _replay(graph: torch.cuda.CUDAGraph, step: Callable[[], None]) -> None:
    """`step` is kept: the graph reads its tensors."""
    graph.replay()


def prefilling(model: Transformer, chunk: int, prompts: int = 8, length: int = 4096) -> Callable[[], None]:
    """`prompts` of `length` tokens into an empty cache, `chunk` tokens at a time; a chunk is whole prompts or, where
    it is shorter than one, a part of one."""
    paged = Paged.of(model, prompts, length)
    tokens = torch.randint(0, model.config.vocab_size, (prompts * length,), device="cuda")
    batches = []
    for start in range(0, prompts * length, chunk):
        parts = [(s, max(start - s * length, 0), min(start + chunk - s * length, length))
                 for s in range(start // length, (start + chunk - 1) // length + 1)]  # fmt: skip
        places = [torch.arange(a, b, device="cuda") for _, a, b in parts]
        context = [paged.rows(s, torch.arange(b, device="cuda")) for s, _, b in parts]
        packing = Packing(
            cu_seqlens=cumulative([b - a for _, a, b in parts]).cuda(),
            positions=torch.cat(places),
            max_len=max(b - a for _, a, b in parts),
            slots=torch.cat([paged.rows(s, p) for (s, _, _), p in zip(parts, places)]),
            block_table=paged.table[[s for s, _, _ in parts]],
            context_lens=torch.tensor([b for _, _, b in parts], dtype=torch.int32, device="cuda"),
            page_size=PAGE,
            fresh=all(a == 0 for _, a, _ in parts),
            context_rows=torch.cat(context),
            cu_context=cumulative([b for _, _, b in parts]).cuda(),
            max_context=max(b for _, _, b in parts),
        )
        last = packing.cu_seqlens[1:].long() - 1
        batches.append((tokens[start : start + chunk], packing, last))

    def run() -> None:
        for part, packing, last in batches:
            model.logits(model.hidden(part, packing, paged.cache).states[last]).argmax(-1)

    return run


def milliseconds(run: Callable[[], object], times: int, warm: int = 2) -> list[float]:
    for _ in range(warm):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]


def profile(run: Callable[[], None], times: int, most: int) -> None:
    """Prints the kernels that take longest: microseconds a run, launches a run, microseconds a launch."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(times):
            run()
        torch.cuda.synchronize()
    events = [e for e in found.key_averages() if e.self_device_time_total > 0]
    for e in sorted(events, key=lambda e: -e.self_device_time_total)[:most]:
        total = e.self_device_time_total / times
        print(f"    {total:9.1f} µs {e.count / times:6.1f} x {total * times / e.count:8.2f}  {e.key[:110]}")
    print(f"    {sum(e.self_device_time_total for e in events) / times:9.1f} µs in all", flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deepseek-v2-lite")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--decode", default="1x1024,32x1024,128x1024,32x8192")
    parser.add_argument("--prefill", default="32768,16384,8192")
    parser.add_argument("--apart", action="store_true", help="without joining maps")
    parser.add_argument("--profile", action="store_true")
    wanted = parser.parse_args()
    model = build(wanted.model, wanted.layers, not wanted.apart)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {abyssal.__file__}", flush=True)
    for shape in filter(None, wanted.decode.split(",")):
        sequences, length = map(int, shape.split("x"))
        run = decoding(model, sequences, length)
        took = statistics.median(milliseconds(run, 50))
        print(f"decode {shape}: {took:.3f} ms, {sequences / took * 1e3:.0f} tokens/s", flush=True)
        if wanted.profile:
            profile(run, 5, 22)
        del run
        torch.cuda.empty_cache()
    for chunk in filter(None, wanted.prefill.split(",")):
        run = prefilling(model, int(chunk))
        took = statistics.median(milliseconds(run, 4))
        print(f"prefill 8x4096 by {chunk}: {took:.1f} ms, {8 * 4096 / took * 1e3:.0f} tokens/s", flush=True)
        if wanted.profile and chunk == wanted.prefill.split(",")[0]:
            profile(run, 1, 28)
        del run
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
