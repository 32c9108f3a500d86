"""The study of positions: every number comes from a run that was made, or from an encoding as the model has it."""

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch
from html_words import words
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from abyssal import cli
from abyssal.config import Position, yarn_mscale
from abyssal.model.latent import LatentAttention
from abyssal.model.objective import Measured, Microbatch
from abyssal.model.packing import Packing
from abyssal.model.positions import inverse_frequencies, rotary
from abyssal.model.transformer import Transformer
from abyssal.ops.rotary import rotate
from abyssal.study.output import load
from abyssal.study.positions import LABELS, Settings, study_positions
from abyssal.study.positions_claims import claims
from abyssal.study.positions_encodings import encoding, placed_scores, products, rotated_parts
from abyssal.study.positions_measure import (
    Band,
    Embedded,
    Found,
    bands,
    bands_within,
    bits,
    embedded,
    factors,
    measured,
    nats,
    nats_sliding,
    stretched,
    with_yarn,
)
from abyssal.study.positions_pictures import binned
from abyssal.study.result import Picture, Result
from abyssal.study.trained import Plan, Trained, train_all

QUICK = dataclasses.replace(Settings.quick(), steps=4)
SILENT = Console(quiet=True)
KINDS: list[Position] = list(LABELS)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def told(work: Path) -> str:
    """What the command says, which writes everything below `work/out`."""
    arguments = ["study", "positions", "--quick", "--steps", str(QUICK.steps), "--work", str(work)]
    done = CliRunner().invoke(cli.app, [*arguments, "--out", str(work / "out")])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def result(work: Path, told: str) -> Result:
    return load(work / "out", "positions")


@pytest.fixture(scope="module")
def runs(result: Result, work: Path) -> dict[str, list[Trained]]:
    """Those that the study made, read back."""
    texts = QUICK.read_texts(work, SILENT, QUICK.sequence)
    return train_all(Plan(QUICK.variants(), range(QUICK.seeds), texts, QUICK.training(), work), SILENT)


@pytest.fixture(scope="module")
def pieces(result: Result, work: Path) -> torch.Tensor:
    longer = QUICK.read_texts(work, SILENT, QUICK.longest)
    return torch.stack([batch.tokens for of_kind in longer.held_out.values() for batch in of_kind])


def fresh(position: Position, layers: int = 2) -> Transformer:
    """With random weights, in float64."""
    config = dataclasses.replace(QUICK, layers=layers).model(position)
    return Transformer(config).init_weights(torch.Generator().manual_seed(1)).double()


def some(count: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, QUICK.vocab, (count, length), generator=torch.Generator().manual_seed(seed))


# ---- what is compared ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [QUICK, Settings(), Settings(width=256, rotary=20, layers=1)])
def test_all_kinds_have_as_many_parameters_and_equally_wide_scores(chosen: Settings):
    sizes = {sum(p.numel() for p in Transformer(chosen.model(kind)).parameters()) for kind in KINDS}
    scores = {(m.qk_nope_head_dim + m.qk_rope_head_dim, m.softmax_scale) for m in map(chosen.model, KINDS)}
    assert len(sizes) == len(scores) == 1
    assert {m.max_position_embeddings for m in map(chosen.model, KINDS)} == {chosen.sequence * chosen.reach}


def test_all_kinds_begin_with_the_same_embeddings_scaled(runs: dict[str, list[Trained]]):
    """As drawn they have a deviation of D^-1/2, and of 1 where they are used; four steps move them little."""
    drawn = Transformer(QUICK.model("rope")).init_weights(torch.Generator().manual_seed(1)).embed.weight.detach()
    for of_seeds in runs.values():
        own = of_seeds[1].model().embed.weight.detach().double()
        assert float((own - drawn * QUICK.width**0.5).abs().max()) < 5 * QUICK.steps * QUICK.lr
        assert float(own.std()) == pytest.approx(1, abs=0.1)


def test_the_result_says_what_was_counted(result: Result, runs: dict[str, list[Trained]]):
    assert len({run.parameters for x in runs.values() for run in x}) == 1
    assert set(result.numbers["parameters"].values()) == {runs["none"][0].parameters}
    assert f"All six have {runs['none'][0].parameters:,} parameters." in result.shown
    assert result.seconds > sum(run.seconds for x in runs.values() for run in x)


# ---- losses by position -------------------------------------------------------------------------------------------


def test_losses_are_those_of_each_text_by_itself():
    model, texts = fresh("decoupled"), some(5, 64)
    found = nats(model, texts)
    for row, tokens in zip(found, texts):
        logits = model(tokens, [64]).detach()
        by_hand = [-float(logits[t].log_softmax(-1)[tokens[t + 1]]) for t in range(63)]
        assert row.tolist() == pytest.approx(by_hand, rel=1e-9)


@given(st.integers(1, 3), st.sampled_from([8, 16]), st.sampled_from([2, 4]), st.integers(0, 9))
@settings(max_examples=8, deadline=None)
def test_a_windows_losses_are_those_of_a_text_that_begins_there(count: int, length: int, reach: int, seed: int):
    model, texts = fresh("sinusoidal", layers=1), some(count, length * reach, seed)
    found = nats_sliding(model, texts, length)
    assert found.shape == (count, length * reach - 1)
    for target in range(1, length * reach):
        begin = 0 if target < length else (target // (length // 2) - 1) * (length // 2)
        seen = target - begin
        assert seen < length and (begin == 0 or seen >= length // 2)
        own = texts[0, begin : target + 1]
        logits = model(own, [len(own)]).detach()
        loss = cross_entropy(logits[-2:-1], own[-1:]) if seen else None
        assert loss is not None and float(found[0, target - 1]) == pytest.approx(float(loss), rel=1e-8)


def test_the_loss_within_the_trained_length_is_the_one_that_training_measures(
    runs: dict[str, list[Trained]], work: Path
):
    """By the trainer's way: the same tokens, sums over all of them."""
    texts = QUICK.read_texts(work, SILENT, QUICK.sequence)
    run = runs["rope"][0]
    for kind, batches in texts.held_out.items():
        own = torch.stack([batch.tokens for batch in batches])
        found = nats(run.model(), own)
        counted = sum(Measured.of(run.model(), Microbatch.of(batch, 0)).nats.item() for batch in batches)
        assert float(found.sum()) == pytest.approx(counted, rel=1e-5)
        size = sum(len(texts.tokenizer.token_bytes(t)) for t in own[:, 1:].flatten().tolist())
        assert float(found.sum()) / math.log(2) / size == pytest.approx(run.checks[-1].by_kind[kind], rel=1e-5)


def test_the_tables_are_of_the_runs(result: Result, runs: dict[str, list[Trained]], pieces: torch.Tensor):
    whole, last = Band(1, 16), bands(16, 64)[-1]
    sizes = result.numbers["bytes_by_position"]
    within, per_byte, beyond = result.grids[:3]
    for i, name in enumerate(KINDS):
        told = [r["whole"] for r in result.numbers["variants"][name]["runs"]]
        mine = [measured(run.model().float(), pieces, 16) for run in runs[name]]
        for run, values in zip(mine, told):
            assert run.whole == pytest.approx(values, rel=1e-5)
        mean = sum(sum(x.whole[:15]) / 15 for x in mine) / len(mine)
        assert within.rows[i][0] == LABELS[name] and within.rows[i][5].startswith(f"{mean:.3f} ±")
        assert per_byte.rows[i][5].split()[0] == f"{sum(bits(x.whole, sizes, whole) for x in mine) / len(mine):.3f}"
        row = next(row for row in beyond.rows if row[0] == LABELS[name])
        apart = sum(last.of(x.whole) - last.of(x.sliding) for x in mine) / len(mine)
        assert row[5].startswith(f"{apart:+.3f} ±")
    assert [row[0] for row in beyond.rows if "YaRN" in row[0]] == [
        "RoPE, YaRN ×2", "RoPE, YaRN ×4", "decoupled RoPE, YaRN ×2", "decoupled RoPE, YaRN ×4"
    ]  # fmt: skip


def test_bands_have_every_predicted_position_once():
    assert bands(64, 256) == [(1, 64), (64, 128), (128, 256)] and factors(64, 256) == [2, 4]
    assert bands_within(64) == [(1, 8), (8, 16), (16, 32), (32, 64)]
    values = [float(t) for t in range(1, 256)]  # a predicted position's own number
    assert [b.of(values) for b in bands(64, 256)] == [32.0, 95.5, 191.5]
    assert bits([math.log(2)] * 255, [0.5] * 255, Band(1, 64)) == pytest.approx(2.0)
    assert [b.text for b in bands(64, 128)] == ["1–63", "64–127"]


# ---- moved and stretched ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", KINDS)
def test_only_what_is_added_minds_where_a_text_begins(position: Position):
    model, texts = fresh(position), some(3, 16)
    apart = float((nats(model, texts, 16) - nats(model, texts)).abs().max())
    if position == "none":
        assert apart == 0
    elif position in ("rope", "decoupled"):
        assert apart < 1e-5
    else:
        assert apart > 1e-3


@pytest.mark.parametrize("position", ["rope", "decoupled"])
def test_yarn_stretches_what_the_model_had_and_nothing_else(position: Position):
    model, texts = fresh(position), some(2, 16)
    assert torch.equal(nats(stretched(model, 1, 16), texts), nats(model, texts))
    slow = stretched(model, 4, 16)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), slow.parameters()))
    assert slow.config.softmax_scale == pytest.approx(model.config.softmax_scale * (0.1 * math.log(4) + 1) ** 2)
    assert yarn_mscale(4, 1.0) == pytest.approx(0.1 * math.log(4) + 1)
    ratio = inverse_frequencies(model.config) / inverse_frequencies(with_yarn(model.config, 4, 16))
    assert float(ratio[0]) == pytest.approx(1) and float(ratio[-1]) == pytest.approx(4)
    assert bool((ratio.diff() >= -1e-6).all())
    assert not torch.allclose(nats(slow, texts), nats(model, texts))
    assert slow.layers[0].attn.config.rope_scaling is not None  # type: ignore[union-attr]


# ---- the encodings ------------------------------------------------------------------------------------------------


def test_an_encoding_is_what_the_model_adds_or_turns():
    P = 64
    none, integer, binary, sinusoidal, rope, decoupled = (encoding(QUICK.model(kind), P) for kind in LABELS)
    assert none is None
    assert integer is not None and torch.equal(integer, torch.arange(P).double()[:, None].expand(P, QUICK.width))
    assert binary is not None
    for place in (0, 1, 5, 37, 63):
        digits = [int(d) for d in reversed(f"{place:06b}")]
        assert binary[place].tolist() == [digits[i % 6] for i in range(QUICK.width)]
    assert sinusoidal is not None
    assert float(sinusoidal[5, 6]) == pytest.approx(math.sin(5 / 10000 ** (6 / QUICK.width)))
    assert float(sinusoidal[5, 7]) == pytest.approx(math.cos(5 / 10000 ** (6 / QUICK.width)))
    assert float(sinusoidal.norm(dim=-1).std()) < 1e-12
    assert rope is not None and rope.shape == (P, 32)
    assert rope[9, 4:6].tolist() == pytest.approx([math.cos(9 / 10000 ** (4 / 32)), math.sin(9 / 10000 ** (4 / 32))])
    assert decoupled is not None and decoupled.shape == (P, 32)
    assert torch.equal(decoupled[:, :20], torch.tensor([1.0, 0.0]).double().repeat(10).expand(P, -1))
    assert decoupled[9, 20:22].tolist() == pytest.approx([math.cos(9), math.sin(9)])


def test_only_rotations_and_sinusoids_have_products_of_the_distance_alone():
    found = {kind: products(rows) for kind in KINDS if (rows := encoding(QUICK.model(kind), 64)) is not None}
    rows = encoding(QUICK.model("binary"), 64)
    assert rows is not None
    cosines = [float(rows[m] @ rows[m + 3] / rows[m].norm() / rows[m + 3].norm()) for m in range(1, 61)]
    assert found["binary"].mean[3] == pytest.approx(sum(cosines) / 60)
    assert (found["binary"].low[3], found["binary"].high[3]) == pytest.approx((min(cosines), max(cosines)))
    assert found["binary"].spread > 0.5
    assert found["integer"].mean == pytest.approx([1.0] * 63)
    for kind in ("sinusoidal", "rope", "decoupled"):
        assert found[kind].spread < 1e-5 and found[kind].mean[1] < 1
    assert found["rope"].mean[7] == pytest.approx(sum(math.cos(7 / 10000 ** (i / 16)) for i in range(16)) / 16)


@pytest.mark.parametrize("position", ["rope", "decoupled"])
def test_what_distance_adds_to_a_score_is_the_mean_over_pairs_of_tokens(position: Position):
    """All queries of the texts with all their keys, each rotated to every distance: by hand."""
    model, texts = fresh(position), some(2, 16)
    found = placed_scores(model, texts, 64)
    c = model.config
    assert found.shape == (QUICK.layers, 2, 64)
    attention = model.layers[0].attn
    assert isinstance(attention, LatentAttention)
    with torch.no_grad():
        x = model.layers[0].attn_norm(model.embed(texts.flatten()))  # type: ignore[operator]
        q, k = rotated_parts(attention, x)
        for distance in (0, 1, 40):
            angles = rotary(c, torch.full((len(q),), distance))
            assert angles is not None
            scores = torch.einsum("ihr,jhr->hij", rotate(q, *angles), k) * c.softmax_scale
            assert found[0, :, distance].tolist() == pytest.approx(scores.mean((1, 2)).tolist(), abs=1e-8)


def test_the_rotated_parts_are_those_that_the_model_rotates():
    """Scores of its own attention, from them and from what is beside them."""
    kinds: list[Position] = ["rope", "decoupled"]
    for position in kinds:
        model, tokens = fresh(position), some(1, 16)[0]
        attention = model.layers[0].attn
        assert isinstance(attention, LatentAttention)
        packing = Packing.of([16], tokens)
        with torch.no_grad():
            x = model.embed(tokens)
            angles = rotary(model.config, packing.positions)
            assert angles is not None
            q, k = (rotate(t, *angles) for t in rotated_parts(attention, x))
            q_nope, q_rope = attention.queries(x, angles)
            _, k_rope = attention.leave(x, angles)
            if position == "decoupled":
                assert q_rope is not None and k_rope is not None and torch.equal(q, q_rope)
                assert torch.equal(k, k_rope[:, None].expand(-1, 2, -1))
            else:
                k_nope = attention.wkv_b(attention.leave(x, angles)[0]).unflatten(-1, (2, -1))[..., :32]
                assert torch.equal(q, q_nope) and torch.equal(k, rotate(k_nope, *angles))


def test_integers_drown_the_token_and_what_is_not_added_leaves_it():
    texts = some(4, 64)
    found = {kind: embedded(fresh(kind), texts) for kind in KINDS}
    for kind in ("none", "rope", "decoupled"):
        assert found[kind].after == found[kind].before and found[kind].cosine == pytest.approx([1.0] * 64)
    by_hand = found["integer"].after[60]
    assert by_hand == pytest.approx(60 * QUICK.width**0.5, rel=0.05)
    assert found["integer"].cosine[60] < 0.03 < found["binary"].cosine[60]
    assert found["sinusoidal"].after[3] > found["sinusoidal"].before[3] == found["none"].before[3]


# ---- verdicts -----------------------------------------------------------------------------------------------------


def made(level: float, far: float = 0.0, yarn: float = 0.0, late: float = 0.0) -> Found:
    """Losses: `level`, `late` more in the second half of the trained length, `far` more past it."""
    whole = [level] * 31 + [level + late] * 32 + [level + far] * 192
    flat = [1.0] * 256
    stretched = {2: [level + yarn] * 127, 4: [level + yarn] * 255}
    return Found(whole, [level] * 255, stretched, 0.0, 0.0, Embedded(flat, flat, flat))


def judged(**of: list[Found]) -> dict[str, str]:
    base = [made(2.0), made(2.1), made(2.2)]
    return {c.says: c.verdict for c in claims({name: of.get(name, base) for name in KINDS}, 64)}


def test_verdicts_follow_the_numbers():
    better, broken = "RoPE predicts better than sinusoids", "RoPE does not go past the trained length"
    lowers = "YaRN, without training further, lowers the loss of rope past the trained length"
    serves = "YaRN ×2, without training further, serves twice the length: rope is no worse than in a window"
    costs = "YaRN costs rope next to nothing within the trained length"
    worse = "And the worse the larger they are"
    equal = judged()
    assert equal[better] == equal[broken] == equal[lowers] == "not resolved"
    assert equal[serves] == equal[costs] == equal["Decoupled RoPE is no worse than coupled RoPE"] == "shown"
    lower = judged(rope=[made(1.9), made(2.0001), made(2.0999)])
    assert lower[better] == "shown" and lower["Decoupled RoPE is no worse than coupled RoPE"] == "NOT SO"
    far = judged(rope=[made(2.0, 1.0, 0.5), made(2.1, 1.1, 0.5), made(2.2, 0.9, 0.5)])
    assert far[broken] == far[lowers] == "shown" and far[serves] == far[costs] == "NOT SO"
    assert far["Without encodings a decoder extrapolates better than with RoPE"] == "shown"
    helped = judged(rope=[made(2.0, -0.1), made(2.1, -0.11), made(2.2, -0.09)])
    assert helped[broken] == helped[lowers] == "NOT SO: the reverse"
    grown = judged(integer=[made(3.0, late=0.5), made(3.1, late=0.6), made(3.2, late=0.4)])
    assert grown["Integers predict worse than nothing"] == grown[worse] == "shown" and equal[worse] == "not resolved"
    noisy = judged(rope=[made(2.2), made(2.0), made(2.1)])
    assert noisy[better] == noisy["Decoupled RoPE is no worse than coupled RoPE"] == "not resolved"


def test_the_result_says_all_claims_once_and_its_size(result: Result):
    plain = result.numbers["claims"]
    assert len(plain) == 19 and len({c["says"] for c in plain}) == 19
    shown, told = " ".join(result.shown), " ".join(result.not_shown)
    for claim in plain:
        assert (claim["says"] in shown) == (claim["verdict"] == "shown")
        assert (claim["says"] in told) == (claim["verdict"] != "shown")
    assert f"{QUICK.steps * QUICK.batch:,} tokens" in told and "not isolated" in told
    assert "an even guess has 5.70" in told  # so short a run has learnt nothing, and it says so


def test_bins_are_means_and_know_where_they_lie():
    at, means = binned(torch.arange(10.0).reshape(2, 5).numpy(), 2, 16)
    assert at.tolist() == [16.5, 18.5, 20.0] and means.tolist() == [[0.5, 2.5, 4.0], [5.5, 7.5, 9.0]]


# ---- the command --------------------------------------------------------------------------------------------------


def test_the_command_writes_everything(work: Path, told: str, result: Result):
    files = {path.name for path in (work / "out").iterdir()}
    assert files == {"positions.json", "positions.html", *(f"positions{n}.png" for n in ("", "-2", "-3", "-4"))}
    assert "12/12 decoupled RoPE, seed 1" in told and "Past the trained length" in told
    assert len(result.grids) == 9 and result.seeds == (0, 1)
    html = (work / "out" / "positions.html").read_text("utf-8")
    assert html.count("data:image/png;base64,") == 4 and "http" not in words(html)
    assert all(picture.png.startswith(b"\x89PNG") for picture in result.pictures)


def test_begun_again_it_trains_none(work: Path, result: Result, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("abyssal.study.trained._train", None)  # would be called
    for drawn in ("losses", "encodings", "norms", "dots"):
        monkeypatch.setattr(f"abyssal.study.positions_pictures.{drawn}", lambda *given: Picture("", b""))
    again = study_positions(QUICK, work, "abyssal study positions", SILENT)
    assert again.numbers == result.numbers and again.shown == result.shown and again.grids == result.grids


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seeds", "1"], "seeds: expected two or more, there is no spread of 1"),
        (["--steps", "3"], "steps: expected 4 or more, got 3"),
        (["--sequence", "20"], "sequence: expected a multiple of 8, got 20"),
        (["--reach", "3"], "reach: expected 2, 4, 8 ..., got 3"),
        (["--width", "48"], "width: expected a multiple of 32, got 48"),
        (["--rotary", "32"], "rotary: expected an even number below 32, got 32"),
        (["--lr", "nan"], "lr: expected a positive number, got nan"),
        (["--device", "abacus"], "device: 'abacus' cannot be used"),
        (["--data", "no/such/folder"], "--data: no/such/folder is no folder"),
        (["--json", "no/such/folder/a.json"], "--json: no/such/folder is no folder"),
    ],
)
def test_errors_are_one_line_and_come_before_any_work(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    monkeypatch.setattr("abyssal.study.small.train_all", None)  # would be called
    work = tmp_path / "work"
    monkeypatch.setattr(sys, "argv", ["abyssal", "study", "positions", "--quick", "--work", str(work), *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not work.exists()
