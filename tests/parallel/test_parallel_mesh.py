"""Wrong meshes are refused with the reason and the nearest right one, before anything is built."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import settings as trying
from hypothesis import strategies as st
from safetensors.torch import load_file
from steps import settings
from torch.distributed import device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from typer.testing import CliRunner

from abyssal.cli import app
from abyssal.config import ConfigError, ModelConfig
from abyssal.model.transformer import Transformer
from abyssal.parallel import Mesh, Spread
from abyssal.parallel.check import check_mesh, nearest, shapes, why_not
from abyssal.parallel.mesh import MeshShape
from abyssal.train import TrainConfig, train


def run(mesh: str, model: dict[str, Any] | None = None, **changes: Any) -> tuple[TrainConfig, ModelConfig]:
    config = settings(Path("tokens"), Path("out"), mesh, model or {}, **changes)
    return config, config.model_settings()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Any:
    def processes(count: int) -> None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", str(count))

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return processes


def test_axes_are_read_in_any_order_and_written_in_one() -> None:
    assert MeshShape.parse("ep=2, dp=3") == MeshShape(dp=3, ep=2)
    assert str(MeshShape.parse("tp=2,pp=4,dp=1")) == "pp=4,tp=2"
    assert MeshShape.parse("") == MeshShape() and str(MeshShape()) == "dp=1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pd=2", "unknown axis 'pd', expected pp, dp, ep, cp, tp; did you mean"),
        ("dp", "'dp': expected dp=N with N of 1 or more"),
        ("dp=0", "'dp=0': expected dp=N"),
        ("dp=2,dp=2", "dp is named twice"),
    ],
)
def test_what_is_no_mesh_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as found:
        check_mesh(*run(text))
    assert message in str(found.value)


# The model of steps.py has 4 heads, 8 experts, 4 layers; a run has 4 microbatches of 128 tokens a step.
@pytest.mark.parametrize(
    ("mesh", "processes", "model", "changes", "reason", "near"),
    [
        ("dp=2", 4, {}, {}, "mesh dp=2: has 2 ranks, and there are 4 processes", "dp=4"),
        ("dp=2,ep=2", 2, {}, {}, "mesh dp=2,ep=2: has 4 ranks, and there are 2 processes", "dp=2"),
        ("tp=2,cp=3", 4, {}, {}, "mesh cp=3,tp=2: has 6 ranks", "cp=2,tp=2"),
        ("dp=8", 8, {}, {}, "accumulate: expected a multiple of dp·ep = 8, got 4", "dp=4,tp=2"),
        ("dp=2,ep=4", 8, {}, {}, "accumulate: expected a multiple of dp·ep = 8, got 4", "dp=2,ep=2,tp=2"),
        ("ep=3", 3, {}, {"accumulate": 3}, "n_routed_experts: expected a multiple of ep = 3, got 8", "dp=3"),
        ("ep=2", 2, {"n_routed_experts": None}, {}, "ep: the model has no experts to divide", "dp=2"),
        ("tp=8", 8, {}, {}, "num_attention_heads: expected a multiple of 8, got 4", "dp=2,tp=4"),
        ("tp=2", 2, {"intermediate_size": 49}, {}, "intermediate_size: expected a multiple of 2, got 49", "dp=2"),
        ("tp=2", 2, {"position": "integer", "qk_rope_head_dim": 0}, {}, "position: expected none, rope", "dp=2"),
        ("cp=3", 3, {}, {"accumulate": 3}, "batch_tokens: expected a multiple of cp·tp = 3, got 128", "dp=3"),
        ("pp=8", 8, {}, {"accumulate": 8}, "schedule 1f1b: num_hidden_layers: expected 8 or more", "pp=4,dp=2"),
        ("pp=4", 4, {}, {"accumulate": 2}, "schedule 1f1b: expected 4 microbatches of a step or more", "pp=2,tp=2"),
        ("pp=4", 4, {}, {"schedule": "zbv"}, "schedule zbv: num_hidden_layers: expected 8 or more", "pp=2,dp=2"),
    ],
)
def test_a_wrong_mesh_is_refused_with_the_nearest_right_one(
    world: Any, mesh: str, processes: int, model: dict, changes: dict, reason: str, near: str
) -> None:
    world(processes)
    with pytest.raises(ConfigError) as found:
        check_mesh(*run(mesh, model, **changes))
    assert reason in str(found.value)
    assert str(found.value).endswith(f"; the nearest that is right: {MeshShape.parse(near)}")


def test_where_no_mesh_is_right_it_is_said(world: Any) -> None:
    world(7)
    with pytest.raises(ConfigError, match="; no mesh of 7 ranks is right for this run"):
        check_mesh(*run("dp=7"))


def test_muon_needs_whole_matrices(world: Any) -> None:
    world(2)
    with pytest.raises(ConfigError, match="mesh dp=2: optimizer: expected 'adamw', got 'muon'"):
        check_mesh(*run("dp=2", optimizer="muon"))


def test_without_torchrun_the_command_is_told_and_nothing_written(world: Any, tokens: Path, tmp_path: Path) -> None:
    config = settings(tokens, tmp_path / "run", "dp=2,ep=2", {})
    command = r"torchrun --nproc-per-node 4 -m abyssal train RUN --mesh dp=2,ep=2"
    with pytest.raises(ConfigError, match=f"expected 4 processes of one run; start them with: {command}"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_the_command_takes_a_mesh_and_drops_one(world: Any, tokens: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(settings(tokens, tmp_path / "run", "tp=2", {}, steps=1).to_dict()))
    refused = CliRunner().invoke(app, ["train", str(file), "--mesh", "dp=2"])
    assert "mesh dp=2: expected 2 processes" in str(refused.exception)
    assert "mesh tp=2: expected 2 processes" in str(CliRunner().invoke(app, ["train", str(file)]).exception)
    alone = CliRunner().invoke(app, ["train", str(file), "--mesh", ""])
    assert alone.exit_code == 0, alone.output
    exported = CliRunner().invoke(app, ["export", str(tmp_path / "run"), str(tmp_path / "model")])
    assert exported.exit_code == 0 and "step-00000001" in exported.output
    assert "without its tokenizer" not in exported.output
    ours, saved = (folder / "model.safetensors" for folder in (tmp_path / "model", tmp_path / "run" / "model"))
    assert load_file(ours).keys() == load_file(saved).keys()
    assert all(torch.equal(t, load_file(saved)[name]) for name, t in load_file(ours).items())
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (saved.parent / "tokenizer.json").read_bytes()
    missing = CliRunner().invoke(app, ["export", str(tmp_path), str(tmp_path / "nothing")])
    assert isinstance(missing.exception, FileNotFoundError) and "trainer.json" in str(missing.exception)


def test_processes_without_a_mesh_do_not_all_train_the_same_run(world: Any) -> None:
    check_mesh(*run(""))
    world(1)
    check_mesh(*run(""))
    world(2)
    with pytest.raises(ConfigError, match="there are 2 processes and none is named; say --mesh dp=2"):
        check_mesh(*run(""))


@given(st.integers(1, 64))
def test_every_arrangement_of_the_ranks_is_considered_once(world: int) -> None:
    found = list(shapes(world))
    assert len(set(found)) == len(found) and all(shape.ranks == world for shape in found)
    # Each prime's k powers fall on five axes in C(k + 4, 4) ways.
    expected, left = 1, world
    for prime in range(2, world + 1):
        power = 0
        while left % prime == 0:
            left, power = left // prime, power + 1
        expected *= math.comb(power + 4, 4)
    assert len(found) == expected


@trying(max_examples=40, deadline=None)
@given(
    st.builds(MeshShape, *[st.integers(1, 8)] * 5), st.sampled_from([1, 2, 3, 4, 6, 8, 16]), st.integers(1, 16),
    st.sampled_from(["1f1b", "interleaved", "dualpipev"]), st.sampled_from([96, 128, 120]),
)  # fmt: skip
def test_the_nearest_is_right_and_a_right_one_is_its_own_nearest(
    shape: MeshShape, world: int, accumulate: int, schedule: str, batch: int
) -> None:
    config, model = run("", accumulate=accumulate, schedule=schedule, batch_tokens=batch)
    near = nearest(shape, world, config, model)
    if near is None:
        assert all(why_not(other, world, config, model) for other in shapes(world))
    else:
        assert why_not(near, world, config, model) is None
        changed = sum(a != b for a, b in zip(near.sizes, shape.sizes))
        for other in shapes(world):
            if why_not(other, world, config, model) is None:
                assert sum(a != b for a, b in zip(other.sizes, shape.sizes)) >= changed
    if why_not(shape, world, config, model) is None:
        assert near == shape


def groups_made(shape: MeshShape, rank: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The ranks of every process group that a rank asks for, in order."""
    made: list[tuple[int, ...]] = []
    new_group = dist.new_group

    def told(ranks: list[int], **others: Any) -> Any:
        made.append(tuple(ranks))
        return new_group(ranks, **others)

    dist.init_process_group("fake", rank=rank, world_size=shape.ranks, store=FakeStore())
    try:
        with monkeypatch.context() as patch:
            patch.setattr(device_mesh, "new_group", told)
            model = run(str(shape))[1]
            mesh = Mesh(shape, "cpu")
            spread = Spread(Transformer(model).init_weights(), mesh, torch.device("cpu"), torch.float32, accumulate=16)
            spread.norms(torch.ones(1))
            spread.add_up(torch.ones(1))
    finally:
        dist.destroy_process_group()
    return made


@pytest.mark.parametrize("mesh", ["pp=4,dp=2,ep=2,tp=2", "pp=2,dp=2,ep=2,cp=2"])
def test_every_rank_makes_the_same_groups_in_the_same_order(mesh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks must take part in making a group. The first stage has the dense layer, and may have no experts."""
    shape = MeshShape.parse(mesh)
    first = groups_made(shape, 0, monkeypatch)
    assert all(groups_made(shape, r, monkeypatch) == first for r in (1, shape.ranks // 2, shape.ranks - 1))
