"""Log-probabilities of tokens that follow tokens, many pairs at once: exactly what a forward pass says.

What inputs begin with alike is computed once: see `prefixes.py`. Passes are packed, and the head is computed for the
rows that are asked about.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from abyssal.evaluate.prefixes import LEAST, common, states_of
from abyssal.model.transformer import Transformer
from abyssal.ops.cross_entropy import CHUNK_LOGITS


@dataclass(frozen=True)
class Pair:
    """What is asked: how likely are `targets` after `context`. Neither is empty."""

    context: tuple[int, ...]
    targets: tuple[int, ...]


def pass_tokens(device: torch.device) -> int:
    """How many a pass takes where nobody says."""
    return 32768 if device.type == "cuda" else 4096


class Scored(NamedTuple):
    """Of a pair's targets."""

    logprob: float  # Σ log p, nats
    greedy: bool  # whether each is the likeliest token where it stands


class _Row(NamedTuple):
    """Rows `begin` to `end` of an input predict the pair's targets."""

    pair: int
    begin: int
    end: int


def fitted(pair: Pair, most: int) -> tuple[tuple[int, ...], int]:
    """The input that a pair is scored on: all its tokens but the last, the first left out where they are more than
    `most`; and how many are left out. Raises ValueError if the pair has no targets, or more than `most`."""
    if not pair.targets or not pair.context:
        raise ValueError("request: expected a context and a continuation of at least one token each")
    if len(pair.targets) > most:
        raise ValueError(f"request: a continuation of {len(pair.targets)} tokens exceeds the context of {most}")
    whole = (*pair.context, *pair.targets)[:-1]
    return whole[-most:], max(len(whole) - most, 0)


def score(
    model: Transformer, pairs: Sequence[Pair], most: int, batch_tokens: int
) -> Iterator[list[tuple[int, Scored]]]:
    """Each pair's place and score, a batch at a time, in no order. No pass has, or attends to, more than `batch_tokens`
    tokens, or one sequence; no sequence has more than `most`."""
    inputs = [fitted(pair, most)[0] for pair in pairs]
    hosts: list[tuple[tuple[int, ...], list[_Row]]] = []
    # Sorted, what begins others stands before them: an input is a part of the next one, or of none.
    for i in sorted(range(len(pairs)), key=inputs.__getitem__, reverse=True):
        own = inputs[i]
        row = _Row(i, len(own) - len(pairs[i].targets), len(own))
        if hosts and hosts[-1][0][: len(own)] == own:
            hosts[-1][1].append(row)
        else:
            hosts.append((own, [row]))
    at = 0
    while at < len(hosts):
        end, total = at + 1, len(hosts[at][0])
        while end < len(hosts):
            shared = common(hosts[end - 1][0], hosts[end][0])
            total += len(hosts[end][0]) - (shared if shared >= LEAST else 0)
            if total > batch_tokens:
                break
            end += 1
        yield _batch(model, pairs, hosts[at:end], batch_tokens)
        at = end


@torch.no_grad()
def _batch(
    model: Transformer,
    pairs: Sequence[Pair],
    hosts: Sequence[tuple[tuple[int, ...], list[_Row]]],
    most: int,
) -> list[tuple[int, Scored]]:
    states, places = states_of(model, [own for own, _ in hosts], most)
    rows: list[int] = []
    targets: list[int] = []
    parts: list[tuple[int, int]] = []
    for (_, asked), own in zip(hosts, places):
        for row in asked:
            rows += own[row.begin : row.end].tolist()
            targets += pairs[row.pair].targets
            parts.append((row.pair, row.end - row.begin))
    logprobs, likeliest = _of_rows(model, states, torch.tensor(rows, device=states.device), torch.tensor(targets))
    found, begin = [], 0
    for pair, count in parts:
        own_rows = slice(begin, begin + count)
        found.append((pair, Scored(float(logprobs[own_rows].sum()), bool(likeliest[own_rows].all()))))
        begin += count
    return found


def _of_rows(model: Transformer, states: Tensor, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """[n] float64: log p of each row's target; [n] bool: whether it is the likeliest. Never holds all logits."""
    step = max(CHUNK_LOGITS // model.config.vocab_size, 1)
    logprobs, likeliest = [], []
    for some, wanted in zip(rows.split(step), targets.to(rows.device).split(step)):
        logits = model.logits(states[some])
        own = logits.gather(1, wanted[:, None]).squeeze(1)
        logprobs.append((own - logits.logsumexp(-1)).double().cpu())
        likeliest.append((logits.argmax(-1) == wanted).cpu())
    return torch.cat(logprobs), torch.cat(likeliest)
