"""FP8 training on one GPU: its maps, whole steps and the loss, each beside bf16.

    python benchmarks/fp8_train.py maps [--tokens 16384]
    python benchmarks/fp8_train.py steps [--shape v3-dense] [--compile] [--profile]
    python benchmarks/fp8_train.py loss --data TOKENS [--like dense-2048] [--steps 2000] [--chance] [--out FOLDER]

`maps`: forward and backward of single maps of DeepSeek-V3's widths, medians by CUDA events, and the parts of one.
`steps`: forward, backward and AdamW with float32 masters, by the trainer's own parts, of 16384 random tokens in
sequences of 4096; bf16 and FP8 in turns in one process. `loss`: two runs of one seed over the same tokens, 8192 a
step, one in bf16, one in FP8; with --chance a third, in bf16, whose first weights differ by a part in a thousand: what
chance alone makes of such a run. A process each, dealt out over the GPUs. "--like stories" is a small model all of
whose maps are in FP8; "dense-2048" has wide ones, those in FP8 that `fp8 = true` takes.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_step import milliseconds
from torch import Tensor

import abyssal
from abyssal.bench.machine import device_name, versions
from abyssal.config import ModelConfig
from abyssal.data import Batch, TokenSet
from abyssal.model.balance import Balance
from abyssal.model.objective import LossScales, Microbatch
from abyssal.model.transformer import Transformer
from abyssal.ops.fp8_train import fp8_train_linear, fp8_train_mlp
from abyssal.ops.gated import gated
from abyssal.train.alone import Alone
from abyssal.train.config import TrainConfig
from abyssal.train.fp8 import LEAST, apply_fp8, remove_fp8
from abyssal.train.optimizer import Optimizer
from abyssal.train.trainer import Trainer

LENGTH, TOKENS = 4096, 16384
READ = 8192  # tokens a step of `loss`
V3 = {
    "hidden_size": 7168, "intermediate_size": 18432, "num_attention_heads": 128, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 32768,
}  # fmt: skip
DENSE = {"n_routed_experts": None, "num_nextn_predict_layers": 0}
SHAPES: dict[str, dict[str, Any]] = {
    # The three layers that DeepSeek-V3 begins with, and a vocabulary of a quarter.
    "v3-dense": V3 | DENSE | {"num_hidden_layers": 3},
    "dense-4096": DENSE | {
        "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "q_lora_rank": 1536,
        "kv_lora_rank": 512, "num_hidden_layers": 8, "vocab_size": 32768,
    },
    # Half the arithmetic of a layer lies in routed experts, which stay bf16.
    "moe-4096": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "q_lora_rank": 1536,
        "kv_lora_rank": 512, "num_hidden_layers": 6, "vocab_size": 32768, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "moe_intermediate_size": 4096, "n_shared_experts": 1, "first_k_dense_replace": 2,
        "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0,
    },
}  # fmt: skip
# Of `loss`: changes of the preset "stories", and the least map in FP8. Widths are multiples of 128.
STORIES = {
    "hidden_size": 768, "intermediate_size": 2048, "moe_intermediate_size": 384, "num_hidden_layers": 8,
    "num_attention_heads": 8, "q_lora_rank": 384, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
    "v_head_dim": 64, "n_routed_experts": 16, "num_experts_per_tok": 2, "num_nextn_predict_layers": 0,
}  # fmt: skip


WIDE = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 6, "num_attention_heads": 16,
    "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": None, "num_nextn_predict_layers": 0,
}  # fmt: skip
LIKE: dict[str, tuple[dict[str, Any], int, float]] = {"stories": (STORIES, 0, 1e-3), "dense-2048": (WIDE, LEAST, 5e-4)}


def timed(runs: dict[str, Callable[[], object]], times: int = 7, together: int = 4) -> dict[str, float]:
    """Medians in milliseconds, the runs taking turns, each so many times in a row: the host is ahead of the GPU."""
    took: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(times + 1):
        for name, run in runs.items():
            run()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(together):
                run()
            end.record()
            torch.cuda.synchronize()
            if turn:
                took[name].append(start.elapsed_time(end) / together)
    return {name: statistics.median(column) for name, column in took.items()}


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(torch.bfloat16)


def wide_mlp(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    linear = torch.nn.functional.linear
    return linear(gated(linear(x, w1), linear(x, w3)), w2)


def _gradients(function: Callable[..., Tensor], leaves: tuple[Tensor, ...], dy: Tensor) -> None:
    torch.autograd.grad(function(*leaves), leaves, dy)


def maps(tokens: int) -> None:
    from abyssal.kernels import fp8_train as kernels

    print(f"{tokens} tokens, ms forward and backward | bf16 | FP8 | ratio")
    for outputs, inputs in ((1536, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 4096), (2048, 1024)):
        x, w, dy = normal(tokens, inputs), normal(outputs, inputs, scale=0.02), normal(tokens, outputs)
        x.requires_grad_()
        w.requires_grad_()

        took = timed(
            {
                "bf16": partial(_gradients, torch.nn.functional.linear, (x, w), dy),
                "fp8": partial(_gradients, fp8_train_linear, (x, w), dy),
            }
        )
        print(
            f"{outputs}x{inputs} | {took['bf16']:.2f} | {took['fp8']:.2f} | {took['bf16'] / took['fp8']:.2f}",
            flush=True,
        )
    for width, inner in ((7168, 18432), (4096, 11008), (1024, 2816)):
        x, dy = normal(tokens, width).requires_grad_(), normal(tokens, width)
        shapes = (inner, width), (width, inner), (inner, width)
        w1, w2, w3 = (normal(*s, scale=0.02).requires_grad_() for s in shapes)
        leaves = (x, w1, w2, w3)

        took = timed(
            {
                "bf16": partial(_gradients, wide_mlp, leaves, dy),
                "fp8": partial(_gradients, fp8_train_mlp, leaves, dy),
            }
        )
        print(
            f"MLP {width}, {inner} | {took['bf16']:.2f} | {took['fp8']:.2f} | {took['bf16'] / took['fp8']:.2f}",
            flush=True,
        )
        del x, dy, w1, w2, w3, leaves
    torch.cuda.empty_cache()
    width, inner = 7168, 18432
    x, w, wide_inner, dh = normal(tokens, width), normal(inner, width), normal(tokens, 2 * inner), normal(tokens, inner)
    rows, weight = kernels.round_rows(x, True), kernels.round_weights([w], False)
    gradient = kernels.round_rows(dh, True)
    turned = kernels.round_weights([w], True)
    parts: dict[str, tuple[Callable[[], object], float, float]] = {  # what, bytes, operations
        "round_rows": (lambda: kernels.round_rows(x, True), 4 * x.numel(), 0),
        "round_rows, not turned": (lambda: kernels.round_rows(x, False), 3 * x.numel(), 0),
        "round_gated": (lambda: kernels.round_gated(wide_inner, True), 6 * dh.numel(), 0),
        "round_gated_gradient": (lambda: kernels.round_gated_gradient(wide_inner, dh, True), 10 * dh.numel(), 0),
        "round_weights": (lambda: kernels.round_weights([w], False), 3 * w.numel(), 0),
        "round_weights, turned": (lambda: kernels.round_weights([w], True), 3 * w.numel(), 0),
        "y": (lambda: kernels.product(*rows[:2], *weight), 0, 2 * tokens * w.numel()),
        "dx": (lambda: kernels.product(*gradient[:2], *turned), 0, 2 * tokens * w.numel()),
        "dW": (
            lambda: kernels.product_of_rows(*gradient[2:], *rows[2:], torch.bfloat16), 0, 2 * tokens * w.numel()
        ),
        "y, bf16": (lambda: x @ w.T, 0, 2 * tokens * w.numel()),
        "dW, bf16": (lambda: dh.T @ x, 0, 2 * tokens * w.numel()),
    }  # fmt: skip
    took = timed({name: run for name, (run, _, _) in parts.items()})
    for name, (_, size, operations) in parts.items():
        rate = f"{size / took[name] / 1e6:.0f} GB/s" if size else f"{operations / took[name] / 1e9:.0f} TFLOP/s"
        print(f"{name}: {took[name]:.3f} ms, {rate}", flush=True)


def steps(shape: str, compiled: bool, least: int, profiled: bool) -> None:
    config = TrainConfig.of({
        "model": "stories", "out": "unused", "steps": 1000, "batch_tokens": TOKENS, "sequence": LENGTH,
        "device": "cuda", "sequence_balance": 0.0, "compile": compiled,
    })  # fmt: skip
    settings = ModelConfig.load("stories").replace(**SHAPES[shape], max_position_embeddings=LENGTH)
    with torch.device("cuda"):
        model = Transformer(settings)
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.0, 0.02) if p.ndim > 1 else torch.nn.init.ones_(p)
    alone = Alone(model, config, torch.device("cuda"), torch.bfloat16)
    optimizer = Optimizer(alone.parameters(), config)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, settings.vocab_size, (TOKENS,), generator=generator)
    batch = Batch(tokens, [LENGTH] * (TOKENS // LENGTH), torch.ones(TOKENS))
    micro = [Microbatch.of(batch, 0).to(torch.device("cuda"))]
    balance, going = Balance(model.gates()), torch.zeros((), device="cuda")

    def step() -> None:
        alone.run(micro, LossScales(0.0), optimizer.collect, balance)
        optimizer.update(1e-5, alone.norms(optimizer.squares())[-1], going)

    total = sum(p.numel() for p in model.parameters())
    print(f"{shape}{', compiled' * compiled}: {total / 1e9:.2f} B parameters, {TOKENS} tokens a step", flush=True)
    took: dict[str, list[float]] = {"bf16": [], "fp8": []}
    peak: dict[str, float] = {}
    for _ in range(2):
        for name in took:
            names = apply_fp8(model, least) if name == "fp8" else []
            torch.cuda.reset_peak_memory_stats()
            took[name] += list(milliseconds(step, 5, warm=3))
            peak[name] = torch.cuda.max_memory_allocated() / 2**30
            if profiled and len(took[name]) <= 5:
                print(f"{name}: {len(names)} modules in FP8")
                profile(step, 28)
            remove_fp8(model)
            torch.compiler.reset()  # what was compiled does not look at a module's class again
    medians = {name: statistics.median(column) for name, column in took.items()}
    for name, median in medians.items():
        print(f"{shape} {name}: {median:.1f} ms ({min(took[name]):.1f}-{max(took[name]):.1f}), "
              f"{TOKENS / median * 1e3:.0f} tokens/s, peak {peak[name]:.1f} GiB", flush=True)  # fmt: skip
    print(f"{shape}{', compiled' * compiled}: FP8 is {medians['bf16'] / medians['fp8']:.3f} times bf16", flush=True)


def profile(run: Callable[[], object], most: int) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    events = [e for e in found.key_averages() if e.self_device_time_total > 0]
    for e in sorted(events, key=lambda e: -e.self_device_time_total)[:most]:
        print(f"    {e.self_device_time_total / 1e3:9.3f} ms {e.count:5d} x  {e.key[:100]}")
    print(f"    {sum(e.self_device_time_total for e in events) / 1e3:9.3f} ms in all", flush=True)


def train(kind: str, like: str, data: str, count: int, out: str) -> None:
    """One run of `loss`: "bf16", "fp8", or "bf16 again"."""
    changes, least, lr = LIKE[like]
    config = TrainConfig.of({
        "model": "stories", "model_overrides": changes, "data": data, "out": f"{out}/{kind.replace(' ', '-')}",
        "steps": count, "batch_tokens": READ, "sequence": 512, "lr": lr, "warmup_steps": count // 20,
        "decay_fraction": 0.5, "final_lr": lr / 20, "device": "cuda",
    })  # fmt: skip
    trainer = Trainer(config, config.model_settings(), TokenSet.open(Path(data)))
    taken = apply_fp8(trainer.model, least) if kind == "fp8" else []
    if kind == "bf16 again":
        with torch.no_grad():
            for p in trainer.optimizer.masters:
                p.mul_(1 + 1e-3 * torch.randn_like(p))
    total = sum(p.numel() for p in trainer.model.parameters())
    print(f"{kind}: {total / 1e6:.0f} M parameters, {len(taken)} modules in FP8", flush=True)
    began, taken_steps = time.perf_counter(), []
    with trainer.stream() as microbatches:
        for number, micro in enumerate(microbatches, 1):
            taken_steps.append(trainer.step(micro))
            if number % 100 == 0:
                mean = statistics.fmean(step.main_loss for step in taken_steps[-100:])
                took = time.perf_counter() - began
                print(f"{kind}: step {number}, last hundred {mean:.4f}, {took:.0f} s", flush=True)
    trainer.check()
    Path(out, f"{kind.replace(' ', '-')}.json").write_text(json.dumps([step.main_loss for step in taken_steps]))


def loss(like: str, data: str, count: int, chance: bool, out: str) -> None:
    Path(out).mkdir(parents=True, exist_ok=True)
    kinds = ["bf16", "fp8", "bf16 again"][: 2 + chance]
    command = [sys.executable, __file__, "train", "--like", like, "--data", data, "--steps", str(count), "--out", out]
    running = [
        subprocess.Popen(
            [*command, "--kind", kind],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": str(i % torch.cuda.device_count())},
        )
        for i, kind in enumerate(kinds)
    ]
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit("a run failed")
    means = {}
    for kind in kinds:
        losses = json.loads(Path(out, f"{kind.replace(' ', '-')}.json").read_text())
        assert len(losses) == count and all(map(math.isfinite, losses))
        means[kind] = statistics.fmean(losses[-100:])
    for kind, mean in means.items():
        print(f"{kind}: {mean:.5f} nats a token over the last 100 of {count} steps, "
              f"{(mean / means['bf16'] - 1) * 100:+.3f}% of bf16's")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("maps", "steps", "loss", "train"))
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--shape", default="v3-dense", choices=SHAPES)
    parser.add_argument("--least", type=int, default=LEAST, help="see `apply_fp8`")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--data")
    parser.add_argument("--like", default="dense-2048", choices=LIKE)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--chance", action="store_true")
    parser.add_argument("--out")
    parser.add_argument("--kind", default="bf16")
    wanted = parser.parse_args()
    if wanted.what != "train":
        print(f"{device_name('cuda')}, {versions(True)}, abyssal {abyssal.__version__}", flush=True)
    out = wanted.out or tempfile.mkdtemp()
    if wanted.what == "maps":
        maps(wanted.tokens)
    elif wanted.what == "steps":
        steps(wanted.shape, wanted.compile, wanted.least, wanted.profile)
    elif wanted.data is None:
        parser.error("--data: a token set, as `abyssal train` or `abyssal.data.prepare` makes it")
    elif wanted.what == "loss":
        loss(wanted.like, wanted.data, wanted.steps, wanted.chance, out)
    else:
        train(wanted.kind, wanted.like, wanted.data, wanted.steps, out)


if __name__ == "__main__":
    main()
