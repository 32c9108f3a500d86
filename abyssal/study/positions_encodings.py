"""The encodings by themselves: what each dimension does along the sequence, and what is left of it in a product."""

from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from abyssal.config import ModelConfig
from abyssal.model.latent import LatentAttention
from abyssal.model.packing import Packing
from abyssal.model.positions import added_positions, rotary
from abyssal.model.transformer import Transformer
from abyssal.ops.rotary import rotate


def encoding(config: ModelConfig, positions: int) -> Tensor | None:
    """`[P, D]` float64 of what is added to the embeddings; or `[P, N + R]`, what becomes of a key all of whose pairs
    are (1, 0), those beside the rotary key among them, which nothing turns; None where there is neither."""
    places = torch.arange(positions)
    added = added_positions(config, places, torch.float64)
    angles = rotary(config, places)
    if added is not None or angles is None:
        return added
    key = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat((config.qk_nope_head_dim + config.qk_rope_head_dim) // 2)
    still, turned = key.split((len(key) - config.rotary_width, config.rotary_width))
    rows = rotate(turned.expand(positions, -1), *angles)
    return torch.cat((still.expand(positions, -1), rows), 1)


class Products(NamedTuple):
    """Cosines of two places' encodings by their distance, over all pairs of places but those with place 0, which is
    nothing as an integer."""

    mean: list[float]
    low: list[float]
    high: list[float]

    @property
    def spread(self) -> float:
        """How far apart the cosines of one distance are, at most: 0 where the distance says all."""
        return max(high - low for low, high in zip(self.low, self.high))


def products(rows: Tensor) -> Products:
    """`[P, W]` -> distances 0 to P-2."""
    unit = normalize(rows[1:].double(), dim=-1)
    gram = unit @ unit.T
    diagonals = [gram.diagonal(d) for d in range(len(gram))]
    return Products(*([float(f(x)) for x in diagonals] for f in (torch.mean, torch.min, torch.max)))


@torch.no_grad()
def placed_scores(model: Transformer, texts: Tensor, distances: int) -> Tensor:
    """`[layers, H, distances]` float64, of a rotary model: the part of a score that the distance decides, whatever the
    tokens are. It is what is left where queries and keys are their means over the texts `[n, P]`, rotated as usual:
    E[q]ᵀ R_distance E[k], times the softmax's scale; what nothing rotates is left out."""
    c = model.config
    inputs: list[Tensor] = []
    attentions = [cast(LatentAttention, layer.attn) for layer in model.layers]
    hooks = [a.register_forward_pre_hook(lambda module, args: inputs.append(args[0])) for a in attentions]
    tokens = texts.flatten()
    model.hidden(tokens, Packing.of([texts.shape[1]] * len(texts), tokens))
    for hook in hooks:
        hook.remove()
    angles = rotary(c, torch.arange(distances))
    assert angles is not None, f"position {c.position!r} rotates nothing"
    found = []
    for attention, x in zip(attentions, inputs, strict=True):
        q, k = (t.double().mean(0) for t in rotated_parts(attention, x))  # [H, R]
        turned = rotate(q.expand(distances, -1, -1), *angles)
        found.append(c.softmax_scale * (turned * k).sum(-1).T)
    return torch.stack(found)


def rotated_parts(attention: LatentAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of queries and keys that are rotated, before they are: `[T, H, R]` each, all of both where RoPE is
    coupled; the decoupled key is the same for all heads."""
    c = attention.config
    q, kv = attention.project_queries(x), attention.wkv_a(x)
    if c.position == "decoupled":
        return q[..., c.qk_nope_head_dim :], kv[:, None, c.kv_lora_rank :].expand(-1, c.num_attention_heads, -1)
    keys = attention.wkv_b(attention.kv_norm(kv)).unflatten(-1, (c.num_attention_heads, -1))
    return q, keys[..., : c.qk_nope_head_dim]
