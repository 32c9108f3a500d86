"""What the engine's worker and its client say to each other: JSON, a line a message, and nothing that could be run."""

import json
from dataclasses import asdict
from typing import Any

from abyssal.engine.request import Inside, Output, Piece, TokenLogprob
from abyssal.engine.sampling import Grammar, Sampling


def line(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def from_sampling(sampling: Sampling) -> dict[str, Any]:
    return asdict(sampling)


def to_sampling(plain: dict[str, Any]) -> Sampling:
    """Raises ValueError or TypeError naming the field."""
    grammar = plain.pop("grammar")
    return Sampling(**plain, grammar=None if grammar is None else Grammar(**grammar))


def from_piece(piece: Piece) -> dict[str, Any]:
    """Short names, and only what there is: a step may bring hundreds."""
    plain: dict[str, Any] = {"i": piece.index}
    if piece.sample:
        plain["s"] = piece.sample
    if piece.tokens:
        plain["k"] = piece.tokens
    if piece.spans:
        plain["p"] = piece.spans
    if piece.logprobs:
        plain["l"] = [(l.token, l.logprob, l.top) for l in piece.logprobs]
    if piece.inside is not None:
        plain["n"] = vars(piece.inside)
    if piece.output is not None:
        o = piece.output
        asked, further = o.logprobs, o.prompt_logprobs
        plain["o"] = {
            "tokens": o.tokens, "text": o.text, "finish": o.finish, "error": o.error, "cached_tokens": o.cached_tokens,
            "stop": o.stop, "logprobs": None if asked is None else [(l.token, l.logprob, l.top) for l in asked],
            "prompt_logprobs": None if further is None else [
                None if l is None else (l.token, l.logprob, l.top) for l in further
            ],
        }  # fmt: skip
    return plain


def to_piece(plain: dict[str, Any], prompt: list[int]) -> Piece:
    """`prompt`, which only one side need keep."""
    spans = tuple((text, drafted) for text, drafted in plain.get("p", ()))
    sample, output = plain.get("s", 0), None
    if "o" in plain:
        o = plain["o"]
        asked, further = o.pop("logprobs"), o.pop("prompt_logprobs")
        output = Output(
            prompt_tokens=prompt, sample=sample,
            logprobs=None if asked is None else [_logprob(l) for l in asked],
            prompt_logprobs=None if further is None else [None if l is None else _logprob(l) for l in further],
            **o,
        )  # fmt: skip
    inside = Inside(**plain["n"]) if "n" in plain else None
    return Piece(
        plain["i"], "".join(text for text, _ in spans), output, sample, tuple(plain.get("k", ())), spans,
        tuple(_logprob(l) for l in plain.get("l", ())), inside,
    )  # fmt: skip


def _logprob(plain: list[Any]) -> TokenLogprob:
    token, logprob, top = plain
    return TokenLogprob(token, logprob, [(id, value) for id, value in top])
