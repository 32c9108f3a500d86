"""Tiny models with weights large enough that a mistake shows, and packings with pages laid out by hand."""

from collections.abc import Sequence

import torch
from torch import Tensor

from abyssal.config import ModelConfig
from abyssal.model.cache import Cache
from abyssal.model.experts import Gate
from abyssal.model.layers import RMSNorm
from abyssal.model.packing import Packing
from abyssal.model.transformer import Transformer

_BASE = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3,
    "qk_nope_head_dim": 6, "v_head_dim": 10, "kv_lora_rank": 7, "qk_rope_head_dim": 4, "q_lora_rank": 9,
    "moe_intermediate_size": 12, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3,
    "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.7,
}  # fmt: skip


def tiny_config(**changes) -> ModelConfig:
    """A whole DeepSeek-V3 in miniature: no two sizes alike, so that none can stand for another."""
    return ModelConfig(**{**_BASE, **changes})


@torch.no_grad()
def randomised(model: Transformer, seed: int = 0) -> Transformer:
    """Every weight random: matrices keep a signal's size, norms and router biases are not what they start as."""
    g = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for p in module.parameters(recurse=False):
            noise = torch.randn(p.shape, generator=g, dtype=torch.float64)
            if isinstance(module, RMSNorm):
                p.copy_(1 + 0.3 * noise)
            elif isinstance(module, torch.nn.Embedding):
                p.copy_(noise)
            else:
                p.copy_(noise / p.shape[-1] ** 0.5)
        if isinstance(module, Gate) and module.bias is not None:
            module.bias.copy_(0.3 * torch.randn(module.bias.shape, generator=g))
    return model


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float64, **changes) -> Transformer:
    return randomised(Transformer(tiny_config(**changes)), seed).to(dtype)


def random_tokens(total: int, vocab: int = 61, seed: int = 0) -> Tensor:
    return torch.randint(0, vocab, (total,), generator=torch.Generator().manual_seed(seed))


def paged_packing(lengths: Sequence[int], before: Sequence[int], tables: Sequence[Sequence[int]], page_size: int):
    """The packing of `lengths[s]` new tokens after `before[s]` cached ones, in the pages `tables[s]`: by hand, so
    that it owes nothing to the code under test."""
    positions = [old + i for new, old in zip(lengths, before) for i in range(new)]
    slots = [
        tables[s][(old + i) // page_size] * page_size + (old + i) % page_size
        for s, (new, old) in enumerate(zip(lengths, before))
        for i in range(new)
    ]
    return Packing(
        cu_seqlens=torch.tensor([sum(lengths[:s]) for s in range(len(lengths) + 1)], dtype=torch.int32),
        positions=torch.tensor(positions, dtype=torch.int64),
        max_len=max(lengths, default=0),
        slots=torch.tensor(slots, dtype=torch.int64),
        block_table=torch.tensor([list(t) for t in tables], dtype=torch.int32),
        context_lens=torch.tensor([n + o for n, o in zip(lengths, before)], dtype=torch.int32),
        page_size=page_size,
        fresh=not any(before),
    )


@torch.no_grad()
def greedy(model: Transformer, prompts: Sequence[Tensor], steps: int, path: str | None) -> list[list[int]]:
    """Greedy tokens of several prompts at once: a prefill, then token by token from the cache along `path`."""
    room = max(map(len, prompts)) + steps
    dtype = model.embed.weight.dtype
    cache = Cache.allocate(model.leaves()[: len(model.layers)], len(prompts), room, dtype)
    pages = list(range(len(prompts)))
    before, lengths, tokens = [0] * len(prompts), [len(p) for p in prompts], torch.cat(list(prompts))
    outs: list[list[int]] = [[] for _ in prompts]
    for step in range(steps):
        packing = cache.contiguous_packing(lengths, before, pages)
        states = model.hidden(tokens, packing, cache, path if step else None).states
        tokens = model.logits(states[packing.cu_seqlens[1:].long() - 1]).argmax(-1)
        for out, token in zip(outs, tokens.tolist()):
            out.append(token)
        before, lengths = [o + n for o, n in zip(before, lengths)], [1] * len(prompts)
    return outs
