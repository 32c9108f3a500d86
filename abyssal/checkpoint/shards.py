"""One safetensors file: its header, its tensors, and how to write one without a second copy in memory."""

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from abyssal.checkpoint.errors import CheckpointError

STAMP = "abyssal_save"
"""The key, in a shard's and an index's metadata, of the save that wrote it."""

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
_CODES = {dtype: code for code, dtype in FLOATS.items()}

# The pages of a mapping count as the process's own for as long as it is mapped.
_MAPPED_BYTES = 256 << 20


class Header(NamedTuple):
    """What a file says of one tensor."""

    file: Path
    code: str  # the format's own name of the dtype; FLOATS has those we read
    shape: tuple[int, ...]


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: truncated, or not a safetensors file: {error}") from None


def read_header(file: Path) -> tuple[str | None, dict[str, Header]]:
    """The stamp of the save that wrote `file`, if it was one of ours, and its tensors in the order of their bytes.

    Raises CheckpointError if the file is truncated or its header is not one.
    """
    with _open(file) as opened:
        stamp = (opened.metadata() or {}).get(STAMP)
        slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
        return stamp, {n: Header(file, s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}


class Tensors:
    """Reads tensors by name from memory-mapped files, and lets go of what it has mapped every 256 MB."""

    def __init__(self, headers: Mapping[str, Header]) -> None:
        self.headers = headers
        self._stack = ExitStack()
        self._opened: dict[Path, Any] = {}
        self._mapped = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._let_go()

    def _let_go(self) -> None:
        self._stack.close()
        self._opened.clear()
        self._mapped = 0

    def read(self, name: str) -> Tensor:
        """The stored tensor, a view of its file: copy it before reading many more.

        Raises CheckpointError if a value is NaN or infinite.
        """
        if self._mapped > _MAPPED_BYTES:
            self._let_go()
        header = self.headers[name]
        if header.file not in self._opened:
            self._opened[header.file] = self._stack.enter_context(_open(header.file))
        tensor: Tensor = self._opened[header.file].get_tensor(name)
        self._mapped += tensor.nbytes
        if not is_finite(tensor):
            bad = (~torch.isfinite(tensor.float())).nonzero()[0].tolist()
            raise CheckpointError(f"{header.file}: {name}: NaN or infinity, first at {bad}")
        return tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; one pass, and no temporary of the tensor's size."""
    if tensor.numel() == 0:
        return True
    if tensor.dtype == torch.float8_e4m3fn:  # has no infinity; NaN is every bit but the sign
        pieces = tensor.view(torch.uint8).flatten().split(1 << 18)
        return all(int((piece & 0x7F).max()) < 0x7F for piece in pieces)
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def write_shard(
    file: BinaryIO, tensors: Mapping[str, Tensor], stamp: str, read: Callable[[str], Tensor] | None = None
) -> None:
    """Writes a whole safetensors file, a tensor at a time. Views of larger tensors are written as they lie. With `read`
    the values are its, and `tensors` only says shapes and dtypes.

    Raises CheckpointError for a dtype that the format's readers of this family do not know.
    """
    # Wide types first, as safetensors orders them: every tensor is then aligned to its type.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", STAMP: stamp}}
    end = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _CODES:
            raise CheckpointError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        flat = (tensors[name] if read is None else read(name)).detach().cpu().contiguous().flatten()
        file.write(flat.view(torch.uint8).numpy().data)


def split(tensors: Mapping[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    """In order, as many to a shard as fit in `most` bytes; a tensor that is larger has a shard to itself."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards
