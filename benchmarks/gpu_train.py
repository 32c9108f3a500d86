"""Where a training step of the 961M shape spends its time on one GPU; random weights, a plain loop around the model.

    python benchmarks/gpu_train.py [--packed] [--mtp] [--compile] [--profile] [--steps 20] [--layers 16]

A step is 32768 tokens: 16 sequences of 2048, or with --packed documents of 64 to 2048 tokens whose lengths are uneven
(log-uniform, other ones each step). Parameters, gradients and AdamW's moments are bf16, and the router biases are moved
as in training. Times are medians over the steps, by CUDA events; "host" is how long the host took to issue a step.
"""

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import abyssal
from abyssal.config import ModelConfig
from abyssal.model.balance import Balance
from abyssal.model.experts import Routing
from abyssal.model.packing import Packing, shift
from abyssal.model.transformer import Transformer
from abyssal.ops.cross_entropy import linear_cross_entropy

SEQUENCES, LENGTH = 16, 2048
SHORTEST = 64  # of packed documents
PARTS = ("forward", "loss", "backward", "optimizer")
WARM = 3


def shape(layers: int, mtp: bool) -> ModelConfig:
    return ModelConfig(
        vocab_size=32768, hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers, num_attention_heads=16,
        qk_nope_head_dim=128, v_head_dim=128, kv_lora_rank=256, qk_rope_head_dim=64, moe_intermediate_size=512,
        n_routed_experts=32, n_shared_experts=1, num_experts_per_tok=4, first_k_dense_replace=1,
        num_nextn_predict_layers=int(mtp),
    )  # fmt: skip


def build(config: ModelConfig, compiled: bool) -> Transformer:
    """Every matrix from N(0, 0.02), which spreads the routing."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Transformer(config)
    torch.set_default_dtype(before)
    model = model.to(torch.bfloat16)
    model.init_weights(torch.Generator("cuda").manual_seed(0))
    if compiled:
        for block in [*model.layers, *(module.block for module in model.mtp)]:
            block.__dict__["forward"] = torch.compile(block.forward)
    return model


class Batch(NamedTuple):
    """What a step reads; everything lies on the GPU."""

    tokens: Tensor  # [T]
    packing: Packing
    targets: list[Tensor]  # a depth: [T]
    weights: list[Tensor]  # a depth: [T] float32, 0 where there is no target

    @staticmethod
    def of(lengths: Sequence[int], vocab: int, depths: int, seed: int) -> "Batch":
        generator = torch.Generator("cuda").manual_seed(seed)
        tokens = torch.randint(0, vocab, (sum(lengths),), generator=generator, device="cuda")
        packing = Packing.of(lengths, tokens)
        ahead = [shift(tokens, packing, 1 + depth) for depth in range(depths)]
        return Batch(tokens, packing, [target for target, _ in ahead], [live.float() for _, live in ahead])


def uneven(total: int, draw: random.Random) -> list[int]:
    """Lengths that sum to `total`, the last of them cut."""
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        length = math.exp(draw.uniform(math.log(SHORTEST), math.log(LENGTH)))
        lengths.append(min(round(length), left))
    return lengths


def loss_of(model: Transformer, batch: Batch, states: Tensor) -> tuple[Tensor, list[Routing]]:
    """The loss, and what the MTP module's gate decided."""

    def predicted(states: Tensor, depth: int) -> Tensor:
        weights = batch.weights[depth]
        return linear_cross_entropy(states, model.head.weight, batch.targets[depth], weights) / weights.sum()

    loss, routings = predicted(states, 0), []
    for depth, module in enumerate(model.predict_states(states, batch.tokens, batch.packing), start=1):
        loss = loss + 0.3 * predicted(module.states, depth)
        if module.routing is not None:
            routings.append(module.routing)
    return loss, routings


def step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    balance: Balance,
    batch: Batch,
    mark: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """One step: the loss, and MaxVio a gate; `mark` is called at its start and after each of PARTS."""
    mark()
    states, routings = model.hidden(batch.tokens, batch.packing)
    mark()
    loss, more = loss_of(model, batch, states)
    mark()
    loss.backward()
    mark()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    balance.observe([*routings, *more])
    violation = balance.update(1e-3)
    mark()
    return loss.detach(), violation


class Marks:
    """Events on the GPU between a step's parts, and when the host had issued it all."""

    def __init__(self) -> None:
        self.events: list[torch.cuda.Event] = []

    def __call__(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append(event)

    def parts(self) -> list[float]:
        return [a.elapsed_time(b) for a, b in zip(self.events, self.events[1:])]


def profile(run: Callable[[], object], most: int) -> None:
    """One step under torch's profiler: its longest kernels, how long the GPU was busy, and which of torch's own
    operations launched something."""
    from torch.profiler import ProfilerActivity

    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        run()
        torch.cuda.synchronize()
    averages = [e for e in found.key_averages() if e.self_device_time_total > 0]
    kernels = [e for e in averages if e.device_type == torch.autograd.DeviceType.CUDA]
    operations = [e for e in averages if e.device_type == torch.autograd.DeviceType.CPU and e.key.startswith("aten::")]
    for title, events in (("kernels", kernels), ("torch's operations, by the time of what they launch", operations)):
        print(f"  {title}: {sum(e.self_device_time_total for e in events) / 1e3:.2f} ms in all")
        for e in sorted(events, key=lambda e: -e.self_device_time_total)[:most]:
            total, each = e.self_device_time_total / 1e3, e.self_device_time_total / e.count
            print(f"  {total:9.3f} ms {e.count:5d} x {each:8.1f} µs  {e.key[:100]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--mtp", action="store_true")
    parser.add_argument("--compile", action="store_true", help="each block by torch.compile")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=16)
    wanted = parser.parse_args()
    config = shape(wanted.layers, wanted.mtp)
    model = build(config, wanted.compile)
    balance = Balance(model.gates())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    draw, total = random.Random(0), SEQUENCES * LENGTH
    rows = [uneven(total, draw) if wanted.packed else [LENGTH] * SEQUENCES for _ in range(WARM + wanted.steps)]
    batches = [Batch.of(row, config.vocab_size, 1 + int(wanted.mtp), seed) for seed, row in enumerate(rows)]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {abyssal.__file__}", flush=True)
    first = float(step(model, optimizer, balance, batches[0])[0])
    for batch in batches[1:WARM]:
        step(model, optimizer, balance, batch)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    every, hosts = [], []
    start = time.perf_counter()
    for batch in batches[WARM:]:
        marks, began = Marks(), time.perf_counter()
        last, violation = step(model, optimizer, balance, batch, marks)
        hosts.append((time.perf_counter() - began) * 1e3)
        every.append(marks)
    torch.cuda.synchronize()
    wall = (time.perf_counter() - start) / len(every) * 1e3
    parts = [statistics.median(column) for column in zip(*(marks.parts() for marks in every))]
    whole = statistics.median(sum(marks.parts()) for marks in every)
    names = [name for name in ("packed", "mtp", "compile") if getattr(wanted, name)]
    print(f"{' '.join(names) or 'plain'}: {whole:.2f} ms a step, {total / whole * 1e3:.0f} tokens/s; "
          + ", ".join(f"{name} {took:.2f}" for name, took in zip(PARTS, parts))
          + f"; wall {wall:.2f}, host {statistics.median(hosts):.2f}; "
          f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB; loss {first:.4f} -> {float(last):.4f}, "
          f"MaxVio {float(violation.mean()):.2f} in the last step",
          flush=True)  # fmt: skip
    if wanted.profile:
        profile(lambda: step(model, optimizer, balance, batches[-1]), 60)


if __name__ == "__main__":
    main()
