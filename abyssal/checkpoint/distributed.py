"""A state in pieces: safetensors files that many ranks wrote at once, through torch.distributed.checkpoint.

A tensor lies in as many pieces as had owners, each with its place in the whole, in any of the folder's files; a reader
takes whichever part it wants, however it was cut. Whole tensors in one file are the same format. Beside them `FILES`
lists every file and its size, so that one that is missing or cut short is told by its name. Nothing in the folder is
a pickle, and nothing is read as one.
"""

import dataclasses
import json
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter, load, save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from abyssal.checkpoint.errors import CheckpointError
from abyssal.files import sync

FILES = "files.json"

_FILE_BYTES = 1 << 30  # of tensors: a file is put together in memory before it is written
_MAPPED_BYTES = 256 << 20  # the pages of a mapping count as the process's own for as long as it is mapped


class _Reader(HuggingFaceStorageReader):
    """Reads every header once."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata()
        return self._metadata


class StateFiles:
    """The tensors of a folder, by name.

    Raises CheckpointError naming the file that is missing, cut short, not listed, or not safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _check(folder)
        self._reader = _Reader(str(folder))
        try:
            metadata = self._reader.read_metadata()
        except (SafetensorError, OSError, KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{folder}: {error}") from None
        self._tensors = {k: m for k, m in metadata.state_dict_metadata.items() if isinstance(m, TensorStorageMetadata)}
        self._pieces: dict[str, list[tuple[list[int], Any]]] = {}  # of a tensor: where each begins, and what has it
        for index, place in metadata.storage_data.items():
            offset = list(index.offset or [0] * len(place.shape))
            self._pieces.setdefault(index.fqn, []).append((offset, place))
        self._opened: dict[str, Any] = {}
        self._mapped = 0
        for name, tensor in self._tensors.items():
            if not _fill([(list(c.offsets), list(c.sizes)) for c in tensor.chunks], list(tensor.size)):
                raise CheckpointError(f"{folder}: {name}: a piece is missing, or there twice")

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].size)

    def read(self, wanted: Mapping[str, Tensor]) -> None:
        """Fills tensors in place, of a DTensor the piece that is here, converting dtypes. Waits for no other rank.

        Raises CheckpointError for a name that is not there and for another shape.
        """
        for name, tensor in wanted.items():
            if name not in self._tensors:
                raise CheckpointError(f"{self.folder}: tensor {name} is missing")
            if self.shape(name) != tuple(tensor.shape):
                raise CheckpointError(
                    f"{self.folder}: tensor {name} is {list(self.shape(name))}, not {list(tensor.shape)}"
                )
        full = {name: t for name, t in wanted.items() if _local(t).numel()}
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                load(full, storage_reader=self._reader, no_dist=True)
        except CheckpointException as error:
            causes = "; ".join(str(cause) for cause, _ in error.failures.values())
            raise CheckpointError(f"{self.folder}: {causes}") from None

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of a tensor, or, of a scalar, the whole of it; on the CPU, as stored."""
        shape = self.shape(name)
        low, high = ([first, *[0] * (len(shape) - 1)], [last, *shape[1:]]) if shape else ([], [])
        out = torch.empty([b - a for a, b in zip(low, high)], dtype=self._tensors[name].properties.dtype)
        for offset, place in self._pieces[name]:
            start = [max(a, o) for a, o in zip(low, offset)]
            end = [min(b, o + n) for b, o, n in zip(high, offset, place.shape)]
            if all(a < b for a, b in zip(start, end)):
                inner = tuple(slice(a - o, b - o) for a, b, o in zip(start, end, offset))
                outer = tuple(slice(a - l, b - l) for a, b, l in zip(start, end, low))
                out[outer] = self._open(place.relative_path).get_slice(name)[inner]
        self._mapped += out.nbytes
        return out

    def _open(self, file: str) -> Any:
        if self._mapped > _MAPPED_BYTES:
            self._opened.clear()
            self._mapped = 0
        if file not in self._opened:
            self._opened[file] = safe_open(file, framework="pt")
        return self._opened[file]


def list_files(folder: Path) -> None:
    """Writes FILES; call it when all other files are there."""
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.name != FILES}
    (folder / FILES).write_text(json.dumps(sizes, indent=2) + "\n", "utf-8")


def _fill(pieces: list[tuple[list[int], list[int]]], shape: list[int]) -> bool:
    """Whether pieces, of which each has a beginning and a size, have every number of a shape once. They must lie in
    rows: pieces that share a part of the first dimension share all of it, and so on."""
    if not shape:
        return len(pieces) == 1
    rows: dict[tuple[int, int], list[tuple[list[int], list[int]]]] = {}
    for (start, *starts), (size, *sizes) in pieces:
        rows.setdefault((start, size), []).append((starts, sizes))
    end = 0
    for (start, size), inner in sorted(rows.items()):
        if start != end or not _fill(inner, shape[1:]):
            return False
        end += size
    return end == shape[0]


def _check(folder: Path) -> None:
    present = {file.name: file.stat().st_size for file in folder.iterdir()}
    if FILES not in present:  # an earlier version's, of whole tensors: what is missing is told by tensor
        return
    try:
        listed = json.loads((folder / FILES).read_text("utf-8"))
        sizes = {str(name): int(size) for name, size in listed.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{folder / FILES}: expected file names and their sizes: {error}") from None
    for name, size in sizes.items():
        if name not in present:
            raise CheckpointError(f"{folder / name}: missing")
        if present[name] != size:
            raise CheckpointError(f"{folder / name}: has {present[name]:,} bytes, expected {size:,}")
    for name in present.keys() - sizes.keys():
        if name.endswith(".safetensors"):
            raise CheckpointError(f"{folder / name}: is not part of the state")


class _Writer(HuggingFaceStorageWriter):
    """Every rank its own files, of about _FILE_BYTES each."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), save_distributed=True)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        numbered = super().prepare_global_plan(plans)
        return [
            dataclasses.replace(plan, storage_data=plan.storage_data | {"fqn_to_index_mapping": _files_of(plan)})
            for plan in numbered
        ]


def _files_of(plan: SavePlan) -> dict[str, int]:
    number, size = 1, 0
    files = {}
    for item in plan.items:
        more = item.tensor_storage_size() or 0
        if size and size + more > _FILE_BYTES:
            number, size = number + 1, 0
        size += more
        files[item.index.fqn] = number
    return files


class StateWriter:
    """Writes states of many ranks while they go on: a copy on the CPU is taken at once, the rest is a thread's.

    At most one is being written at a time. `group` is the writer's own, over the CPU: its collectives run beside the
    ranks' others. Every rank makes the same calls in the same order.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self._first = dist.get_rank(group) == 0
        self._staged: dict[str, Tensor] = {}
        self._on_cpu: dict[DeviceMesh, DeviceMesh] = {}  # whose tensors are on another device -> for their copies
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None  # the thread's
        self._untold: list[BaseException] = []  # of threads that have ended

    def begin(
        self, folder: Path, tensors: Mapping[str, Tensor], open_folder: Callable[[], object], commit: Callable[[], None]
    ) -> None:
        """Writes `tensors` into `folder`: DTensors as this rank's pieces of them, others once. The first rank calls
        `open_folder` before and `commit` when the files of all ranks are on the disk. Ends the one before first, whose
        error does not keep this one from being written: the next `wait` raises it."""
        self._end()
        staged = {name: self._stage(name, t) for name, t in tensors.items() if _local(t).numel()}
        copied = torch.cuda.Event() if self._device.type == "cuda" else None
        if copied is not None:
            copied.record()
        steps = (folder, staged, open_folder, commit, copied)
        # A daemon: where a run ends in an error, nobody waits for ranks that may be gone.
        self._thread = threading.Thread(target=self._write, args=steps, name="state", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is being written. Raises what went wrong since the last call, on every rank."""
        self._end()
        errors, self._untold = self._untold, []
        if len(errors) > 1:
            raise CheckpointError("; ".join(map(str, errors))) from errors[0]
        if errors:
            raise errors[0]

    @property
    def failed(self) -> bool:
        """Whether a state before the one that is being written was not, and `wait` has not said so."""
        return bool(self._untold)

    def _end(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            self._untold.append(self._error)
            self._error = None

    def _stage(self, name: str, tensor: Tensor) -> Tensor:
        local = _local(tensor)
        copy = self._staged.get(name)
        if copy is None:
            pinned = self._device.type == "cuda"
            copy = self._staged[name] = torch.empty(local.shape, dtype=local.dtype, pin_memory=pinned)
        copy.copy_(local, non_blocking=True)
        if not isinstance(tensor, DTensor):
            return copy
        mesh = tensor.device_mesh
        if mesh not in self._on_cpu:
            self._on_cpu[mesh] = DeviceMesh("cpu", mesh.mesh, _init_backend=False)
        shape, stride = tensor.shape, tensor.stride()
        return DTensor.from_local(
            copy, self._on_cpu[mesh], tensor.placements, run_check=False, shape=shape, stride=stride
        )

    def _write(
        self, folder: Path, tensors: dict[str, Tensor], open_folder: Callable[[], object], commit: Callable[[], None],
        copied: torch.cuda.Event | None,
    ) -> None:  # fmt: skip
        try:
            if copied is not None:
                torch.cuda.set_device(self._device)
                copied.synchronize()
            self._together(open_folder)
            save(tensors, storage_writer=_Writer(folder), process_group=self._group)
            self._each(lambda: sync(folder))
            self._together(commit)
        except CheckpointException as error:
            causes = "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items())
            self._error = CheckpointError(f"{folder}: a state was not written: {causes}")
        except CheckpointError as error:
            self._error = CheckpointError(f"{folder}: {error}")
        except BaseException as error:
            self._error = error

    def _together(self, act: Callable[[], object]) -> None:
        self._each(act if self._first else lambda: None)

    def _each(self, act: Callable[[], object]) -> None:
        """Runs `act`, and goes on when every rank has; where one failed, all raise."""
        said = ""
        try:
            act()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        everyone: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(everyone, said, group=self._group)
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text]
        if failed:
            raise CheckpointError("a state was not written: " + "; ".join(failed))


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach()
