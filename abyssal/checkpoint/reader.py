"""Loading: every header is checked against the model first, then the tensors are read one at a time."""

import re
import warnings
from pathlib import Path

import torch
from torch import Tensor

from abyssal.checkpoint.errors import CheckpointError
from abyssal.checkpoint.folder import Found, find
from abyssal.checkpoint.names import SCALE_SUFFIX, Slot, Stored, copies, is_constant, mtp_prefix, table
from abyssal.checkpoint.shards import FLOATS, Header, Tensors, is_finite
from abyssal.config import ModelConfig
from abyssal.model.transformer import Transformer
from abyssal.ops.fp8 import BLOCK, dequantize, scale_shape

FP8 = torch.float8_e4m3fn
_ASKABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Of a hub's repository: no code, no pickles, nothing from its subfolders.
_WANTED = ["*.json", "*.safetensors", "*.jinja", "tiktoken.model", "tokenizer.model", "vocab.txt", "merges.txt"]
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

_TOLD = 8  # problems that one error lists


def load(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    keep_fp8: bool = False,
) -> Transformer:
    """The model of a public-format folder, or of a Hugging Face hub id "owner/name".

    `dtype` None keeps every tensor as it is stored, FP8 dequantised to bfloat16; another converts all but the router
    biases, which are float32 always. `keep_fp8` leaves FP8 weights in their blocks, dequantised at each use. The
    host's memory stays under the model and one tensor. `model.stored` remembers what the model itself does not say,
    so that `save` writes back what was read.

    MTP modules are those whose tensors are there, with experts or without: a UserWarning says where config.json
    counts others. Their copies of embedding and head must equal the main model's, for the model has only those.

    Raises CheckpointError, or ConfigError, before any tensor is read: see `find`, and for missing, unknown and
    misshapen tensors, dtypes that are not floats and scales that do not cover their weight. NaN, infinity and copies
    that differ are found as they are read.
    """
    if dtype is not None and dtype not in _ASKABLE:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, _ASKABLE))}, got {dtype}")
    folder = local_folder(path)
    found = find(folder)
    stated = ModelConfig.load(found.config)
    config = _with_modules_found(stated, found.headers)
    with torch.device("meta"):
        model = Transformer(config)
    slots = table(model)
    _check(folder, slots, copies(config), found.headers, stated)
    dtypes = _dtypes(folder, slots, found.headers, dtype, keep_fp8)

    _say(folder, found, stated, config)
    _materialise(model, slots, dtypes, torch.device(device))
    model.stored = _fill(folder, model, slots, found.headers, stated)
    return model


def local_folder(path: str | Path) -> Path:
    """`path` itself if it is a folder, else where the hub's files of "owner/name" were fetched to: weights,
    configuration and tokenizer alone. Raises CheckpointError if it is neither."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists() or not _HUB_ID.fullmatch(str(path)):
        raise CheckpointError(f"{path}: expected a folder, or a hub id like 'owner/name'")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(path), allow_patterns=_WANTED, ignore_patterns=["*/*"]))


def _with_modules_found(stated: ModelConfig, headers: dict[str, Header]) -> ModelConfig:
    """MTP modules are what the tensors say they are: as many as stand in a row, dense or with experts.

    A layer past the main model's that `config.json` does not count is one if it has the projection that only an MTP
    module has; else its tensors are unknown.
    """
    layers = {name.split(".")[2] for name in headers if name.startswith("model.layers.")}
    d = 0
    while str(stated.num_hidden_layers + d) in layers:
        counted = d < stated.num_nextn_predict_layers
        if not counted and f"{mtp_prefix(stated, d)}.eh_proj.weight" not in headers:
            break
        d += 1
    first = mtp_prefix(stated, 0)
    experts = (f"{first}.mlp.gate.", f"{first}.mlp.experts.")
    moe = stated.mtp_moe
    if d and stated.n_routed_experts is not None:
        moe = any(name.startswith(experts) for name in headers)
    return stated.replace(num_nextn_predict_layers=d, mtp_moe=moe)


def _say(folder: Path, found: Found, stated: ModelConfig, config: ModelConfig) -> None:
    if stated.num_nextn_predict_layers != config.num_nextn_predict_layers:
        warnings.warn(
            f"{folder}: config.json counts {stated.num_nextn_predict_layers} MTP modules, the weights have "
            f"{config.num_nextn_predict_layers}: loaded with those",
            stacklevel=3,
        )
    if found.unread:
        names = ", ".join(file.name for file in found.unread)
        warnings.warn(f"{folder}: not part of the checkpoint, and not read: {names}", stacklevel=3)


def _check(
    folder: Path, slots: dict[str, Slot], repeated: dict[str, str], headers: dict[str, Header], config: ModelConfig
) -> None:
    problems = []
    known: set[str] = set()

    def expect(name: str, shape: tuple[int, ...], fp8: bool) -> bool:
        header = headers.get(name)
        known.add(name)
        if header is None:
            problems.append(f"{name}: missing, expected {list(shape)}")
            return False
        where = f"{header.file.name}: {name}"
        if header.code not in FLOATS:
            problems.append(f"{where}: expected a float dtype, got {header.code}")
        elif header.code == "F8_E4M3" and not fp8:
            problems.append(f"{where}: expected a float dtype wider than FP8, got {header.code}")
        elif header.code == "F8_E4M3" and not config.fp8:
            problems.append(f"{where}: is FP8, and config.json has no quantization_config")
        if header.shape != shape:
            problems.append(f"{where}: expected {list(shape)}, got {list(header.shape)}")
        return fp8 and header.code == "F8_E4M3"

    for name, slot in slots.items():
        shape = tuple(slot.tensor.shape)
        # A head in FP8 could not be shared with an MTP module's copy of it; nobody stores one.
        if expect(name, shape, slot.scale is not None and name != "lm_head.weight"):
            expect(name + SCALE_SUFFIX, scale_shape(shape[0], shape[1]), False)
    for name, main in repeated.items():
        if name in headers:
            expect(name, tuple(slots[main].tensor.shape), False)
    for name, header in headers.items():
        if is_constant(name):
            expect(name, (config.rotary_width // 2,), False)
        elif name not in known:
            problems.append(f"{header.file.name}: {name}: unknown to a {config.model_type} of this configuration")
    _raise(folder, problems)


def _raise(folder: Path, problems: list[str]) -> None:
    if len(problems) == 1:
        raise CheckpointError(f"{folder}: {problems[0]}")
    if problems:
        more = [f"and {len(problems) - _TOLD} more"] if len(problems) > _TOLD else []
        raise CheckpointError("\n  ".join([f"{folder}: {len(problems)} problems:", *problems[:_TOLD], *more]))


def _dtypes(
    folder: Path,
    slots: dict[str, Slot],
    headers: dict[str, Header],
    asked: torch.dtype | None,
    keep_fp8: bool,
) -> dict[Slot, torch.dtype]:
    """What to hold each whole tensor in; experts are one tensor, so they must agree."""
    dtypes: dict[Slot, torch.dtype] = {}
    problems = []
    for name, slot in slots.items():
        stored = FLOATS[headers[name].code]
        if slot.is_bias:
            held = torch.float32
        elif stored == FP8:
            held = FP8 if keep_fp8 else asked or torch.bfloat16
        else:
            held = asked or stored
        whole = slot._replace(expert=None)
        if dtypes.setdefault(whole, held) != held:
            other = f"{str(held).removeprefix('torch.')}, other experts {str(dtypes[whole]).removeprefix('torch.')}"
            hint = "load with keep_fp8=False and a dtype" if FP8 in (held, dtypes[whole]) else "load with a dtype"
            problems.append(f"{headers[name].file.name}: {name}: is {other}: {hint}")
    _raise(folder, problems)
    return dtypes


def _materialise(
    model: Transformer, slots: dict[str, Slot], dtypes: dict[Slot, torch.dtype], device: torch.device
) -> None:
    """Room for every tensor. On a CPU, pages count only once they are written."""
    for slot, dtype in dtypes.items():
        shape = slot.tensor.shape
        slot.place(torch.empty(shape, dtype=dtype, device=device))
        if dtype == FP8:
            assert slot.scale is not None
            blocks = (*shape[:-2], *scale_shape(shape[-2], shape[-1]))
            slot.scale.place(torch.empty(blocks, dtype=torch.float32, device=device))
    if model.config.tie_word_embeddings:
        model.head.weight = model.embed.weight


@torch.no_grad()
def _fill(
    folder: Path, model: Transformer, slots: dict[str, Slot], headers: dict[str, Header], stated: ModelConfig
) -> Stored:
    repeated = copies(model.config)
    narrow: dict[str, torch.dtype] = {}
    constants: dict[str, Tensor] = {}
    held_copies: set[str] = set()
    with Tensors(headers) as stored:
        for name, header in headers.items():
            if name in slots:
                slot = slots[name]
                _copy(slot, name, stored)
                if slot.is_bias and header.code != "F32":
                    narrow[name] = FLOATS[header.code]
                scale = name + SCALE_SUFFIX
                if slot.tensor.dtype == FP8 and headers[scale].code != "F32":
                    narrow[scale] = FLOATS[headers[scale].code]
            elif name in repeated:
                main = repeated[name]
                if not _same_bits(stored.read(name), stored.read(main)):
                    raise CheckpointError(
                        f"{header.file}: {name}: differs from {main}: abyssal shares it with the main model"
                    )
                held_copies.add(name)
            elif is_constant(name):
                constants[name] = stored.read(name).clone()
    dtype = FLOATS[headers["model.embed_tokens.weight"].code]
    return Stored(folder, stated, dtype, frozenset(held_copies), narrow, constants)


def _copy(slot: Slot, name: str, stored: Tensors) -> None:
    source, target = stored.read(name), slot.tensor
    if source.dtype != FP8:
        target.copy_(source)
        if target.dtype == torch.float16 != source.dtype and not is_finite(target):
            raise CheckpointError(
                f"{stored.headers[name].file}: {name}: overflows {target.dtype}: load with another dtype"
            )
        return
    scale = stored.read(name + SCALE_SUFFIX)
    if target.dtype == FP8:
        assert slot.scale is not None
        target.view(torch.uint8).copy_(source.view(torch.uint8))
        slot.scale.tensor.copy_(scale)
        return
    # A row of blocks at a time: the float32 it is multiplied in is never as large as a tensor.
    for row in range(0, source.shape[0], BLOCK):
        block = source[row : row + BLOCK]
        target[row : row + BLOCK].copy_(dequantize(block, scale[row // BLOCK, None], target.dtype))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
