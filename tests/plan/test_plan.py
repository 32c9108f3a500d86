"""A plan's numbers against what is known by other ways: costs, formulas, and what a real step allocates."""

import json
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from abyssal.cli import _tell_memory, app
from abyssal.config import ConfigError, ModelConfig
from abyssal.costs import inspect
from abyssal.plan import plan
from abyssal.plan.order import Order, _one_stage, play
from abyssal.plan.report import memory_line
from abyssal.plan.setup import settings_of
from abyssal.plan.work import _for_others, links

SMALL = ["model.num_hidden_layers=3", "batch_tokens=2048", "sequence=1024", "mtp_weight=0.3"]


@pytest.fixture(scope="module")
def alone():
    return plan(settings_of("reference-961m", SMALL, 1, None))


def test_work_is_what_costs_says(alone):
    """Products, attention and experts of a microbatch add up to the training FLOPs of its tokens."""
    config = ModelConfig.load("reference-961m").replace(num_hidden_layers=3)
    expected = inspect(config, 1024).flops.training * 2048
    (walk,) = alone.walks
    assert walk.flops.keys() == {"products", "attention", "experts"}
    # The router's product is float32 and counted as another operation; attention's backward multiplies a fifth more.
    extra = walk.flops["attention"] * (3.5 - 3) / 3.5
    assert sum(walk.flops.values()) - extra == pytest.approx(expected, rel=0.01)


def test_memory_of_one_gpu_adds_up(alone):
    (walk,) = alone.walks
    config = ModelConfig.load("reference-961m").replace(num_hidden_layers=3)
    assert walk.numbers == inspect(config).parameters.total - 2 * 32  # router biases are buffers
    assert walk.memory["parameters, float32"] == walk.memory["gradients"] == 4 * walk.numbers
    assert walk.memory["parameters, bf16"] == 2 * walk.numbers
    assert walk.memory["moments"] == 8 * walk.numbers
    assert walk.peak >= 14 * walk.numbers + walk.activations


@pytest.mark.parametrize("mesh", ["dp=2", "ep=2", "tp=2", "cp=2"])
def test_ranks_divide_what_they_hold(alone, mesh):
    config = settings_of("reference-961m", SMALL, 2, mesh)
    (walk,) = plan(config).walks
    assert walk.numbers == pytest.approx(alone.walks[0].numbers / 2, rel=0.01)
    kinds = {t.what for t in walk.traffic}
    assert {"all-gather", "reduce-scatter"} <= kinds
    assert ("all-to-all" in kinds) == (mesh == "ep=2")
    flops = sum(walk.flops.values()) / sum(alone.walks[0].flops.values())
    assert flops == pytest.approx(1 if mesh in ("dp=2", "ep=2") else 0.5, rel=0.25)


def test_sharding_two_ways_sends_the_parameters_there_and_their_gradients_back(alone):
    (walk,) = plan(settings_of("reference-961m", SMALL, 2, "dp=2")).walks
    sent = {t.what: n for t, n in walk.traffic.items()}
    # Half of the bf16 parameters for the forward pass, of the blocks again for the backward; half of float32 gradients.
    assert sent["reduce-scatter"] == pytest.approx(2 * alone.walks[0].numbers, rel=0.02)
    assert 1.0 <= sent["all-gather"] / alone.walks[0].numbers <= 2.0


def test_a_pipeline_s_stages_together_are_the_model(alone):
    made = plan(settings_of("reference-961m", [*SMALL, "accumulate=4"], 2, "pp=2"))
    assert sum(w.numbers for w in made.walks) == alone.walks[0].numbers
    assert made.order.bubble == pytest.approx(1 / 5)  # (P - 1) / (M + P - 1)
    assert [made.order.waiting(rank) for rank in (0, 1)] == [w.waiting for w in made.walks] == [2, 1]
    assert [w.activations for w in made.walks] == [2 * made.walks[0].kept[0], made.walks[1].kept[1]]


@pytest.mark.parametrize(("schedule", "owned"), [("zbv", 1), ("1f1b", 0)])
def test_a_pipeline_s_rank_holds_whole_sums_of_all_its_stages(schedule, owned):
    """Masters, moments, both stages' parameters in bf16 and whole sums in float32; then a pass, and no more."""
    settings = ["model.num_hidden_layers=4", "batch_tokens=64", "sequence=64", "accumulate=64", "reshard=false"]
    made = plan(settings_of("reference-961m", [*settings, f"schedule={schedule}"], 16, "pp=2,dp=8"), [owned])
    (w,) = made.walks
    n = w.numbers  # owned, one of eight pieces
    need = (4 + 8 + 2 * 8 + 4 * 8) * n + w.activations
    # Halves of a backward pass make a stage's gradients in bf16 before they add them; a whole one a block's at a time.
    more = 8 * n if schedule == "zbv" else 0
    assert need + more <= w.peak <= 1.02 * (need + 8 * n)


def test_blocks_that_are_dropped_are_gathered_once_a_microbatch_in_a_pipeline():
    settings = ["model.num_hidden_layers=4", "batch_tokens=64", "sequence=64", "accumulate=64"]
    (w,) = plan(settings_of("reference-961m", settings, 16, "pp=2,dp=8"), [0]).walks
    each, once = (sum(n for t, n in sent.items() if t.what == "all-gather") for sent in (w.traffic, w.once))
    ends = ModelConfig.load("reference-961m").vocab_size * ModelConfig.load("reference-961m").hidden_size
    assert each == pytest.approx(once - 2 * ends * 7 / 8, rel=0.01)  # all but the embedding, which stays
    assert once == pytest.approx(2 * 8 * w.numbers * 7 / 8, rel=0.01)


def test_rows_for_experts_are_sent_to_others_whole():
    settings = ["model.num_hidden_layers=3", "batch_tokens=2048", "sequence=1024", "accumulate=2"]
    (w,) = plan(settings_of("reference-961m", settings, 2, "ep=2")).walks
    m = ModelConfig.load("reference-961m")
    sent = sum(n for t, n in w.traffic.items() if t.what == "all-to-all")
    rows = (3 - m.first_k_dense_replace) * 4 * 2048 * m.hidden_size * 2  # there and back, twice, in bf16
    assert rows <= sent <= 1.05 * rows
    counts = torch.empty(4, 2, dtype=torch.int64)
    assert _for_others(counts, [1, 1, 1, 1], 2) == 48 and _for_others(counts, [0, 2, 1, 1], 0) == 64


@pytest.mark.parametrize(("ranks", "micros"), [(2, 2), (4, 4), (4, 8), (3, 7)])
def test_1f1b_and_gpipe_by_the_formula(ranks, micros):
    for all_first in (False, True):
        order = play({r: _one_stage(r, ranks, micros, all_first) for r in range(ranks)})
        assert order.bubble == pytest.approx((ranks - 1) / (micros + ranks - 1))
        assert [order.waiting(r) for r in range(ranks)] == [
            micros if all_first else min(micros, ranks - r) for r in range(ranks)
        ]


def test_what_stages_of_unlike_size_hold():
    """A rank with two stages: forward of both for two microbatches, then their backward passes, halved or not."""
    parts = [(0, "F", 0), (0, "F", 1), (1, "F", 0), (1, "I", 0), (1, "W", 0), (1, "F", 1), (1, "B", 1)]
    order = Order(0.0, [[*parts, (0, "I", 0), (0, "I", 1), (0, "W", 0), (0, "W", 1)]])
    assert order.held(0, {0: 3, 1: 10}) == 16
    assert order.waiting(0) == 3
    whole = Order(0.0, [[(0, "F", 0), (0, "F", 1), (1, "F", 0), (1, "B", 0), (0, "B", 0), (0, "B", 1)]])
    assert whole.held(0, {0: 3, 1: 10}) == 16
    assert whole.held(0, {0: 10, 1: 1}) == 21


def test_without_halves_a_split_schedule_has_the_larger_bubble():
    half, whole = (
        plan(
            settings_of(
                "reference-961m",
                [*SMALL, "model.num_hidden_layers=4", "accumulate=4", "schedule=zbv", recompute],
                2,
                "pp=2",
            ),
            [0],
        ).order
        for recompute in ("recompute=none", "recompute=block")
    )
    assert any(kind == "W" for _, kind, _ in half.parts[0])
    assert not any(kind in "IW" for _, kind, _ in whole.parts[0])
    assert whole.bubble > half.bubble


def test_ranks_that_wait_for_each_other_are_told():
    with pytest.raises(ValueError, match="wait for each other"):
        play({0: [(0, "B", 0), (0, "F", 0)], 1: [(1, "F", 0), (1, "B", 0)]})


def test_a_group_s_links():
    assert links([0, 1]) == {"NVLink": 1.0}
    assert links([0, 8]) == {"InfiniBand": 1.0}
    assert links(list(range(16))) == pytest.approx({"NVLink": 7 / 15, "InfiniBand": 8 / 15})
    assert links([3]) == {}


def test_recomputing_holds_less_and_works_more(alone):
    (walk,) = plan(settings_of("reference-961m", [*SMALL, "recompute=block"], 1, None)).walks
    assert walk.activations < 0.8 * alone.walks[0].activations
    assert sum(walk.flops.values()) > 1.15 * sum(alone.walks[0].flops.values())


def test_one_microbatch_s_gradients_are_held_as_they_are_made():
    """On one GPU nothing is made of them in float32."""
    small = settings_of("reference-961m", [*SMALL, "batch_tokens=256", "sequence=256", "accumulate=1"], 1, None)
    (walk,) = plan(small).walks
    assert walk.memory["gradients"] == 2 * walk.numbers
    assert 16 * walk.numbers <= walk.peak < 17 * walk.numbers


def test_every_optimizer_every_part_and_fp8_is_counted():
    muon = plan(settings_of("reference-961m", [*SMALL, "optimizer=muon"], 1, None)).walks[0]
    config = ModelConfig.load("reference-961m").replace(num_hidden_layers=3)
    ends = 2 * config.vocab_size * config.hidden_size  # embedding and head have two moments; what else is small
    assert muon.memory["moments"] == pytest.approx(4 * muon.numbers + 4 * ends, rel=0.01)

    with_module = plan(settings_of("reference-961m", [*SMALL, "model.num_nextn_predict_layers=1"], 1, None))
    assert with_module.parameters == with_module.walks[0].numbers  # embedding and head counted once

    settings = [*SMALL, "model.hidden_size=4096", "model.n_routed_experts=null", "model.n_shared_experts=null"]
    wide, narrow = (
        plan(settings_of("reference-961m", [*settings, f"fp8={on}"], 1, None)).walks[0].flops
        for on in ("false", "true")
    )
    assert narrow["fp8"] > 0.2 * wide["products"]
    assert narrow["fp8"] + narrow["products"] == wide["products"]


def test_a_plan_of_another_dtype_is_refused():
    with pytest.raises(ConfigError, match="dtype: a plan is of a run in bfloat16, got float32"):
        plan(settings_of("tiny", ["dtype=float32"], 1, None))


def test_wrong_meshes_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"n_routed_experts: expected a multiple of ep = 3.*nearest that is right"):
        settings_of("reference-961m", ["accumulate=12"], 3, "ep=3")
    with pytest.raises(ConfigError, match="mesh dp=2: 2 ranks, and --gpus is 4"):
        settings_of("reference-961m", [], 4, "dp=2")


def test_a_run_on_a_gpu_is_told_what_it_will_hold(alone):
    text = memory_line(alone, 80 * 2**30)
    assert text.startswith("memory of a GPU, GiB: parameters, float32 0.7") and "of 80.0" in text
    assert f"peak {alone.walks[0].peak / 2**30:.1f}" in text
    assert "recompute" not in text
    assert "more than there is; recompute=" in memory_line(alone, 2**30)


def test_the_fullest_place_of_a_pipeline_is_told(monkeypatch, capsys):
    """By the run itself, too: here the last place, which has the head, and not the first."""
    settings = ["model.num_hidden_layers=4", "model.first_k_dense_replace=3", "batch_tokens=256", "sequence=256"]
    config = settings_of("reference-961m", [*settings, "model.num_nextn_predict_layers=2"], 2, "pp=2")
    made = plan(config)
    first, last = made.walks
    assert last.peak > 1.1 * first.peak
    text = memory_line(made, 80 * 2**30)
    assert text.startswith("memory of a GPU at place 1 of the pipeline, the fullest, GiB: parameters, float32")
    assert f"peak {last.peak / 2**30:.1f}" in text

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 2**30))
    monkeypatch.delenv("RANK", raising=False)
    _tell_memory(config)
    assert text in capsys.readouterr().out


def test_buffers_of_a_pipeline_are_of_all_microbatches():
    settings = [*SMALL, "model.num_hidden_layers=4", "schedule=zbv"]
    few, many = (
        plan(settings_of("reference-961m", [*settings, f"accumulate={n}"], 2, "pp=2"), [0, 1]).walks for n in (8, 16)
    )
    one = 2048 * ModelConfig.load("reference-961m").hidden_size * 2
    # The first place has both ends: gradients come to one, the last stage's input to the other.
    assert [w.memory["received"] for w in few] == [8 * one * 2, 8 * one * 4]
    assert [b.memory["received"] - a.memory["received"] for a, b in zip(few, many)] == [16 * one, 32 * one]
    assert [b.peak - b.activations - (a.peak - a.activations) for a, b in zip(few, many)] == [16 * one, 32 * one]


def test_the_command(tmp_path):
    run = CliRunner().invoke(app, ["plan", "tiny", "--json", "--picture", str(tmp_path / "plan.png")])
    assert run.exit_code == 0, run.output
    made = json.loads(run.stdout)
    assert made["gpus"] == 1 and made["walks"][0]["peak"] > 0
    assert (tmp_path / "plan.png").stat().st_size > 5000
    assert not torch.distributed.is_initialized()
