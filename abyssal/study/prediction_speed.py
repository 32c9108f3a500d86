"""What drafts gain in speed: measured by the engine, and what arithmetic says of it.

A step with k drafts makes 1 + Σ (share of the drafts accepted up to each place) tokens. It costs one pass of the main
model over 1 + k tokens, where a plain one has a pass over one, and the modules' passes. Two bounds of that:

    waiting   a pass takes as long as its weights take to be read, however many tokens share them: a step costs
              1 + k·m plain ones, m being a module's work for a token over the main model's
    working   every token costs its products: 1 + k for the main model, and m for each row of a module

Large models that decode few sequences wait; many sequences, and CPUs, are nearer to working.
"""

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from abyssal.config import ModelConfig
from abyssal.costs import inspect
from abyssal.data import Tokenizer
from abyssal.engine import LLM, Sampling
from abyssal.model.transformer import Transformer

PASSES = 3  # alternating, of which the median counts


class Timed(NamedTuple):
    """One number of sequences at once, and of drafts a step."""

    batch: int
    drafts: int
    tokens_per_second: float  # of decoding, all sequences together
    tokens_a_step: float  # of one sequence


def timed(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[list[int]], batch: int, drafts: Sequence[int],
    tokens: int,
) -> list[Timed]:  # fmt: skip
    """Greedy texts of `tokens` that go on from the prompts, `batch` at once; one result for each number of drafts. The
    decoding step is not compiled: that takes longer than the texts do."""
    context = max(map(len, prompts)) + tokens
    engines = [
        LLM(model, tokenizer=tokenizer, max_batch=batch, drafts=k, adapt=False, compiled=False, prefix_cache=False,
            max_context=context)
        for k in drafts
    ]  # fmt: skip
    rates: list[list[float]] = [[] for _ in engines]
    for once in range(PASSES + 1):
        for llm, own in zip(engines, rates):
            llm.generate(list(prompts), Sampling(max_tokens=tokens, temperature=0, ignore_eos=True))
            if once:  # the first pass warms up
                own.append(llm.totals.tokens_per_second)
    found = []
    for k, llm, own in zip(drafts, engines, rates):
        at = llm.totals
        a_step = 1 + sum(at.accepted_at) / max(at.drafted_at[0] if at.drafted_at else 1, 1)
        found.append(Timed(batch, k, median(own), a_step))
    return found


class Cost(NamedTuple):
    """Of a step with drafts, in plain steps."""

    waiting: float
    working: float


def module_share(config: ModelConfig, context: int) -> float:
    """One MTP module's products for a token, its head's counted, over the main model's."""
    flops = inspect(config, context).flops
    return flops.decoding_mtp / config.num_nextn_predict_layers / flops.decoding


def cost(config: ModelConfig, drafts: int, context: int) -> Cost:
    """See the head of this file. Module d has 1 + drafts + (d - 1) rows a step (`engine/decode.py`); drafts beyond the
    modules one row each."""
    modules, share = config.num_nextn_predict_layers, module_share(config, context)
    rows = sum(drafts + d if d <= modules else 1 for d in range(1, drafts + 1))
    return Cost(1 + drafts * share, 1 + drafts + rows * share)
