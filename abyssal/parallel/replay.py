"""A microbatch's forward and backward passes as one CUDA graph: its thousands of launches become one.

Where a model is small the host needs longer to launch a step than the GPU to compute it; more so where parameters are
gathered and summed between. What is launched depends on shapes and on what the host decides, so a graph is of a `Kind`.
Batches are filled up with empty sequences, so that few kinds differ, and on all ranks of a run alike: what they do
together NCCL lets all of them capture, or none. Graphs share one pool of memory, since one runs after the other;
gradients alone stay in it between two runs.

The host goes through a capture as through a pass; afterwards it has seen gradients appear where later runs will write
them again. `snapshot` is told after a capture and returns what puts that state back after each run.
"""

import dataclasses
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from abyssal.model.objective import LossScales, Microbatch, Totals

WARM = 2  # passes of a kind before it is captured: kernels are compiled and workspaces made, which a capture may not
Work = Callable[[Microbatch, Totals], Tensor]  # passes over a batch on the device; sums of losses
Snapshot = Callable[[], Callable[[], None]]
MOST = 4  # graphs that are kept, each with gradients of its own
STALE = 64  # passes without a graph, after which another may have its place


def own_stream(device: torch.device) -> None:
    """Lets what this thread computes from now on go to a stream of its own: the default one cannot be captured, and
    gradients are added up on the stream that they first appeared on."""
    if torch.cuda.current_stream(device) == torch.cuda.default_stream(device):
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.default_stream(device))
        torch.cuda.set_stream(stream)


class Kind(NamedTuple):
    """What a graph is of."""

    tokens: int
    sequences: int
    max_len: int
    modules: int  # MTP
    first: bool  # of a step: gradients are set, later ones added to them
    scales: LossScales


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    sums: Tensor
    restore: Callable[[], None]


class Replay:
    """Passes that are captured when their kind has been seen `WARM` times, and replayed from then on. A kind whose
    passes wait for the device, as the plain paths of some operations do, is never captured. Hooks are those of the
    capture.
    """

    def __init__(self, snapshot: Snapshot, most: Callable[[Tensor], Tensor] = lambda sizes: sizes) -> None:
        """`most`: of integers on the CPU the largest over all ranks, each by itself."""
        self._snapshot, self._most = snapshot, most
        self._seen: Counter[Kind] = Counter()
        self._waiting: set[Kind] = set()
        self._captured: OrderedDict[Kind, _Graph] = OrderedDict()  # the least recently used first
        self._used: dict[Kind, int] = {}
        self._passes = 0
        self._pool: Any = None

    def alike(self, microbatches: Sequence[Microbatch]) -> list[Microbatch]:
        """A step's microbatches, filled up as on all ranks; as they are where they are of pieces."""
        if any(_of_pieces(m) for m in microbatches):
            return list(microbatches)
        sizes = torch.tensor([[m.packing.sequences, m.packing.max_len] for m in microbatches], dtype=torch.int64)
        return [filled_up(m, *size) for m, size in zip(microbatches, self._most(sizes).tolist(), strict=True)]

    def __call__(
        self, work: Work, micro: Microbatch, totals: Totals, scales: LossScales, first: bool, device: torch.device
    ) -> Tensor:
        """`work(micro, totals)` of a batch on the CPU, made `alike`; by itself where it is of pieces, which differ in
        more."""
        if _of_pieces(micro):
            return work(micro.to(device), totals)
        packing = micro.packing
        kind = Kind(
            micro.tokens.shape[0], packing.sequences, packing.max_len, len(micro.targets) - 1, first, scales
        )  # fmt: skip
        self._passes += 1
        if kind in self._waiting or (kind not in self._captured and not self._room()):
            return work(micro.to(device), totals)
        if kind not in self._captured:
            self._seen[kind] += 1
            if self._seen[kind] < WARM:
                return work(micro.to(device), totals)
            if self._seen[kind] == WARM:
                with waits() as found_waiting:
                    sums = work(micro.to(device), totals)
                if int(self._most(torch.tensor(len(found_waiting)))):  # on any rank
                    self._waiting.add(kind)
                return sums
            if len(self._captured) >= MOST:
                self._captured.popitem(last=False)[1].graph.reset()
            self._captured[kind] = self._capture(work, micro, totals, device)
        self._captured.move_to_end(kind)
        self._used[kind] = self._passes
        found = self._captured[kind]
        for own, new in zip(found.inputs, tensors_of(micro, totals), strict=True):
            own.copy_(new.pin_memory() if new.device.type == "cpu" else new, non_blocking=True)
        found.graph.replay()
        found.restore()
        return found.sums.clone()

    @property
    def kinds(self) -> list[Kind]:
        """That are captured."""
        return list(self._captured)

    def clear(self) -> None:
        """Lets go of all graphs. NCCL does not end a group while a graph knows of it."""
        for found in self._captured.values():
            found.graph.reset()
        self._captured.clear()
        self._pool = None

    def _room(self) -> bool:
        """Whether a graph more may be captured: fewer are kept than may be, or one has long not been used."""
        return len(self._captured) < MOST or self._passes - self._used[next(iter(self._captured))] > STALE

    def _capture(self, work: Work, micro: Microbatch, totals: Totals, device: torch.device) -> _Graph:
        own = micro.to(device)
        own = dataclasses.replace(own, sequences=counted(own, totals.sequences.dtype).to(device))
        kept = Totals(totals.tokens.clone(), totals.weights.clone(), totals.sequences.clone())
        graph, self._pool = torch.cuda.CUDAGraph(), self._pool or torch.cuda.graph_pool_handle()
        # Other threads pin memory and write states meanwhile, which only a capture of all threads would forbid.
        with torch.cuda.graph(
            graph, self._pool, torch.cuda.current_stream(device), capture_error_mode="thread_local"
        ):  # fmt: skip
            sums = work(own, kept)
        return _Graph(graph, tensors_of(own, kept), sums, self._snapshot())


@contextmanager
def waits() -> Iterator[list[str]]:
    """What torch says of waiting for the device, within this."""
    found: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for each in said:
        text = str(each.message)
        if "synchronizing CUDA operation" in text:
            found.append(text)
        elif "Synchronization debug mode" not in text:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def filled_up(micro: Microbatch, sequences: int = 0, longest: int = 0) -> Microbatch:
    """The same tokens; as many sequences as the next power of two, the further ones empty, and such a bound of their
    lengths; of the numbers given where these are larger."""
    packing = micro.packing
    missing = _power(max(packing.sequences, sequences)) - packing.sequences
    cu_seqlens = torch.cat((packing.cu_seqlens, packing.cu_seqlens[-1:].expand(missing)))
    longest = min(_power(max(packing.max_len, longest)), micro.tokens.shape[0])
    return dataclasses.replace(micro, packing=dataclasses.replace(packing, cu_seqlens=cu_seqlens, max_len=longest))


def counted(micro: Microbatch, dtype: torch.dtype) -> Tensor:
    """`[1 + modules]`: sequences a depth."""
    counts = micro.sequences
    return counts if isinstance(counts, Tensor) else torch.tensor(counts, dtype=dtype)


def tensors_of(micro: Microbatch, totals: Totals) -> list[Tensor]:
    """All that passes read."""
    packing = micro.packing
    whole: Sequence[Tensor] = (micro.tokens, packing.cu_seqlens, packing.positions)
    of_step = (counted(micro, totals.sequences.dtype), totals.tokens, totals.weights, totals.sequences)
    return [*whole, *micro.targets, *micro.weights, *micro.live, *of_step]


def _of_pieces(micro: Microbatch) -> bool:
    return micro.spans is not None or micro.packing.context_rows is not None


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
