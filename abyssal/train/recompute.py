"""Recomputation by operation: which results of a block's forward pass are kept for its backward.

What is cheap (norms, rotations, gates of an MLP, sums) is made anew whenever anything is. Beyond that:

    up          MLA's up-projections, W_UQ and W_UK|W_UV: wide results of narrow inputs. With the cheap ones, what
                DeepSeek-V3 recomputes (section 3.2.3)
    attention   softmax(q k) v
    products    every other product of dense weights
    experts     the routed experts' products
    block       all of these: only a block's input is kept

A block is one region of `torch.utils.checkpoint`. What is kept is kept here and not by its selective contexts: those
count every operation of the region (2.13), and a sharded module gathers in the forward pass what the backward has.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from abyssal.config import ConfigError, ModelConfig

CHEAP = "cheap"
OPERATIONS = (CHEAP, "up", "attention", "products", "experts")
NONE, BLOCK = "none", "block"

Forward = Callable[..., Any]
Ranks = Mapping[int, Collection[int]]  # what a head's share of an up-projection is wide, by the rank it starts from


def parse(text: str) -> frozenset[str]:
    """The operations that "up,attention" and the like recompute; empty for "none". Raises ConfigError."""
    names = [name.strip() for name in text.split(",")]
    if names == [NONE]:
        return frozenset()
    if names == [BLOCK]:
        return frozenset(OPERATIONS)
    for name in names:
        if name not in OPERATIONS:
            raise ConfigError(
                f"recompute: unknown operation {name!r}; expected 'none', 'block', or some of {', '.join(OPERATIONS)}"
            )
    return frozenset(names) | {CHEAP}


def recomputing(forward: Forward, operations: frozenset[str], config: ModelConfig) -> Forward:
    """`forward` of a block, which keeps for the backward pass what `operations` leave out. Nothing in a block is
    random, so the random state need not be restored."""
    if not operations:
        return forward
    again = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    if operations == frozenset(OPERATIONS):
        return again
    N, R, V = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    ranks = {config.kv_lora_rank: {N + V}}
    if config.q_lora_rank is not None:
        ranks.setdefault(config.q_lora_rank, set()).add(N + R)
    kept = frozenset(OPERATIONS) - operations

    def contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
        results: Results = defaultdict(deque)
        return _Keep(kept, ranks, results), _Again(kept, ranks, results)

    return partial(again, context_fn=contexts)


Results = defaultdict[str, deque[Any]]  # of the operations that are kept, by name, in order


class _Keep(TorchDispatchMode):
    """Keeps the results of some kinds of operations."""

    def __init__(self, kinds: frozenset[str], ranks: Ranks, results: Results) -> None:
        super().__init__()
        self.kinds, self.ranks, self.results = kinds, ranks, results

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if kind_of(function, args, self.ranks) in self.kinds:
            # Aliases: the tensors themselves will know the graph that knows these results.
            self.results[function.name()].append(tree_map_only(torch.Tensor, torch.Tensor.detach, out))
        return out


class _Again(_Keep):
    """Hands the results out again, each once, where the operations come by for the second time."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kind_of(function, args, self.ranks) in self.kinds:
            return self.results[function.name()].popleft()
        return function(*args, **(kwargs or {}))


def kind_of(operation: Any, args: tuple[Any, ...], ranks: Ranks) -> str | None:
    """Which of OPERATIONS an operation of torch's is, None for what is cheap."""
    space, _, name = operation.name().partition("::")
    name, _, overload = name.partition(".")
    if overload == "out":  # a piece of a larger result, written over later; the whole of it is made anew
        return None
    if "attention" in name or "attn" in name:  # torch's packed one is torch_attn::_varlen_attn
        return "attention"
    if (space == "abyssal" and "experts" in name) or name.endswith("grouped_mm"):
        return "experts"
    if name in ("mm", "addmm", "bmm", "_scaled_mm") or (space == "abyssal" and "linear" in name):
        inner, outer = args[2 if name == "addmm" else 1].shape[-2:]
        if space == "abyssal":  # weights as they are stored, `[out, in]`
            inner, outer = outer, inner
        up = outer > inner and any(outer % head == 0 for head in ranks.get(inner, ()))
        return "up" if up else "products"
    return None
