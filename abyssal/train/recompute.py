"""Recomputation by operation: which results of a block's forward pass are kept for its backward.

What is cheap (norms, rotations, gates of an MLP, sums) is made anew whenever anything is. Beyond that:

    up          MLA's up-projections, W_UQ and W_UK|W_UV: wide results of narrow inputs. With the cheap ones, what
                DeepSeek-V3 recomputes (section 3.2.3)
    attention   softmax(q k) v
    products    every other product of dense weights
    experts     the routed experts' products
    block       all of these: only a block's input is kept

A block is one region of `torch.utils.checkpoint`, and a policy says of each operation in it whether to keep its result.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from abyssal.config import ConfigError, ModelConfig

CHEAP = "cheap"
OPERATIONS = (CHEAP, "up", "attention", "products", "experts")
NONE, BLOCK = "none", "block"

Forward = Callable[..., Any]


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
    policy = _policy(operations, config)
    return partial(again, context_fn=partial(create_selective_checkpoint_contexts, policy))


def _policy(operations: frozenset[str], config: ModelConfig) -> Callable[..., CheckpointPolicy]:
    N, R, V = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    ranks = {config.kv_lora_rank: N + V}
    if config.q_lora_rank is not None:
        ranks[config.q_lora_rank] = N + R

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kind = kind_of(operation, args, ranks)
        keep = kind is not None and kind not in operations
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def kind_of(operation: Any, args: tuple[Any, ...], ranks: Mapping[int, int]) -> str | None:
    """Which of OPERATIONS an operation of torch's is, None for what is cheap. `ranks`: what a head's share of an
    up-projection is wide, by the rank that it starts from."""
    space, _, name = operation.name().partition("::")
    name, _, overload = name.partition(".")
    if overload == "out":  # a piece of a larger result, written over later; the whole of it is made anew
        return None
    if "attention" in name:
        return "attention"
    if (space == "abyssal" and "experts" in name) or name.endswith("grouped_mm"):
        return "experts"
    if name in ("mm", "addmm", "bmm", "_scaled_mm") or (space == "abyssal" and "linear" in name):
        inner, outer = args[2 if name == "addmm" else 1].shape[-2:]
        head = ranks.get(inner)
        return "up" if head is not None and outer > inner and outer % head == 0 else "products"
    return None
