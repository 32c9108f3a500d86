"""A step that is on its way: what came of it, for whoever waits, and how long the device took."""

from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.engine.decode import Decoded, Kind


@dataclass(frozen=True)
class Result:
    """What one sequence got of a step, on the host."""

    accepted: int
    token: int  # -1: its logits were not finite
    verified: list[int]  # the drafts that were looked at
    drafts: list[int]  # for the next step
    logprobs: list[tuple[float, list[tuple[int, float]]]] | None  # of accepted drafts and the token, with the likeliest


class Lap:
    """When the device began with a step and when it was done, by its own clock; where there is none, it says
    nothing."""

    def __init__(self, device: torch.device) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self._begun = False

    def begin(self) -> None:
        """Just before the first of the step's kernels; later calls are ignored."""
        if self._events and not self._begun:
            self._events[0].record()
        self._begun = True

    def end(self) -> None:
        if self._events:
            self._events[1].record()

    def wait(self) -> None:
        if self._events:
            self._events[1].synchronize()

    def seconds(self) -> float:
        """Of the step, which must be over."""
        return self._events[0].elapsed_time(self._events[1]) / 1e3 if self._events else 0.0

    def since(self, before: "Lap") -> float:
        """From the end of the step before to the beginning of this one."""
        return before._events[1].elapsed_time(self._events[0]) / 1e3 if self._events else 0.0


class Pending:
    """A step that has been enqueued."""

    def __init__(self, decoded: Decoded, count: int, kind: Kind, cuda: bool) -> None:
        self.kind = kind
        self._event = torch.cuda.Event() if cuda else None
        self._tensors = [None if t is None else self._fetch(t[:count], cuda) for t in decoded]
        if self._event is not None:
            self._event.record()

    @staticmethod
    def _fetch(t: Tensor, cuda: bool) -> Tensor:
        if not cuda:
            return t
        host = torch.empty(t.shape, dtype=t.dtype, pin_memory=True)
        return host.copy_(t, non_blocking=True)

    def read(self) -> list[Result]:
        """Waits for the step, and for nothing that was enqueued after it."""
        if self._event is not None:
            self._event.synchronize()
        told, logprob, ids, top = self._tensors
        assert told is not None
        results = []
        verified = self.kind.width - 1
        for s, (accepted, token, *drafts) in enumerate(told.tolist()):
            said = None
            if logprob is not None and ids is not None and top is not None:
                said = [
                    (float(logprob[s, i]), list(zip(ids[s, i].tolist(), top[s, i].tolist())))
                    for i in range(accepted + 1)
                ]
            results.append(Result(accepted, token, drafts[:verified], drafts[verified:], said))
        return results
