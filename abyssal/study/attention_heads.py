"""How alike a layer's heads attend: the Jensen-Shannon divergence of each pair's attention, row by row.

0 bits: two heads look at the same tokens with the same weights; 1 bit: at none in common.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from abyssal.data import Batch
from abyssal.model.attention import GroupedAttention
from abyssal.model.latent import LatentAttention
from abyssal.model.packing import Packing
from abyssal.model.positions import Rotary, rotary
from abyssal.model.transformer import Transformer
from abyssal.ops.attention import causal
from abyssal.ops.rotary import rotate

EVERY = 8  # rows that are compared, the first of which see too little to differ


class Alike(NamedTuple):
    """Of one model over some texts, in bits."""

    divergence: float  # a mean over layers and pairs of heads
    by_layer: list[float]
    pairs: list[list[list[float]]]  # a layer: `[H, H]`


@torch.inference_mode()
def alike(model: Transformer, batches: Sequence[Batch]) -> Alike:
    """A mean over every 8th row of every text."""
    totals = [torch.zeros(()) for _ in model.layers]
    for batch in batches:
        for layer, probs in enumerate(attention_rows(model, batch.tokens)):
            totals[layer] = totals[layer] + divergences(probs[:, EVERY - 1 :: EVERY])
    pairs = torch.stack(totals) / len(batches)
    H = pairs.shape[-1]
    by_layer = pairs.sum((1, 2)) / max(H * (H - 1), 1)  # a head is no pair with itself
    return Alike(float(by_layer.mean()), by_layer.tolist(), pairs.tolist())


def divergences(probs: Tensor) -> Tensor:
    """`[H, T, L]` -> `[H, H]` bits, float64: of each pair, a mean over the rows."""
    probs = probs.double()
    own = entropy(probs).mean(-1)  # [H]
    made = probs.new_zeros(len(probs), len(probs))
    for head in range(len(probs)):
        between = entropy((probs[head + 1 :] + probs[head]) / 2).mean(-1)
        made[head, head + 1 :] = between - (own[head + 1 :] + own[head]) / 2
    return (made + made.T).clamp(min=0)


def entropy(probs: Tensor) -> Tensor:
    """Bits of the last dimension's distributions."""
    return -(probs * probs.clamp(min=1e-300).log2()).sum(-1)


@torch.inference_mode()
def attention_rows(model: Transformer, tokens: Tensor) -> list[Tensor]:
    """Each layer's `[H, T, T]`: how much every head of every token of one text attends to every other."""
    seen: list[Tensor] = []

    def look(attn: nn.Module, given: tuple[Any, ...]) -> None:
        seen.append(attention_of(attn, *given[:2]))

    layers = [m for m in model.modules() if isinstance(m, GroupedAttention | LatentAttention)]
    hooks = [attn.register_forward_pre_hook(look) for attn in layers]
    try:
        model.hidden(tokens, Packing.of([len(tokens)], tokens))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def attention_of(attn: nn.Module, x: Tensor, angles: Rotary | None) -> Tensor:
    """`x [T, D]` of one text -> `[H, T, T]`."""
    assert isinstance(attn, GroupedAttention | LatentAttention)
    c = attn.config
    if isinstance(attn, GroupedAttention):
        q, k = (w(x).unflatten(-1, (-1, c.qk_nope_head_dim)) for w in (attn.wq, attn.wk))
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        scores = torch.einsum("thn,lhn->htl", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1))
    else:
        q, q_rope = attn.queries(x, angles)
        latent, k_rope = attn.leave(x, angles)
        k = attn.wkv_b(latent).unflatten(-1, (c.num_attention_heads, -1))[..., : c.qk_nope_head_dim]
        if c.position == "rope":
            turned = rotary(c, torch.arange(len(x), device=x.device))
            assert turned is not None
            k = rotate(k, *turned)
        scores = torch.einsum("thn,lhn->htl", q, k)
        if q_rope is not None and k_rope is not None:
            scores = scores + torch.einsum("thr,lr->htl", q_rope, k_rope)
    hidden = ~causal(len(x), len(x), x.device)
    return (scores * c.softmax_scale).masked_fill(hidden, float("-inf")).softmax(-1)
