"""Whenever a save dies, the folder holds the checkpoint before or the new one: weights, and their configuration."""

import json
import os
import random
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import abyssal.checkpoint.writer as writer
from abyssal.checkpoint import CheckpointError, load, save
from abyssal.config import ModelConfig

TINY = ModelConfig.load("tiny").replace(num_hidden_layers=2, n_routed_experts=4, n_group=1, topk_group=1)
OTHER = TINY.replace(routed_scaling_factor=1.5, num_nextn_predict_layers=0)  # both have the same main model's shapes

ONE, MANY = 1 << 40, 300_000


class Killed(BaseException):
    pass


def which(folder: Path, models: dict) -> str:
    """The model that the folder holds, exactly, to us and to a reader who goes by `model.safetensors` or the index."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = load(folder)
    state = found.state_dict()
    same = [
        name for name, model in models.items()
        if found.config == model.config and state.keys() == model.state_dict().keys()
        and all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    ]  # fmt: skip
    assert len(same) == 1, f"a mixture: {os.listdir(folder)}"

    if (folder / "model.safetensors").exists():
        public = load_file(folder / "model.safetensors")
    else:
        where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        public = {n: load_file(folder / file)[n] for n, file in where.items()}
    embed = public["model.embed_tokens.weight"]
    theirs = [name for name, model in models.items() if torch.equal(model.embed.weight, embed)]
    assert torch.equal(models[theirs[0]].head.weight, public["lm_head.weight"])
    assert torch.equal(models[theirs[0]].norm.weight, public["model.norm.weight"])
    if not (folder / "mtp.safetensors").exists():  # a forgotten shard, which such a reader does not see
        assert ("model.layers.2.eh_proj.weight" in public) == bool(models[theirs[0]].mtp)
    return same[0]


@pytest.fixture
def dies(monkeypatch):
    """Runs a save that is killed at its nth touch of the file system; nothing runs after that, no clean-up either.
    False if it was over before."""

    def run(n: int, model, folder: Path, most: int) -> bool:
        left = n

        def mortal(real):
            def touch(*args, **kwargs):
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return real(*args, **kwargs)

            return touch

        with monkeypatch.context() as patch:
            for name in ("replace", "unlink", "fsync"):
                patch.setattr(os, name, mortal(getattr(os, name)))
            patch.setattr(writer, "open", mortal(open), raising=False)
            try:
                save(model, folder, most)
            except Killed:
                return True
        return False

    return run


def anybodys(model, folder: Path, sharded: bool) -> None:
    """A folder that our writer did not write; the index forgets the MTP layer's shard."""
    save(model, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if not sharded:
        save_file(tensors, folder / "model.safetensors")
        return
    mtp = {n: t for n, t in tensors.items() if n.startswith("model.layers.2.")}
    main = sorted(n for n in tensors if n not in mtp)
    parts = {f"model-{i + 1:05}-of-00003.safetensors": main[i::3] for i in range(3)}
    for file, names in parts.items():
        save_file({n: tensors[n] for n in names}, folder / file)
    if mtp:
        save_file(mtp, folder / "mtp.safetensors")
    index = {"weight_map": {n: file for file, names in parts.items() for n in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("new_most", [ONE, MANY], ids=["one", "many"])
@pytest.mark.parametrize("old_first", [True, False], ids=["drops-mtp", "adds-mtp"])
@pytest.mark.parametrize("before", ["one", "many", "their-one", "their-many"])
def test_killed_at_any_step(make, dies, tmp_path, before, new_most, old_first):
    configs = (TINY, OTHER) if old_first else (OTHER, TINY)
    models = {"old": make(configs[0], 1), "new": make(configs[1], 2)}
    seen = set()
    for n in range(1000):
        folder = tmp_path / str(n)
        if before.startswith("their"):
            anybodys(models["old"], folder, before == "their-many")
        else:
            save(models["old"], folder, MANY if before == "many" else ONE)
        bystander = folder / "optimizer.pt"
        bystander.write_bytes(b"mine")
        killed = dies(n, models["new"], folder, new_most)
        seen.add(which(folder, models))
        # The next save finds its way whatever was left, and leaves nothing of it.
        save(models["new"], folder, new_most)
        assert which(folder, models) == "new"
        # A shard that their index forgot stays if we died between the new weights and its removal: unread, and said.
        forgotten = folder / "mtp.safetensors"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if forgotten.exists() else "error")
            load(folder)
        names = {f.name for f in folder.iterdir()} - {"config.json", "optimizer.pt", forgotten.name}
        assert killed or not forgotten.exists()
        assert bystander.read_bytes() == b"mine"
        if new_most == ONE:
            assert names == {"model.safetensors"}
        else:
            index = json.loads((folder / "model.safetensors.index.json").read_text())
            assert names == {*index["weight_map"].values(), "model.safetensors.index.json"}
        if not killed:
            break
    assert n > 8 and seen == {"old", "new"}


def test_killed_in_an_empty_folder(make, dies, tmp_path):
    models = {"new": make(TINY)}
    for most in (ONE, MANY):
        outcomes = []
        for n in range(1000):
            folder = tmp_path / f"{most}-{n}"
            killed = dies(n, models["new"], folder, most)
            try:
                outcomes.append(which(folder, models))
            except CheckpointError as error:
                outcomes.append("none")
                assert "no weights" in str(error) or "was left by a save that was interrupted" in str(error)
            if not killed:
                break
        assert outcomes == sorted(outcomes, reverse=True) or outcomes.index("new") == outcomes.count("none")


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(make, tmp_path, monkeypatch):
    models = {"old": make(TINY, 1), "new": make(OTHER, 2)}
    for most in (ONE, MANY):
        save(models["old"], tmp_path)
        before = sorted(f.name for f in tmp_path.iterdir())
        calls = 0

        def full(file, tensors, stamp, read, real=writer.write_shard, limit=0 if most == ONE else 1):
            nonlocal calls
            calls += 1
            if calls > limit:
                file.write(b"half")
                raise OSError(28, "No space left on device")
            real(file, tensors, stamp, read)

        with monkeypatch.context() as patch:
            patch.setattr(writer, "write_shard", full)
            with pytest.raises(OSError, match="No space left"):
                save(models["new"], tmp_path, most)
        assert sorted(f.name for f in tmp_path.iterdir()) == before
        assert which(tmp_path, models) == "old"


def test_kill_minus_nine(make, tmp_path):
    """For real: a child saves one over the other without end, and is killed at random moments."""
    models = {"a": make(TINY, 1), "b": make(OTHER, 2)}
    save(models["a"], tmp_path)
    chance = random.Random(0)
    seen = []
    for _ in range(25):
        child = os.fork()
        if child == 0:
            try:
                while True:
                    for model, most in (
                        (models["b"], MANY),
                        (models["a"], MANY),
                        (models["b"], ONE),
                        (models["a"], ONE),
                    ):
                        save(model, tmp_path, most)
            finally:
                os._exit(1)
        time.sleep(chance.uniform(0.005, 0.08))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        seen.append(which(tmp_path, models))
    assert set(seen) == {"a", "b"}
