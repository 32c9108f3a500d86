"""Decoding against context: one token decoded after a cache that is filled, on the CPU, eagerly, in float32."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from abyssal.costs import inspect
from abyssal.model.cache import Cache
from abyssal.model.latent import LatentAttention
from abyssal.model.positions import rotary
from abyssal.model.transformer import Transformer
from abyssal.ops.rotary import rotate
from abyssal.study.attention_algebra import apart_of
from abyssal.study.attention_clock import Time, times, work

WRITTEN = 1024  # tokens of text whose rows fill a cache; further rows are the same again


class Point(NamedTuple):
    """A token decoded as the last of `context`."""

    context: int
    time: Time
    flops: int  # by the formulas of `costs.py`
    cache: int  # bytes of the context's rows, float32


class Again(NamedTuple):
    """Of such a token: the keys of every earlier one made anew, rotated, and its values, in all layers."""

    context: int
    time: Time
    flops: int
    made: int  # bytes written, with what is between


@torch.inference_mode()
def filled(model: Transformer, text: Tensor, tokens: int) -> Cache:
    """A cache of `tokens` rows a layer: those of the text, again and again."""
    cache = Cache.allocate(model.leaves(), 1, tokens, model.embed.weight.dtype)
    text = text[: min(tokens, WRITTEN)]
    model.hidden(text, cache.contiguous_packing([len(text)], [0], [0]), cache)
    for layer in cache.layers:
        for rows in layer.values():
            for start in range(len(text), tokens, len(text)):
                rows[start : start + len(text)] = rows[: min(len(text), tokens - start)]
    return cache


@torch.inference_mode()
def decode(model: Transformer, cache: Cache, token: Tensor, context: int, path: str | None = None) -> Tensor:
    """Logits `[1, vocab]` after `token [1]`, the last of `context` tokens; the others' rows are in the cache."""
    packing = cache.contiguous_packing([1], [context - 1], [0])
    return model.logits(model.hidden(token, packing, cache, path).states)


@torch.inference_mode()
def keys_again(model: Transformer, cache: Cache, context: int) -> Tensor:
    """The last layer's keys `[L, H, N]`: what `LatentAttention.expanded` does to the rows with coupled RoPE."""
    c = model.config
    keys = torch.empty(0)
    for block, layer in zip(model.layers, cache.layers):
        assert isinstance(block.attn, LatentAttention)
        kv = block.attn.wkv_b(layer["latent"][:context]).unflatten(-1, (c.num_attention_heads, -1))
        angles = rotary(c, torch.arange(context))
        assert angles is not None
        keys = rotate(kv[..., : c.qk_nope_head_dim], *angles)
    return keys


def decoding(
    lines: Sequence[tuple[Transformer, str | None]], coupled: int, text: Tensor, contexts: Sequence[int], rounds: int
) -> tuple[list[list[Point]], list[Again]]:
    """Every line's points, a line being a model and the path it takes, and what the model of line `coupled` makes
    anew. All are timed in turns."""
    caches = [filled(model, text, max(contexts)) for model, _ in lines]
    points: list[list[Point]] = [[] for _ in lines]
    again: list[Again] = []
    for context in contexts:
        steps = [partial(decode, m, cache, text[:1], context, path) for (m, path), cache in zip(lines, caches)]
        anew = partial(keys_again, lines[coupled][0], caches[coupled], context)
        *clocks, clock = times([*steps, anew], rounds)
        for (model, path), cache, into, taken in zip(lines, caches, points, clocks):
            costs = inspect(model.config, context).flops
            flops = costs.decoding_expanded if path == "expanded" else costs.decoding
            into.append(Point(context, taken, flops, cache.bytes * context // max(contexts)))
        again.append(Again(context, clock, *work(anew)))
    return points, again


def absorbed_apart(model: Transformer, text: Tensor, context: int) -> float:
    """How far the logits of the absorbed path are from the expanded one's in float64, of the largest logit."""
    model = model.double()
    found = [decode(model, filled(model, text, context), text[:1], context, p) for p in ("absorbed", "expanded")]
    return apart_of(*found)
