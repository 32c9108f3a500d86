"""A run's state as a model in the public format, on one process and a tensor at a time."""

from pathlib import Path

import torch
from torch import Tensor

from abyssal.checkpoint.distributed import StateFiles
from abyssal.checkpoint.names import copies, table
from abyssal.checkpoint.writer import save
from abyssal.config import ModelConfig
from abyssal.data import Tokenizer, TokenSet
from abyssal.data.shards import INDEX
from abyssal.model.transformer import Transformer
from abyssal.train.corpus import TOKENS
from abyssal.train.optimizer import MASTER
from abyssal.train.state import TRAINER, newest_state, read_trainer


def export(source: Path, out: Path) -> Path:
    """Writes the model of `source`, a state's folder, a run's or its `state/` (the newest state there), whoever wrote
    it, in the dtype that the run computed in. Returns the state's folder. No more than a tensor is in memory.

    Raises FileNotFoundError if there is no state; CheckpointError naming a file or a tensor that is missing.
    """
    state = source if (source / TRAINER).is_file() else newest_state(source / "state") or newest_state(source)
    if state is None:
        raise FileNotFoundError(f"{source}: expected a run's folder with a state, or a state with its {TRAINER}")
    about = read_trainer(state)
    files = StateFiles(state)
    dtype = getattr(torch, about["machine"]["dtype"])
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_dict(about["model"])).to(dtype)
    names = {module: name for name, module in model.named_modules()}
    slots, repeated = table(model), copies(model.config)

    def read(public: str) -> Tensor:
        slot = slots[repeated.get(public, public)]
        key = f"{names[slot.module]}.{slot.attribute}"
        key = f"{MASTER}/{key}" if f"{MASTER}/{key}" in files else key
        first, last = (0, files.shape(key)[0]) if slot.expert is None else (slot.expert, slot.expert + 1)
        rows = files.rows(key, first, last)
        return (rows if slot.expert is None else rows[0]).to(slot.tensor.dtype)

    save(model, out, read=read)
    return state


def tokenizer_of(state: Path) -> Tokenizer | None:
    """The tokenizer that the run of `state` read its tokens by; None if neither its data nor its folder is there."""
    about = read_trainer(state)
    data = about["config"].get("data")
    run = state.resolve().parent  # of `state-nan`; other states lie one deeper
    for folder in (*([Path(data)] if data else []), run.parent / TOKENS, run / TOKENS):
        if (folder / INDEX).is_file():
            tokenizer = Tokenizer.load(TokenSet.open(folder).tokenizer)
            if tokenizer.fingerprint == about["data"]["tokenizer_sha256"]:
                return tokenizer
    return None
