"""transformers' worker: one job of `cpu.py`, in whichever of its modes the job names.

Modes (`variant`): `experts` eager, batched_mm or grouped_mm; `attention` sdpa or eager; `static` a preallocated cache
and a compiled step, as its documentation advises.
"""

from typing import Any

import measure
import numpy as np
import torch
import transformers
from measure import Job
from transformers import DynamicCache, StaticCache


def load(job: Job) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job.model, dtype=getattr(torch, job.dtype), attn_implementation=job.variant.get("attention", "sdpa")
    )
    experts(model, job.variant.get("experts", "eager"))
    return model


def experts(model: Any, name: str) -> None:
    model.set_experts_implementation(name)


def empty_cache(model: Any, length: int | None = None) -> Any:
    """One that grows, or one of a fixed length."""
    if length is None:
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=length)


class Decoder:
    """A cache of `context` tokens in every sequence, and single steps from there."""

    def __init__(self, model: Any, job: Job) -> None:
        self.model, self.job = model, job
        self.cache = empty_cache(model)
        # Gathering each token's experts, which batched_mm does, would take tens of gigabytes in a long prompt.
        chosen = job.variant.get("experts", "eager")
        experts(model, "grouped_mm" if chosen == "batched_mm" else chosen)
        self.last = model(
            input_ids=torch.tensor([measure.prompt(job)]), past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        experts(model, chosen)
        for layer in self.cache.layers:
            layer.keys = layer.keys.repeat(job.batch, 1, 1, 1)
            layer.values = layer.values.repeat(job.batch, 1, 1, 1)
        self.before = [(layer.keys, layer.values) for layer in self.cache.layers]
        self.forward = model
        if job.variant.get("static"):
            dynamic, length = self.cache, job.context + job.steps
            self.cache = empty_cache(model, length)
            for i, layer in enumerate(dynamic.layers):
                self.cache.update(layer.keys, layer.values, i)
            self.before.clear()
            self.forward = torch.compile(model, dynamic=False)

    def step(self, i: int, tokens: list[int]) -> torch.Tensor:
        """Logits `[batch, vocab]` after one more token of each sequence."""
        place = torch.full((1, 1), self.job.context + i)
        ids = torch.tensor(tokens)[:, None]
        return self.forward(input_ids=ids, position_ids=place, past_key_values=self.cache, use_cache=True).logits[:, -1]

    def rewind(self) -> None:
        if self.job.variant.get("static"):
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.job.context)
        else:
            for layer, (keys, values) in zip(self.cache.layers, self.before):
                layer.keys, layer.values = keys, values


@torch.inference_mode()
def decode(job: Job, model: Any) -> None:
    decoder = Decoder(model, job)
    step = lambda i, tokens: decoder.step(i, tokens).argmax(-1).tolist()  # noqa: E731
    measure.report({"rates": measure.decode_rates(step, decoder.rewind, job)})


@torch.inference_mode()
def prefill(job: Job, model: Any) -> None:
    tokens = torch.tensor([measure.prompt(job)])

    def call() -> int:
        cache = empty_cache(model)
        found = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return int(found.logits[:, -1].argmax())

    measure.report({"rates": measure.call_rates(call, job.context, job)})


@torch.inference_mode()
def logits(job: Job, model: Any) -> None:
    decoder = Decoder(model, job)
    rows = [decoder.last[:1], *(decoder.step(i, tokens) for i, tokens in enumerate(measure.step_tokens(job)))]
    np.save(job.out, torch.cat(rows).float().numpy())
    measure.report({"version": transformers.__version__})


def train(job: Job, model: Any) -> None:
    """Forward, backward, the gradient's norm and clipping, and fused AdamW, of one batch; as `ours.py` does."""
    model.train()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2.2e-4, betas=(0.9, 0.95), eps=1e-8, fused=True)
    flat = measure.random_tokens(job.batch * job.context, job.vocab, seed=3)
    tokens, seen = torch.tensor(flat).view(job.batch, job.context), []

    def call() -> None:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen.append(float(loss.detach()))

    rates = measure.call_rates(call, tokens.numel(), job)
    measure.report({"rates": rates, "losses": seen[: measure.COMPARED_LOSSES]})


@torch.inference_mode()
def memory(job: Job) -> None:
    imported = measure.anonymous_bytes()
    watch = measure.MemoryWatch()
    watch.phase("load")
    model = load(job)
    watch.phase("fill")
    decoder = Decoder(model, job)
    watch.phase("decode")
    for i, tokens in enumerate(measure.step_tokens(job)[: measure.LEAST_STEPS]):  # at two seconds each
        decoder.step(i, tokens).argmax(-1).tolist()
    peaks = watch.stop()
    peaks.pop("start")
    measure.report({"imports": imported, "peaks": peaks})


def main() -> None:
    job = Job.received()
    torch.set_num_threads(job.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if job.kind == "memory":
        memory(job)
        return
    cells = {"decode": decode, "prefill": prefill, "logits": logits, "train": train}
    cells[job.kind](job, load(job))


if __name__ == "__main__":
    main()
