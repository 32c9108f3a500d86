"""How much memory there is for the page pool, and what a step needs beside it."""

import os

import torch

from abyssal.engine.options import Options
from abyssal.engine.runner import leaves
from abyssal.model.transformer import Transformer

SHARE = 0.92  # of a GPU's memory that we fill: the rest is for CUDA, its libraries and fragments
CPU_SHARE = 0.5  # of what is available: a laptop has other uses for it


def free_bytes(device: torch.device) -> int:
    """Bytes that may be filled on a device, with what is on it already."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + kept - (1 - SHARE) * total)
    try:
        with open("/proc/meminfo") as lines:
            available = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except OSError:  # not Linux: half of all there is may be in use
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return int(available * CPU_SHARE)


def page_bytes(model: Transformer, modules: int, cache_dtype: torch.dtype | None, size: int) -> int:
    """Of a page of `size` tokens, in all layers."""
    dtype = cache_dtype or model.embed.weight.dtype
    return sum(
        size * width * (own or dtype).itemsize
        for layer in leaves(model, modules, cache_dtype)
        for width, own in layer.values()
    )


def workspace_bytes(model: Transformer, options: Options) -> int:
    """A bound on what a step allocates: one layer's activations of `step_tokens`, keys and values of the `workspace`
    tokens that are expanded at once, logits of every row that is decoded, as numbers, probabilities and their order,
    and what drafts were drawn from."""
    c, size = model.config, model.embed.weight.element_size()
    H, heads = c.num_attention_heads, c.qk_nope_head_dim + c.qk_rope_head_dim
    routed = c.num_experts_per_tok * (2 * c.moe_intermediate_size + c.hidden_size) if c.has_experts else 0
    dense = 3 * max(c.intermediate_size, (c.n_shared_experts or 0) * c.moe_intermediate_size)
    token = 6 * c.hidden_size + 3 * H * (heads + c.v_head_dim) + routed + dense
    reach = max(options.workspace, options.step_tokens)
    expanded = reach * (H * (c.qk_nope_head_dim + c.v_head_dim) + c.kv_lora_rank + c.qk_rope_head_dim)
    rows = options.running * (1 + options.drafts)
    drawn_from = 4 * (options.running + 1) * options.drafts * c.vocab_size
    return size * (options.step_tokens * token + expanded) + 16 * rows * c.vocab_size + drawn_from
