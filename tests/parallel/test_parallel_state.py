"""States of many ranks: resumed on another mesh the curve is the same; what is damaged is told by its file."""

import json
import pickle
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from safetensors import safe_open
from safetensors.torch import save_file
from steps import settings
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY

import abyssal
from abyssal.checkpoint import CheckpointError
from abyssal.checkpoint.distributed import FILES, StateFiles, StateWriter, list_files
from abyssal.data import TokenSet
from abyssal.train.export import export
from abyssal.train.state import TRAINER, load_state, newest_state
from abyssal.train.trainer import Trainer

LEGS = (3, 6, 9)  # steps after which a run is stopped, saved and resumed on another mesh


class Leg(NamedTuple):
    losses: list[tuple[float, ...]]
    told: list[str]  # what may make the curve differ


def open_run(tokens: Path, out: Path, mesh: str, **changes: Any) -> Trainer:
    config = settings(tokens, out, mesh, {}, **({"steps": LEGS[-1]} | changes))
    return Trainer(config, config.model_settings(), TokenSet.open(config.data))


def take(trainer: Trainer, until: int) -> list[tuple[float, ...]]:
    losses = []
    with trainer.stream() as stream:
        while trainer.done < until:
            step = trainer.step(next(stream))
            losses.append((step.loss, step.main_loss, step.balance_loss, *step.mtp_losses, step.grad_norm))
    return losses


def leg(tokens: Path, out: Path, mesh: str, start: Path | None, until: int, target: Path, **changes: Any) -> Leg:
    """From a state, or the beginning, to step `until`, whose state is saved; a step more is taken while it is."""
    trainer = open_run(tokens, out, mesh, **changes)
    told = [] if start is None else trainer.restore(start)
    losses = take(trainer, until)
    trainer.save(target)
    take(trainer, min(until + 1, LEGS[-1]))
    trainer.saved()
    return Leg(losses, told)


def on_mesh(ranks: int, *arguments: Any) -> list[Leg]:
    return on_ranks(ranks, leg, *arguments) if ranks > 1 else [leg(*arguments)]


class Alone(NamedTuple):
    losses: list[tuple[float, ...]]
    states: Path  # of one process, after every leg


@pytest.fixture(scope="session")
def alone(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    folder = tmp_path_factory.mktemp("alone")
    trainer = open_run(tokens, folder, "")
    losses = []
    for until in LEGS:
        losses += take(trainer, until)
        trainer.save(folder / f"step-{until}")
    return Alone(losses, folder)


def same(ours: list[tuple[float, ...]], theirs: list[tuple[float, ...]]) -> None:
    """The losses are; the gradient's norm, the last, which errors move more, nearly."""
    a, b = torch.tensor(ours), torch.tensor(theirs)
    torch.testing.assert_close(a[:, :-1], b[:, :-1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a[:, -1], b[:, -1], rtol=1e-3, atol=1e-6)


def contents(state: Path) -> dict[str, Tensor]:
    files = StateFiles(state)
    found = {}
    for name in files.names():
        shape = files.shape(name)
        found[name] = files.rows(name, 0, shape[0] if shape else 1)
    return found


def journey(tokens: Path, tmp_path: Path, alone: Alone, meshes: list[tuple[int, str]]) -> Path:
    """The legs, each on its mesh, against one process's. Returns the last state."""
    start, before = None, 0
    for (ranks, mesh), until in zip(meshes, LEGS, strict=True):
        target = tmp_path / f"step-{until}"
        for found in on_mesh(ranks, tokens, tmp_path, mesh, start, until, target):
            same(found.losses, alone.losses[before:until])
        start, before = target, until
    assert start is not None
    return start


def test_one_process_then_two_ranks_then_one(tokens: Path, tmp_path: Path, alone: Alone) -> None:
    middle = tmp_path / "step-6"
    for found in on_mesh(2, tokens, tmp_path, "dp=2", alone.states / "step-3", 6, middle):
        same(found.losses, alone.losses[3:6])
        assert "mesh was none and is dp=2" in found.told
    ours, theirs = contents(middle), contents(alone.states / "step-6")
    assert ours.keys() == theirs.keys()  # not only the model: what the optimizer keeps, and the random state
    for name, tensor in theirs.items():
        if name not in ("cpu", "cuda"):
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=2e-5, msg=name)
    pieces = sorted(middle.glob("shard-*.safetensors"))
    assert len(pieces) == 2 and abs(pieces[0].stat().st_size / pieces[1].stat().st_size - 1) < 0.1
    assert {p.suffix for p in middle.iterdir()} == {".safetensors", ".json"}
    same(leg(tokens, tmp_path, "", middle, 9, tmp_path / "step-9").losses, alone.losses[6:])

    export(middle, tmp_path / "public")
    model, trainer = abyssal.load(tmp_path / "public"), open_run(tokens, tmp_path, "")
    trainer.restore(middle)
    for (name, p), (_, q) in zip(model.named_parameters(), trainer.model.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    assert all(torch.equal(a.bias, b.bias) for a, b in zip(model.gates(), trainer.model.gates(), strict=True))

    piece = pieces[1]
    whole = piece.read_bytes()
    piece.write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match=rf"{piece.name}: has [\d,]+ bytes, expected"):
        trainer.restore(middle)
    piece.unlink()
    with pytest.raises(CheckpointError, match=rf"{piece.name}: missing"):
        trainer.restore(middle)
    piece.write_bytes(whole)
    shutil.copy(piece, middle / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"more.safetensors: is not part of the state"):
        trainer.restore(middle)


def test_a_piece_is_missed_without_a_list_of_files_too(tokens: Path, tmp_path: Path, alone: Alone) -> None:
    state = tmp_path / "state"
    shutil.copytree(alone.states / "step-3", state)
    (state / FILES).unlink()  # as versions before this one left it
    trainer = open_run(tokens, tmp_path, "")
    trainer.restore(state)
    file = state / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"(?s)state: .*"):
        trainer.restore(state)
    (state / "model.safetensors").unlink()
    file.unlink()
    with pytest.raises(CheckpointError, match=r"state: tensor .* is missing"):
        trainer.restore(state)


def test_a_state_without_a_place_for_its_bytes_is_told(tokens: Path, tmp_path: Path, alone: Alone) -> None:
    state = tmp_path / "state"
    shutil.copytree(alone.states / "step-3", state)
    (state / FILES).write_text('["model.safetensors"]')
    with pytest.raises(CheckpointError, match=r"files.json: expected file names and their sizes"):
        load_state(state, *_parts(open_run(tokens, tmp_path, "")))


def test_pieces_that_overlap_do_not_stand_for_one_that_is_missing(tmp_path: Path) -> None:
    for third, whole in ((2, True), (0, False), (1, False), (3, False), (6, False)):
        for name, first in (("a", 0), ("b", third), ("c", 4)):
            place = json.dumps({"x": {SAVED_OFFSETS_KEY: [first, 0]}})
            file = tmp_path / f"{name}.safetensors"
            save_file({"x": torch.full((2, 3), float(first))}, file, {CUSTOM_METADATA_KEY: place})
        if whole:
            assert torch.equal(StateFiles(tmp_path).rows("x", 0, 6)[:, 0], torch.tensor([0.0, 0, 2, 2, 4, 4]))
        else:
            with pytest.raises(CheckpointError, match="x: a piece is missing, or there twice"):
                StateFiles(tmp_path)


def test_a_state_whose_settings_cannot_be_read_is_told(tokens: Path, tmp_path: Path, alone: Alone) -> None:
    state, trainer = tmp_path / "state", open_run(tokens, tmp_path, "")
    shutil.copytree(alone.states / "step-3", state)
    for text in ("{", "[]"):
        (state / TRAINER).write_text(text)
        with pytest.raises(CheckpointError, match=r"trainer.json: "):
            trainer.restore(state)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    """Of one rank, in this process."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_rank_writes_files_of_a_bounded_size(tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abyssal.checkpoint.distributed._FILE_BYTES", 100)
    tensors = {f"t{i}": torch.randn(i, 3) for i in range(1, 12)} | {
        "step": torch.tensor(7.0),
        "none": torch.zeros(0, 4),
    }
    writer = StateWriter(group, torch.device("cpu"))
    writer.begin(tmp_path / "state", tensors, (tmp_path / "state").mkdir, lambda: list_files(tmp_path / "state"))
    writer.wait()
    assert len(list((tmp_path / "state").glob("*.safetensors"))) > 5
    found = contents(tmp_path / "state")
    assert found.keys() == tensors.keys() - {"none"}
    assert all(torch.equal(t, tensors[name]) for name, t in found.items())
    assert torch.equal(StateFiles(tmp_path / "state").rows("t11", 2, 5), tensors["t11"][2:5])


def test_training_goes_on_while_a_state_is_written(tmp_path: Path, group: Any) -> None:
    """What is written is what there was when it began; the one after waits, and an error is told at the next call."""
    writer, gate, done = StateWriter(group, torch.device("cpu")), threading.Event(), []
    x = torch.arange(6.0)

    def opened(folder: Path) -> None:
        assert gate.wait(60)
        folder.mkdir()

    for number in (1, 2):
        folder = tmp_path / str(number)
        if number == 2:
            threading.Timer(0.05, gate.set).start()
        writer.begin(folder, {"x": x}, partial(opened, folder), partial(done.append, number))
        assert done == list(range(1, number))
        x += 10
    writer.wait()
    assert done == [1, 2]
    for number in (1, 2):
        assert torch.equal(StateFiles(tmp_path / str(number)).rows("x", 0, 6), torch.arange(6.0) + 10 * (number - 1))
    with pytest.raises(CheckpointError, match="a state was not written: rank 0: FileExistsError"):
        writer.begin(tmp_path / "1", {"x": x}, (tmp_path / "1").mkdir, lambda: done.append(3))
        writer.wait()
    writer.wait()
    assert done == [1, 2]


def test_after_an_error_the_next_state_is_written_and_the_error_told(tmp_path: Path, group: Any) -> None:
    writer, x = StateWriter(group, torch.device("cpu")), torch.arange(6.0)

    def begin(name: str) -> None:
        folder = tmp_path / name
        writer.begin(folder, {"x": x}, folder.mkdir, lambda: None)

    for name in ("one", "two"):
        (tmp_path / name).touch()
    begin("one")
    begin("three")
    with pytest.raises(CheckpointError, match=r"one: a state was not written: rank 0: FileExistsError"):
        writer.wait()
    assert torch.equal(StateFiles(tmp_path / "three").rows("x", 0, 6), x)
    begin("one")
    begin("two")
    with pytest.raises(CheckpointError, match=r"one: a state was not written: .*; .*two: a state was not written: "):
        writer.wait()
    begin("four")
    writer.wait()
    assert torch.equal(StateFiles(tmp_path / "four").rows("x", 0, 6), x)


def test_a_run_whose_state_cannot_be_written_ends_with_the_next_one_written(tokens: Path, tmp_path: Path) -> None:
    assert on_ranks(1, fail_once, tokens, tmp_path) == [None]


def fail_once(tokens: Path, tmp_path: Path) -> None:
    trainer = open_run(tokens, tmp_path, "dp=1", accumulate=1)
    (tmp_path / "file").touch()
    trainer.save(tmp_path / "file" / "step-00000000")
    with pytest.raises(CheckpointError, match=r"step-00000000\S*: a state was not written: .*file"):
        trainer.save(tmp_path / "state")
    trainer.restore(tmp_path / "state")
    trainer.save(tmp_path / "state")
    trainer.saved()


def _parts(trainer: Trainer) -> tuple[Any, Any]:
    return trainer.model, trainer.optimizer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_state_of_one_process_is_exported_as_its_model_was_saved(tokens: Path, tmp_path: Path, dtype: str) -> None:
    trainer = open_run(tokens, tmp_path, "", dtype=dtype)
    take(trainer, 2)
    trainer.save(tmp_path / "state" / "step-00000002")
    trainer.model.save(tmp_path / "model")
    assert export(tmp_path, tmp_path / "exported") == newest_state(tmp_path / "state")
    with (
        safe_open(tmp_path / "model" / "model.safetensors", "pt") as saved,
        safe_open(tmp_path / "exported" / "model.safetensors", "pt") as exported,
    ):
        assert set(saved.keys()) == set(exported.keys())
        for name in saved.keys():  # noqa: SIM118
            assert torch.equal(saved.get_tensor(name), exported.get_tensor(name)), name
    config, again = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("model", "exported"))
    assert config == again


class Trap:
    """What creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_a_pickle_in_the_folder_is_never_read(tokens: Path, tmp_path: Path, alone: Alone) -> None:
    state, sprung = tmp_path / "state", tmp_path / "sprung"
    shutil.copytree(alone.states / "step-3", state)
    for name in (".metadata", "model.pt", "random.pkl"):  # the first is what torch's own format would read
        (state / name).write_bytes(pickle.dumps(Trap(sprung)))
    pickle.loads((state / ".metadata").read_bytes())
    assert sprung.exists()
    sprung.unlink()
    open_run(tokens, tmp_path, "").restore(state)
    assert not sprung.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "meshes",
    [
        [(1, ""), (2, "dp=2"), (4, "dp=4")],
        [(2, "dp=2"), (2, "tp=2"), (1, "")],
        [(2, "cp=2"), (4, "dp=2,tp=2"), (2, "tp=2")],
        [(2, "pp=2"), (2, "dp=2"), (4, "pp=2,dp=2")],
        [(4, "pp=2,tp=2"), (1, ""), (2, "pp=2")],
        [(2, "dp=2"), (2, "ep=2"), (4, "dp=2,ep=2")],
    ],
    ids=lambda meshes: " then ".join(mesh or "one" for _, mesh in meshes),
)
def test_resumed_on_other_meshes(tokens: Path, tmp_path: Path, alone: Alone, meshes: list[tuple[int, str]]) -> None:
    last = journey(tokens, tmp_path, alone, meshes)
    ours, theirs = contents(last), contents(alone.states / "step-9")
    assert ours.keys() == theirs.keys()
