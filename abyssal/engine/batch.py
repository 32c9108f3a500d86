"""Who decodes together in a step, and what that step must be able to do."""

from collections.abc import Sequence as Several

import numpy as np
from numpy.typing import NDArray

from abyssal.engine.decode import Kind
from abyssal.engine.sequence import Sequence

LOGPROBS = (1, 5, 20)


def groups(decoding: Several[Sequence], drafts: int, wanted: bool) -> list[tuple[list[Sequence], int]]:
    """Those whose drafts are verified and those that get a token each, with the number of drafts; none that is empty.

    `wanted`: whether drafting pays now, for those who leave it to us.
    """
    drafting = [s for s in decoding if drafts and speculates(s, wanted)]
    plain = [s for s in decoding if not (drafts and speculates(s, wanted))]
    return [(group, count) for group, count in ((drafting, drafts), (plain, 0)) if group]


def speculates(s: Sequence, wanted: bool) -> bool:
    if s.cold or s.sampling.speculate is False:
        return False
    if s.sampling.speculate:
        return True
    # With a seed a text should hang on nothing else, and drafts come and go with the load.
    return wanted and (s.sampling.seed is None or s.sampling.greedy)


def kind_of(group: Several[Sequence], drafts: int, vocab: int) -> Kind:
    """The step of a group, over a vocabulary of `vocab`."""
    asked = [s.sampling.logprobs for s in group if s.sampling.logprobs is not None]
    return Kind(
        sequences=len(group),
        width=1 + drafts,
        drafts=drafts,
        greedy=all(s.sampling.greedy for s in group),
        masked=any(s.constraint is not None for s in group),
        biased=any(s.sampling.logit_bias for s in group),
        penalised=any(s.sampling.penalised for s in group),
        # In a few sizes: each is a graph of its own.
        logprobs=min(next((n for n in LOGPROBS if n >= max(asked)), max(asked)), vocab) if asked else None,
    )


def masks_of(
    group: Several[Sequence], drafts: int, words: int
) -> tuple[NDArray[np.int32], list[tuple[Sequence, str]]]:  # fmt: skip
    """`[S, 1 + drafts, words]`: a bit for each id that may come at each place, all where nothing is asked of a text;
    and those whose grammars can't go on, with the reason."""
    stuck = []
    masks = np.full((len(group), 1 + drafts, words), -1, dtype=np.int32)
    for rows, s in zip(masks, group):
        if s.constraint is not None:
            # Before it has drafts, its last token stands for them (`Slots.enter`).
            try:
                s.constraint.masks((s.drafts or [s.tokens[-1]] * drafts)[:drafts], rows)
            except (ValueError, RuntimeError) as error:
                rows[:] = -1
                stuck.append((s, str(error)))
    return masks, stuck
