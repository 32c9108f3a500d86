"""What the ranks of a run settle between them, on the CPU and without waiting for a GPU."""

import secrets
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from abyssal.config import ConfigError

LONG = timedelta(days=1)  # that the others wait: the first rank may be making tokens, or writing a model


class Accord:
    """One process agrees with itself; of several, each makes the same calls in the same order."""

    def __init__(self, several: bool) -> None:
        """`several`: the process group is there, and all of its ranks make one."""
        self._group = dist.new_group(backend="gloo", timeout=LONG) if several else None
        self.first = not several or dist.get_rank() == 0
        self._asked: tuple[Any, Tensor] | None = None

    def stop(self, mine: signal.Signals | None) -> signal.Signals | None:
        """The signal on which every rank is to stop now, given the one that this rank received; asked before each
        step. One rank's is heard by all at the step after: the answer travels while a step is taken."""
        if self._group is None:
            return mine
        answer = 0
        if self._asked is not None:
            work, asked = self._asked
            work.wait()
            answer = int(asked)
        wish = torch.tensor(int(mine or 0))
        self._asked = (dist.all_reduce(wish, dist.ReduceOp.MAX, group=self._group, async_op=True), wish)
        return signal.Signals(answer) if answer else None

    def told(self, value: Any) -> Any:
        """The first rank's `value`."""
        if self._group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, group_src=0, group=self._group)
        return values[0]

    def all(self, value: Any) -> list[Any]:
        """Every rank's `value`, in their order."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values

    def most(self, numbers: Tensor) -> Tensor:
        """The largest over all ranks, of each of a tensor's numbers on the CPU."""
        if self._group is not None:
            numbers = numbers.clone()
            dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._group)
        return numbers

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first rank runs what is inside, then the others do. Where it fails there, they raise ConfigError."""
        if not self.first and (failed := self.told(None)):
            raise ConfigError(failed)
        try:
            yield
        except Exception as error:
            if self.first:
                self.told(str(error) or type(error).__name__)
            raise
        if self.first:
            self.told(None)

    def wait(self) -> None:
        """Returns when every rank is here."""
        if self._group is not None:
            dist.barrier(self._group)


def fresh(store: dist.Store, rank: int, world: int) -> dist.Store:
    """A part of the store that only these ranks know. torchrun's own outlives the ranks it restarts, and holds the
    addresses of those that died, which their successors would take for each other's."""
    if rank > 0:
        mine = secrets.token_hex(8)
        store.set(f"hello/{rank}", mine)
        part = store.get(f"answer/{mine}").decode()
        store.set(f"{part}/{rank}", "heard")
        return dist.PrefixStore(part, store)
    part = secrets.token_hex(8)
    silent = set(range(1, world))
    while silent:  # a greeting may be a dead rank's, so each is answered until it is known that it was heard
        for other in sorted(silent):
            if store.check([f"{part}/{other}"]):
                silent.discard(other)
            elif store.check([f"hello/{other}"]):
                store.set(f"answer/{store.get(f'hello/{other}').decode()}", part)
        time.sleep(0.01)
    return dist.PrefixStore(part, store)
