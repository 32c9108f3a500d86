"""transformers at the same loads: its own model of the shape, its best mode for experts, a cache that grows."""

import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

from abyssal.bench.serving import Load
from abyssal.config import ModelConfig

STEPS = 24  # of decoding, that are timed
MODES = ("grouped_mm", "batched_mm")  # of its experts; the first for prompts
LARGEST = 1 << 15  # cached tokens in all, beyond which it takes too long or too much memory


def version() -> str | None:
    """transformers', None where it isn't installed."""
    try:
        return metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return None


def rates(config: ModelConfig, device: str, loads: list[Load], say: Callable[[str], None]) -> dict[str, float]:
    """Tokens a second by the loads' names; nothing where transformers isn't installed. What it can't do is left out."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        say("transformers is not installed: no peer")
        return {}
    public = {k: v for k, v in config.to_dict().items() if k not in ("auto_map", "quantization_config")}
    made = AutoConfig.for_model(public.pop("model_type"), **public)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(made, dtype=dtype, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.02)
    found: dict[str, float] = {}
    for load in loads:
        if sum(load.prompts) > LARGEST:
            continue
        for mode in MODES if load.figure == "decode" else MODES[:1]:
            say(f"transformers, experts {mode}: {load.name}")
            try:
                rate = _rate(model, load, mode, device)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                say(f"  failed: {str(error).splitlines()[0][:100]}")
                continue
            found[load.name] = max(found.get(load.name, 0.0), rate)
    return found


@torch.inference_mode()
def _rate(model: Any, load: Load, mode: str, device: str) -> float:
    model.set_experts_implementation(MODES[0])  # gathering every token's experts takes tens of gigabytes in a prompt
    tokens = torch.randint(0, model.config.vocab_size, (len(load.prompts), load.prompts[0]), device=device)
    once = lambda: model(tokens, use_cache=True, logits_to_keep=1)  # noqa: E731
    if load.figure == "prefill":
        once()
        return sum(load.prompts) / _seconds(once, device)
    out = once()
    cache, last = out.past_key_values, out.logits[:, -1:].argmax(-1)
    model.set_experts_implementation(mode)

    def steps(count: int) -> None:
        nonlocal last
        for _ in range(count):
            last = model(last, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    steps(4)
    return STEPS * len(load.prompts) / _seconds(lambda: steps(STEPS), device)


def _seconds(call: Callable[[], Any], device: str) -> float:
    sync = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    sync()
    began = time.perf_counter()
    call()
    sync()
    return time.perf_counter() - began
