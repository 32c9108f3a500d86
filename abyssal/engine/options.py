"""How an engine is built, and what it can be asked for."""

from dataclasses import dataclass

import torch

from abyssal.data.tokenizer import Tokenizer
from abyssal.engine.request import Request
from abyssal.model.transformer import Transformer

PRIORITIES = 1_000_000


@dataclass(frozen=True)
class Options:
    """How an engine is built. `pages` counts the scratch page too."""

    pages: int
    running: int
    context: int
    drafts: int = 0
    step_tokens: int = 2048
    cache_dtype: torch.dtype | None = None  # None: the weights'; uint8: FP8
    workspace: int = 1 << 16  # tokens whose keys and values may be expanded at once
    prefix_cache: bool = True
    deterministic: bool = False
    compiled: bool = False
    adapt: bool = True  # draft only where it pays
    grammar_bytes: int = 65536
    grammar_seconds: float = 2.0


def most_rows(tokens: int, drafts: int) -> int:
    """Rows of the cache that a sequence which ends with so many tokens may have come to write: a step writes those of
    its drafts, too, another may be on its way, and modules that are chained write past that."""
    return tokens + 3 * (1 + drafts)


def check(request: Request, model: Transformer, options: Options, tokenizer: Tokenizer | None) -> None:
    """Raises ValueError naming what of a request can't be, whatever the pool."""
    vocab, room, own, prompt = model.config.vocab_size, options.context, request.sampling, request.prompt
    if not prompt:
        raise ValueError("prompt: is empty; expected text or token ids")
    if min(prompt) < 0 or max(prompt) >= vocab:
        raise ValueError(f"prompt: expected token ids from 0 to {vocab - 1}")
    if len(prompt) + own.max_tokens > room:
        raise ValueError(f"prompt: {len(prompt)} tokens and max_tokens {own.max_tokens} exceed the context of {room}")
    if not isinstance(request.priority, int) or not -PRIORITIES <= request.priority <= PRIORITIES:
        raise ValueError(f"priority: expected an integer from -{PRIORITIES} to {PRIORITIES}, got {request.priority!r}")
    if own.speculate and not options.drafts:
        raise ValueError("speculate: is True, but nothing drafts: the model has no MTP module, or drafts are off")
    if any(id >= vocab for id, _ in own.logit_bias):
        raise ValueError(f"logit_bias: expected token ids from 0 to {vocab - 1}")
    if own.grammar is not None and tokenizer is None:
        raise ValueError("grammar: needs a tokenizer")
