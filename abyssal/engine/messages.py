"""What the engine's worker and its client say to each other: JSON, a line a message, and nothing that could be run.

No line of the worker is long, so that who reads them waits for none: pieces are sent in groups of `GROUP` bytes, a
prompt's log-probabilities `ENTRIES` at a time and once a request, and an Output without what its pieces have said.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from abyssal.engine.request import Inside, Output, Piece, TokenLogprob
from abyssal.engine.sampling import Grammar, Sampling

GROUP = 1 << 16  # bytes of pieces in a line; a single one that is larger has a line of its own
ENTRIES = 4096  # log-probabilities of a prompt in a line

Logprobs = list[TokenLogprob | None]
Blamed = Literal["request", "grammar", "busy"]  # for a refusal; "busy": others, whose grammars are being compiled


def line(message: dict[str, Any]) -> bytes:
    return _bytes(message) + b"\n"


def from_sampling(sampling: Sampling) -> dict[str, Any]:
    return asdict(sampling)


def to_sampling(plain: dict[str, Any]) -> Sampling:
    """Raises ValueError or TypeError naming the field."""
    grammar = plain.pop("grammar")
    return Sampling(**plain, grammar=None if grammar is None else Grammar(**grammar))


# ---- the worker's side --------------------------------------------------------------------------------------------


def lines(pieces: Sequence[Piece], told: dict[int, int]) -> Iterator[bytes]:
    """`told`: for each request how many of its prompt's log-probabilities have been sent; it is kept up to date."""
    group: list[bytes] = []
    size = 0
    for piece in pieces:
        if piece.output is not None and piece.output.prompt_logprobs is not None:
            yield from _prompt(piece.index, piece.output.prompt_logprobs, told)
        own = _bytes(from_piece(piece))
        if group and size + len(own) > GROUP:
            yield _joined(group)
            group, size = [], 0
        group.append(own)
        size += len(own)
    if group:
        yield _joined(group)


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
        plain["l"] = [_plain(found) for found in piece.logprobs]
    if piece.inside is not None:
        plain["n"] = vars(piece.inside)
    if piece.output is not None:
        o = piece.output
        plain["o"] = {"finish": o.finish, "error": o.error, "cached_tokens": o.cached_tokens, "stop": o.stop}
        if o.prompt_logprobs is not None:
            plain["m"] = len(o.prompt_logprobs)
    return plain


def _prompt(id: int, found: Logprobs, told: dict[int, int]) -> Iterator[bytes]:
    """What of a prompt's log-probabilities has not been sent."""
    start = told.get(id, 0)
    told[id] = max(start, len(found))
    while start < len(found):
        width = 1 + max((len(one.top) for one in found[start : start + 2] if one is not None), default=0)
        part = found[start : start + max(1, ENTRIES // width)]
        start += len(part)
        yield line({"prompt": [id, [None if one is None else _plain(one) for one in part]]})


def _plain(found: TokenLogprob) -> tuple[int, float, list[tuple[int, float]]]:
    return found.token, found.logprob, found.top


def _bytes(plain: dict[str, Any]) -> bytes:
    return json.dumps(plain, separators=(",", ":")).encode()


def _joined(group: list[bytes]) -> bytes:
    return b'{"pieces":[' + b",".join(group) + b"]}\n"


# ---- the client's side --------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """What the pieces of one sample have said so far."""

    tokens: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Assembly:
    """Makes the pieces of one request whole again."""

    def __init__(self, prompt: list[int], sampling: Sampling) -> None:
        self._prompt, self._asked = prompt, sampling.logprobs is not None
        self._samples: dict[int, Sample] = {}
        self._prompt_logprobs: Logprobs = []

    def prompt(self, part: list[Any]) -> None:
        """Further log-probabilities of the prompt."""
        self._prompt_logprobs += [None if plain is None else _logprob(plain) for plain in part]

    def piece(self, plain: dict[str, Any]) -> Piece:
        number = plain.get("s", 0)
        spans = tuple((text, drafted) for text, drafted in plain.get("p", ()))
        text, tokens = "".join(text for text, _ in spans), tuple(plain.get("k", ()))
        logprobs = tuple(_logprob(found) for found in plain.get("l", ()))
        sample = self._samples.setdefault(number, Sample())
        sample.tokens += tokens
        sample.text.append(text)
        sample.logprobs += logprobs
        output = self._output(number, plain) if "o" in plain else None
        inside = Inside(**plain["n"]) if "n" in plain else None
        return Piece(plain["i"], text, output, number, tokens, spans, logprobs, inside)

    def _output(self, number: int, plain: dict[str, Any]) -> Output:
        sample, further = self._samples.pop(number), None
        if "m" in plain:
            whole = len(self._prompt_logprobs) == plain["m"]
            further = self._prompt_logprobs if whole else self._prompt_logprobs[: plain["m"]]
        return Output(
            prompt_tokens=self._prompt, tokens=sample.tokens, text="".join(sample.text), sample=number,
            logprobs=sample.logprobs if self._asked else None, prompt_logprobs=further, **plain["o"],
        )  # fmt: skip


def _logprob(plain: list[Any]) -> TokenLogprob:
    token, logprob, top = plain
    return TokenLogprob(token, logprob, [(id, value) for id, value in top])
