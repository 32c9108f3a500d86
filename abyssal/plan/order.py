"""A pipeline schedule played through in time: how long ranks wait, and how many microbatches wait in them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

# How long the parts of a pass take, in forward passes of a stage.
TIMES = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}


Part = tuple[int, str, int]  # stage, kind, microbatch


class Order(NamedTuple):
    bubble: float  # the share of the time in which a rank has nothing to do, in the mean
    parts: list[list[Part]]  # a rank: what it does, in order

    def waiting(self, rank: int) -> int:
        """Forward passes of a rank's stages whose backward pass is yet to come, at most."""
        return self.held(rank, dict.fromkeys({stage for stage, _, _ in self.parts[rank]}, 1))

    def held(self, rank: int, kept: Mapping[int, int]) -> int:
        """What they keep at most, if one of stage s keeps `kept[s]`; it goes when its weights' gradients are there."""
        most = now = 0
        split = any(kind == "W" for _, kind, _ in self.parts[rank])
        for stage, kind, _ in self.parts[rank]:
            if kind == "F":
                now += kept[stage]
            elif kind == "B" or kind == ("W" if split else "I"):
                now -= kept[stage]
            most = max(most, now)
        return most


def order_of(schedule: Any, name: str, ranks: int, microbatches: int, halves: bool) -> Order:
    """Of one of torch's schedules, whose name in a run's configuration is `name`. Without `halves` a backward pass that
    the schedule splits is done whole where its first half would be."""
    if name in ("gpipe", "1f1b"):  # torch's own list is for display, and one off for the last rank (2.13)
        return play({rank: _one_stage(rank, ranks, microbatches, name == "gpipe") for rank in range(ranks)})
    orders = {rank: [p for a in actions for p in _parts(a)] for rank, actions in schedule.pipeline_order.items()}
    if not halves:
        orders = {r: [(s, "B" if k == "I" else k, m) for s, k, m in parts if k != "W"] for r, parts in orders.items()}
    return play({rank: orders[rank] for rank in range(ranks)})


def _one_stage(rank: int, ranks: int, microbatches: int, all_first: bool) -> list[Part]:
    """All forward passes and then all backward; or as few forward passes ahead as keep every rank at work."""
    ahead = microbatches if all_first else min(microbatches, ranks - rank)
    parts = [(rank, "F", m) for m in range(ahead)]
    for m in range(microbatches):
        parts.append((rank, "B", m))
        if ahead + m < microbatches:
            parts.append((rank, "F", ahead + m))
    return parts


def play(parts: dict[int, list[Part]]) -> Order:
    """`parts`: what each rank does, in order; kinds "F" forward, "B" backward, or its halves "I" (of the input) and
    "W" (of the weights).

    A forward pass waits for that of the stage before, a backward pass for that of the stage after.
    Raises ValueError if ranks wait for each other.
    """
    last = max(stage for actions in parts.values() for stage, _, _ in actions)
    ended: dict[Part, float] = {}
    clock, place = dict.fromkeys(parts, 0.0), dict.fromkeys(parts, 0)
    work = dict.fromkeys(parts, 0.0)
    while any(place[r] < len(parts[r]) for r in parts):
        moved = False
        for rank, actions in parts.items():
            while place[rank] < len(actions):
                stage, kind, micro = actions[place[rank]]
                need = _needed(stage, kind, micro, last)
                if need is not None and need not in ended:
                    break
                start = max(clock[rank], 0.0 if need is None else ended[need])
                clock[rank] = start + TIMES[kind]
                work[rank] += TIMES[kind]
                ended[stage, "F" if kind == "F" else "W" if kind == "W" else "B", micro] = clock[rank]
                place[rank] += 1
                moved = True
        if not moved:
            raise ValueError("the schedule's ranks wait for each other")
    whole = max(clock.values())
    return Order(1 - sum(work.values()) / (whole * len(work)), [parts[rank] for rank in sorted(parts)])


def _parts(action: Any) -> list[Part]:
    """An action's computations, one by one: (stage, kind, microbatch)."""
    if action is None:
        return []
    if action.sub_actions is not None:
        return [part for sub in action.sub_actions for part in _parts(sub)]
    kind = action.computation_type.value
    return [(action.stage_index, kind, action.microbatch_index)] if kind in TIMES else []


def _needed(stage: int, kind: str, micro: int, last: int) -> Part | None:
    """What must have ended before."""
    if kind == "F":
        return (stage - 1, "F", micro) if stage else None
    if kind == "W":
        return (stage, "B", micro)
    return (stage + 1, "B", micro) if stage < last else (stage, "F", micro)
