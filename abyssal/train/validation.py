"""How well held-out text is predicted, in nats a token and in bits a byte."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from abyssal.data import Batch, Split, Tokenizer, TokenSet, validation_batches
from abyssal.model.objective import Measured, Microbatch


@dataclass(frozen=True)
class Validation:
    """Over all predicted tokens: every one but the first of a sequence."""

    loss: float  # nats a token
    bits_per_byte: float  # of the UTF-8 text that the predicted tokens stand for
    tokens: int
    bytes: int
    expert_load: list[list[float]]  # a layer with experts: each expert's load, in mean loads
    mtp_accuracy: list[float]  # an MTP module: the share of positions whose token 1 + d places on it would guess
    mtp_accepted: list[float]  # the same of those where the main model and the modules before guessed right

    def to_dict(self) -> dict[str, Any]:
        load = [[round(x, 3) for x in layer] for layer in self.expert_load]
        return {"loss": self.loss, "bits_per_byte": self.bits_per_byte, "tokens": self.tokens, "bytes": self.bytes,
                "expert_load": load, "mtp_accuracy": self.mtp_accuracy, "mtp_accepted": self.mtp_accepted}  # fmt: skip


class Validator:
    """The same held-out tokens every time: the first `most` of the split, whose bytes are known."""

    def __init__(self, token_set: TokenSet, most: int, batch_tokens: int, sequence: int, modules: int = 0) -> None:
        """`modules`: the model's MTP modules, whose accuracy is measured too."""
        self.modules = modules
        self.batches = _first(token_set.split("validation"), most, batch_tokens, sequence)
        self._bytes_of = _bytes_of(Tokenizer.load(token_set.tokenizer), token_set.vocab_size)

    @classmethod
    def of(cls, batches: list[Batch], tokenizer: Tokenizer, modules: int = 0) -> "Validator":
        """Of any batches of this tokenizer's tokens."""
        made = cls.__new__(cls)
        made.modules, made.batches, made._bytes_of = modules, batches, _bytes_of(tokenizer, tokenizer.vocab_size)
        return made

    def measure(self, measured: Callable[[Microbatch], Measured]) -> Validation:
        """A pass over the tokens, of which `measured` is what a batch, on the CPU, comes to. Losses are summed in
        float64."""
        found: list[Measured] = []
        tokens = size = 0
        for batch in self.batches:
            micro = Microbatch.of(batch, self.modules)
            inside = micro.weights[0] > 0
            tokens += int(inside.sum())
            size += int(self._bytes_of[micro.targets[0][inside]].sum())
            found.append(measured(micro))
        total = float(sum(m.nats for m in found))
        counts = torch.stack([m.counts for m in found]).sum(0) if found else torch.zeros(0, 1)
        load = [(c / c.double().mean()).tolist() for c in counts]
        hits = torch.stack([m.hits for m in found]).sum(0).tolist() if found else []
        accuracy = [right / max(count, 1) for count, right, _, _ in hits]
        accepted = [kept / max(before, 1) for _, _, before, kept in hits]
        bits = total / math.log(2) / max(size, 1)
        return Validation(total / max(tokens, 1), bits, tokens, size, load, accuracy, accepted)


def _first(split: Split, most: int, batch_tokens: int, sequence: int) -> list[Batch]:
    batches = []
    left = most
    for batch in validation_batches(split, min(batch_tokens, most), sequence):
        if left < len(batch.tokens):
            break
        batches.append(batch)
        left -= len(batch.tokens)
    return batches


def _bytes_of(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """[vocab] int64: the bytes of text that each token stands for; the tokens that begin and end a text stand for
    none."""
    sizes = torch.zeros(vocab_size, dtype=torch.int64)
    for token in range(vocab_size):
        try:
            sizes[token] = len(tokenizer.token_bytes(token))
        except ValueError:  # an id that the tokenizer lacks
            continue
    for edge in (tokenizer.bos_id, tokenizer.eos_id):
        if edge is not None:
            sizes[edge] = 0
    return sizes
