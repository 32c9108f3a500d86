"""What a trained run says of its experts: how it predicts with some of them taken out, and what they take."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from abyssal.data import Batch
from abyssal.model.experts import MoE
from abyssal.model.objective import Measured, Microbatch
from abyssal.model.transformer import Transformer
from abyssal.study import balance_measure
from abyssal.study.experts_alike import alike, combined, tells_of_token
from abyssal.study.experts_disable import routed_otherwise
from abyssal.study.experts_shapes import Shape
from abyssal.study.experts_tokens import Seen, Taker, takers
from abyssal.study.texts import Texts
from abyssal.study.trained import Trained
from abyssal.train.validation import Validator

PACKED = 4096  # tokens that are measured together
SAMPLE = 256  # tokens whose experts' outputs are compared


class Found(NamedTuple):
    """Of one run with experts. Lists are by layer, but for `disabled`."""

    balance: balance_measure.Found  # loads, MaxVio, what an expert tells of the kind of text
    disabled: list[float]  # bits a byte without as many large experts, or their parts, as the study's levels say
    without_first: float  # bits a byte without the one routed expert that each token would pick first
    replaced: float | None  # bits a byte without the shared expert and with one more routed one
    cosine: list[float]  # of two experts' outputs for the same token
    cosine_together: list[float] | None  # of two that the token picked together
    combinations: list[int]  # sets of experts that were met
    effective: list[float]  # as many, were all equally frequent
    tells_of_token: list[float]  # bits
    tells_by_chance: list[float]

    @property
    def rise(self) -> float:
        """Bits a byte that disabling costs, a mean over the levels."""
        return sum(self.disabled[1:]) / len(self.disabled[1:]) - self.disabled[0]


class Measurer:
    """Measures runs on the same held-out texts. `levels`: how many large experts are masked, 0 first; of a shape whose
    experts are cut into `parts`, as many times as many."""

    def __init__(self, texts: Texts, levels: Sequence[int], parts: int, vocab: int, device: str) -> None:
        self.texts, self.levels, self.parts, self.vocab, self.device = texts, levels, parts, vocab, device
        self.batches = [pack for batches in texts.held_out.values() for pack in packed(batches)]
        self.validator = Validator.of(self.batches, texts.tokenizer)

    def masked(self, shape: Shape) -> list[int]:
        """Experts that are masked at each level."""
        return [level * (self.parts if shape.name.startswith("fine") else 1) for level in self.levels]

    @torch.no_grad()
    def found(self, run: Trained, shape: Shape) -> Found:
        model = self.model(run)
        seen = self.seen(model)
        disabled = [self.bits(model, masked=n) for n in self.masked(shape)]
        at = torch.linspace(0, len(seen.tokens) - 1, SAMPLE).long().unique()
        layers = [layer.experts for layer in _layers(model)]
        pairs = [alike(e, x[at], i[at]) for e, x, i in zip(layers, seen.inputs, seen.indices)]
        together = [pair.together for pair in pairs if pair.together is not None]
        sets = [combined(indices) for indices in seen.indices]
        told = [tells_of_token(i, seen.tokens, e.w1.shape[0], self.vocab) for e, i in zip(layers, seen.indices)]
        return Found(
            balance=balance_measure.measured(run),
            disabled=disabled,
            without_first=self.bits(model, masked=1),
            replaced=self.bits(model, more=1, shared=False) if shape.shared else None,
            cosine=[pair.all for pair in pairs],
            cosine_together=together or None,
            combinations=[both.met for both in sets],
            effective=[both.effective for both in sets],
            tells_of_token=[bits for bits, _ in told],
            tells_by_chance=[bits for _, bits in told],
        )

    def model(self, run: Trained) -> Transformer:
        return run.model().to(self.device)

    @torch.no_grad()
    def bits(self, model: Transformer, masked: int = 0, more: int = 0, shared: bool = True) -> float:
        """Bits a byte of the held-out texts, routed as `routed_otherwise` says."""

        def measured(micro: Microbatch) -> Measured:
            return Measured.of(model, micro.to(torch.device(self.device)))

        with routed_otherwise(model, masked, more, shared):
            return self.validator.measure(measured).bits_per_byte

    @torch.no_grad()
    def seen(self, model: Transformer) -> Seen:
        """One pass over the held-out texts, everything on the CPU."""
        layers = _layers(model)
        indices: list[list[Tensor]] = [[] for _ in layers]
        weights: list[list[Tensor]] = [[] for _ in layers]
        inputs: list[list[Tensor]] = [[] for _ in layers]
        hooks = [
            layer.register_forward_pre_hook(lambda _, given, into=into: into.append(given[0].cpu()))
            for layer, into in zip(layers, inputs)
        ]
        try:
            for batch in self.batches:
                micro = Microbatch.of(batch, 0).to(torch.device(self.device))
                for gate, routing in enumerate(model.hidden(micro.tokens, micro.packing).routings):
                    indices[gate].append(routing.indices.cpu())
                    weights[gate].append(routing.weights.cpu())
        finally:
            for hook in hooks:
                hook.remove()
        lengths = torch.tensor([n for batch in self.batches for n in batch.lengths])
        starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        tokens = torch.cat([batch.tokens for batch in self.batches])
        together = [[torch.cat(parts) for parts in column] for column in (indices, weights, inputs)]
        return Seen(tokens, starts, *together)

    @torch.no_grad()
    def takers(self, run: Trained) -> list[list[Taker]]:
        """Which tokens each expert takes, layer by layer."""
        model = self.model(run)
        seen = self.seen(model)
        first = model.config.first_k_dense_replace
        return [
            takers(seen, gate, first + gate, layer.experts.w1.shape[0], self.vocab, self.texts.tokenizer)
            for gate, layer in enumerate(_layers(model))
        ]


def packed(batches: Sequence[Batch]) -> list[Batch]:
    """The same sequences, several a batch."""
    each = max(PACKED // max(len(batch.tokens) for batch in batches), 1)
    groups = [batches[i : i + each] for i in range(0, len(batches), each)]
    return [
        Batch(torch.cat([b.tokens for b in g]), [n for b in g for n in b.lengths], torch.cat([b.weights for b in g]))
        for g in groups
    ]


def _layers(model: Transformer) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]
