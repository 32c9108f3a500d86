"""The study of attention: equal parameters, orders of multiplication that agree, numbers that come from runs."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from html_words import words
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

import abyssal.model.latent
from abyssal import cli
from abyssal.model.latent import LatentAttention
from abyssal.model.packing import Packing
from abyssal.model.transformer import Transformer
from abyssal.ops.attention import attention
from abyssal.study import attention_decode
from abyssal.study.attention import EXPANDED, Settings, study_attention
from abyssal.study.attention_algebra import (
    TASKS,
    Shape,
    absorbed,
    algebra,
    apart_of,
    concatenated,
    draw,
    expanded,
    multiplied,
    summed,
    two_factors,
)
from abyssal.study.attention_claims import of_decoding, of_training, slower_than
from abyssal.study.attention_clock import Time, times, work
from abyssal.study.attention_decode import Point, absorbed_apart, decode, decoding, filled, keys_again
from abyssal.study.attention_heads import EVERY, Alike, alike, attention_rows, divergences
from abyssal.study.attention_ladder import Rung, equal, ladder
from abyssal.study.output import load
from abyssal.study.result import Result
from abyssal.study.texts import open_texts
from abyssal.study.trained import Check, Plan, Trained, Variant, train_all

QUICK = dataclasses.replace(Settings.quick(), steps=4)
NAMES = ["mha", "gqa", "mqa", "bare", "mla", "coupled"]
TOKENS = torch.randint(QUICK.vocab, (40,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def result(folder: Path) -> Result:
    return study_attention(QUICK, folder, "abyssal study attention", Console(quiet=True))


@pytest.fixture(scope="module")
def runs(result: Result, folder: Path) -> dict[str, list[Trained]]:
    """Those that the study made, read back: none is trained."""
    texts = open_texts(folder, None, QUICK.text, QUICK.vocab, QUICK.sequence, QUICK.held_out)
    variants = [Variant(rung.name, rung.label, rung.model) for rung in QUICK.ladder()]
    return train_all(Plan(variants, range(QUICK.seeds), texts, QUICK.training(), folder), Console(quiet=True))


def models() -> dict[str, Transformer]:
    """In float64, with weights that are not near zero."""
    made = {}
    for rung in QUICK.ladder():
        config = rung.model.replace(initializer_range=0.2)
        model = Transformer(config).init_weights(torch.Generator().manual_seed(1))
        made[rung.name] = model.double().eval().requires_grad_(False)
    return made


# ---- the ladder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [QUICK, Settings()], ids=["quick", "default"])
def test_all_rungs_have_the_parameters_of_mha(chosen: Settings):
    rungs = chosen.ladder()
    assert [rung.name for rung in rungs] == NAMES
    with torch.device("meta"):
        counted = [sum(p.numel() for p in Transformer(rung.model).parameters()) for rung in rungs]
    assert counted == [rung.parameters for rung in rungs]
    assert max(abs(n / counted[0] - 1) for n in counted) < 0.005
    kinds = [(rung.model.attention, rung.model.position) for rung in rungs]
    assert kinds == [("mha", "rope"), ("gqa", "rope"), ("mqa", "rope"), ("mla", "none"), ("mla", "decoupled"),
                     ("mla", "rope")]  # fmt: skip
    same = {"attention", "position", "num_key_value_heads", "qk_rope_head_dim", "intermediate_size", "source"}
    fields = [f.name for f in dataclasses.fields(rungs[0].model) if f.name not in same]
    for rung in rungs[1:]:
        assert all(getattr(rung.model, name) == getattr(rungs[0].model, name) for name in fields)


@given(st.sampled_from([4, 8, 16]), st.sampled_from([64, 128, 192]), st.integers(1, 3), st.integers(260, 900))
@settings(max_examples=4, deadline=None)
def test_the_width_solved_for_is_the_nearest(heads: int, width: int, layers: int, vocab: int):
    rungs = ladder(width, heads, 1, layers, vocab, 64)
    for rung in rungs[1:]:
        wide = rung.model.intermediate_size
        for other in (wide - 1, wide + 1):
            with torch.device("meta"):
                model = Transformer(rung.model.replace(intermediate_size=other))
            n = sum(p.numel() for p in model.parameters())
            assert abs(n - rungs[0].parameters) >= abs(rung.parameters - rungs[0].parameters)


def test_what_a_token_leaves_behind_is_the_papers_formula():
    of = {rung.name: rung.elements for rung in Settings().ladder()}
    l, n_h, n_g, d_h, d_c, d_r = 4, 8, 2, 16, 64, 8
    assert of == {"mha": 2 * n_h * d_h * l, "gqa": 2 * n_g * d_h * l, "mqa": 2 * d_h * l, "bare": d_c * l,
                  "mla": (d_c + d_r) * l, "coupled": d_c * l}  # fmt: skip
    assert of["mla"] / of["mqa"] == 2.25


def test_parameters_that_no_width_makes_are_refused():
    config = QUICK.ladder()[4].model
    with pytest.raises(
        ValueError, match=r"heads: no MLP beside mla of 4 makes 1,000 parameters within 0\.5%; the nearest, of"
    ):
        equal(config, 1000)


# ---- clock and work -----------------------------------------------------------------------------------------------


def test_work_is_products_and_what_is_made():
    a, b = torch.rand(3, 5), torch.rand(5, 7)
    done = work(lambda: (a[1:].T.unsqueeze(0), (a @ b).exp()))
    assert done == (2 * 3 * 5 * 7, 2 * 3 * 7 * 4)  # a view is not made; a product and its exponential are


def test_functions_are_timed_in_turns():
    called: list[str] = []
    found = times([lambda: called.append("a"), lambda: called.append("b")], 3)
    assert "".join(called) == "abababab"
    assert all(0 <= t.low <= t.ms <= t.high for t in found)


# ---- algebra ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 6), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_orders_of_multiplication_have_one_result(heads: int, tokens: int, earlier: int, wide: int, seed: int):
    shape = Shape(heads, nope=wide, rope=2, value=wide + 1, latent=wide + 2, query=wide + 3)
    t = draw(shape, tokens, tokens + earlier, seed)
    for _, _, ways in TASKS:
        first, second = (function(t) for _, function, _ in ways)
        assert first.shape == second.shape and apart_of(second, first) < 1e-12


def test_the_algebra_is_that_of_the_operation():
    """`ops.attention`, which the models train by."""
    t = draw(Shape(3, 6, 4, 5, 8, 10), 4, 9, 0)
    assert apart_of(torch.einsum("lc,hnc->lhn", t.latent, t.w_uk), t.k_nope) < 1e-12
    v = torch.einsum("lc,hvc->lhv", t.latent, t.w_uv)
    cu_q, cu_k = torch.tensor([0, 4], dtype=torch.int32), torch.tensor([0, 9], dtype=torch.int32)
    expected = attention(t.q_nope, t.q_rope, t.k_nope, t.k_rope, v, cu_q, cu_k, 4, 9, 10**-0.5, path="reference")
    assert apart_of(expanded(t), expected) < 1e-12 and apart_of(absorbed(t), expected) < 1e-12
    by_hand = torch.stack([
        torch.stack([
            torch.stack([(t.q_nope[i, h] * t.k_nope[j, h]).sum() + (t.q_rope[i, h] * t.k_rope[j]).sum()
                         for j in range(9)]) for i in range(4)]) for h in range(3)
    ])  # fmt: skip
    assert apart_of(summed(t), by_hand) < 1e-12 and apart_of(concatenated(t), by_hand) < 1e-12
    latent = torch.einsum("thn,hnc->thc", t.q_nope, t.w_uk)
    assert apart_of(two_factors(t), latent) < 1e-12 and apart_of(multiplied(t), latent) < 1e-12


def test_counts_of_the_algebra_by_hand():
    H, N, R, V, C, Q, L = 2, 16, 8, 12, 32, 48, 40
    ways = {(way.task, way.name): way for way in algebra(Shape(H, N, R, V, C, Q), L, 5, 2, 0)}
    rotary, cached = 2 * H * R * L, 2 * H * L
    assert ways["attend: a token", "absorbed"].flops == 2 * H * C * (N + V) + cached * (C + C) + rotary
    assert ways["attend: a token", "expanded"].flops == 2 * L * C * H * (N + V) + cached * (N + V) + rotary
    assert ways["query: a token", "two factors"].weights == 4 * H * N * (Q + C)
    assert ways["query: a token", "W_UQ·W_UK"].weights == 4 * H * Q * C
    assert ways["query: a token", "two factors"].flops == 2 * H * N * (Q + C)
    assert ways["query: a token", "W_UQ·W_UK"].flops == 2 * H * Q * C
    assert ways["scores: a token", "sum"].flops == ways["scores: a token", "concatenation"].flops
    copied = 4 * (L + 1) * H * (N + R)
    more = ways["scores: a token", "concatenation"].made - ways["scores: a token", "sum"].made
    assert more == copied - 2 * 4 * H * L  # two scores and their sum, where there is one
    assert all(way.apart_64 < 1e-12 and way.apart_32 < 1e-4 for way in ways.values())
    assert all(way.apart_64 > 0 for (_, name), way in ways.items() if name in ("expanded", "W_UQ·W_UK"))


# ---- decoding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_token_decoded_after_the_cache_is_that_of_the_whole_text(name: str):
    model = models()[name]
    cache = filled(model, TOKENS[:-1], 64)
    expected = model(TOKENS, [len(TOKENS)])[-1:]
    assert apart_of(decode(model, cache, TOKENS[-1:], len(TOKENS)), expected) < 1e-12
    if name in ("bare", "mla"):
        for path in ("absorbed", "expanded"):
            assert apart_of(decode(model, cache, TOKENS[-1:], len(TOKENS), path), expected) < 1e-12
    if name == "coupled":
        with pytest.raises(ValueError, match="with coupled RoPE a rotation stands between W_UQ and W_UK"):
            decode(model, cache, TOKENS[-1:], len(TOKENS), "absorbed")


def test_a_cache_past_the_text_has_its_rows_again():
    model = models()["mha"]
    cache = filled(model, TOKENS[:10], 25)
    for layer in cache.layers:
        for rows in layer.values():
            assert bool((rows[:10] != 0).any(1).all())
            assert torch.equal(rows[10:20], rows[:10]) and torch.equal(rows[20:], rows[:5])


def test_the_keys_made_anew_are_those_attended_to(monkeypatch: pytest.MonkeyPatch):
    model, seen = models()["coupled"], []

    def look(q: Tensor, q_rope: Tensor | None, k: Tensor, *others: object) -> Tensor:
        seen.append(k)
        return attention(q, q_rope, k, *others)  # type: ignore[arg-type]

    cache = filled(model, TOKENS, 64)
    monkeypatch.setattr(abyssal.model.latent, "attention", look)
    decode(model, cache, TOKENS[-1:], len(TOKENS))
    assert len(seen) == QUICK.layers and torch.equal(seen[-1], keys_again(model, cache, len(TOKENS)))


def test_points_are_of_their_context(monkeypatch: pytest.MonkeyPatch):
    made = {name: model.float() for name, model in models().items()}
    lines = [(made["mha"], None), (made["mla"], None), (made["mla"], "expanded"), (made["coupled"], None)]
    read: list[int] = []
    original = attention_decode.decode

    def watched(model: Transformer, cache: object, token: Tensor, context: int, path: str | None = None) -> Tensor:
        read.append(context)
        return original(model, cache, token, context, path)  # type: ignore[arg-type]

    monkeypatch.setattr(attention_decode, "decode", watched)
    found, again = decoding(lines, 3, TOKENS, (8, 24), 2)
    assert read == [8] * 12 + [24] * 12  # four lines, two rounds and one that is not counted
    of = {rung.name: rung for rung in QUICK.ladder()}
    c = of["coupled"].model
    H, N, V, C = c.num_attention_heads, c.qk_nope_head_dim, c.v_head_dim, c.kv_lora_rank
    for points, name in zip(found, ("mha", "mla", "mla", "coupled")):
        assert [p.context for p in points] == [8, 24]
        assert [p.cache for p in points] == [4 * of[name].elements * n for n in (8, 24)]
    for a in again:
        assert a.flops == c.num_hidden_layers * 2 * a.context * C * H * (N + V)
        assert a.made > c.num_hidden_layers * 4 * a.context * H * (N + V)
    assert found[2][1].flops > found[1][1].flops  # expanded anew is more than absorbed
    assert absorbed_apart(made["mla"], TOKENS, 32) < 1e-12


# ---- heads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_rows_compared_are_those_the_model_attends_with(name: str):
    """What they make of the values is what the layer says."""
    model = models()[name]
    block = model.layers[-1]
    seen: list[tuple[Tensor, Tensor]] = []
    handle = block.attn.register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
    rows = attention_rows(model, TOKENS)
    handle.remove()
    model.hidden(TOKENS, Packing.of([40], TOKENS))
    assert len(rows) == QUICK.layers and len(seen) == 1  # and no hook is left behind
    (x, out), probs, attn, H = seen[0], rows[-1], block.attn, QUICK.heads
    assert probs.shape == (H, 40, 40) and not bool(probs.triu(1).any())
    assert torch.allclose(probs.sum(-1), torch.ones((), dtype=probs.dtype))
    if isinstance(attn, LatentAttention):
        latent = attn.kv_norm(attn.wkv_a(x)[:, : attn.config.kv_lora_rank])
        v = attn.wkv_b(latent).unflatten(-1, (H, -1))[..., attn.config.qk_nope_head_dim :]
    else:
        v = attn.wv(x).unflatten(-1, (-1, attn.config.v_head_dim))
        v = v.repeat_interleave(H // v.shape[1], 1)
    assert apart_of(attn.wo(torch.einsum("htl,lhv->thv", probs, v).flatten(1)), out) < 1e-12


def test_divergence_by_hand():
    rows = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]], [[0.5, 0.5]]])
    found = divergences(rows)
    half = 0.75 * torch.tensor(4 / 3).log2() + 0.25 * torch.tensor(4.0).log2() - 0.5
    assert found[0].tolist() == pytest.approx([0.0, 0.0, 1.0, float(half)], abs=1e-6)
    assert torch.equal(found, found.T) and float(found[2, 3]) == pytest.approx(float(half), abs=1e-6)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_divergence_is_between_alike_and_nothing_in_common(heads: int, rows: int, wide: int, seed: int):
    drawn = torch.rand(heads, rows, wide, generator=torch.Generator().manual_seed(seed)).mul(9).softmax(-1)
    found = divergences(drawn)
    assert bool((found >= 0).all()) and bool((found <= 1).all()) and not bool(found.diagonal().any())
    assert not bool(divergences(drawn[:1].expand(3, -1, -1)).gt(1e-12).any())


def test_the_mean_is_over_pairs_of_different_heads(folder: Path, runs: dict[str, list[Trained]]):
    texts = open_texts(folder, None, QUICK.text, QUICK.vocab, QUICK.sequence, QUICK.held_out)
    batches, model = texts.held_out["code"][:2], models()["mla"]
    found = alike(model, batches)
    pairs = [(a, b) for a in range(QUICK.heads) for b in range(QUICK.heads) if a != b]
    for layer in range(QUICK.layers):
        by_hand = []
        for batch in batches:
            rows = attention_rows(model, batch.tokens)[layer][:, EVERY - 1 :: EVERY]
            between = divergences(rows)
            by_hand += [float(between[a, b]) for a, b in pairs]
        assert found.by_layer[layer] == pytest.approx(sum(by_hand) / len(by_hand))
    assert found.divergence == pytest.approx(sum(found.by_layer) / QUICK.layers) and found.divergence > 0.001


# ---- verdicts -----------------------------------------------------------------------------------------------------


def run_of(bits: float) -> Trained:
    return Trained("", 0, [1.0], [[]], [Check(1, bits, {})], {}, 1, 1, 1.0, Path())


def judged(**bits: list[float]) -> dict[str, str]:
    base = [2.0, 2.1, 2.2]
    made = {name: [run_of(x) for x in bits.get(name, base)] for name in NAMES}
    heads = {name: [Alike(x / 10, [], []) for x in bits.get(name, base)] for name in NAMES}
    said = of_training(QUICK.ladder(), made, heads)
    return {claim.says: claim.verdict for claim in said}


def test_verdicts_follow_the_numbers():
    equal_ones = judged()
    assert set(equal_ones.values()) == {"not resolved"} and len(equal_ones) == 9
    worse = judged(gqa=[2.1, 2.2001, 2.2999], mla=[2.1, 2.2001, 2.2999])
    assert worse["MHA predicts better than GQA"] == "shown"
    assert worse["GQA predicts better than MQA"] == "NOT SO: the reverse"
    assert worse["MLA predicts better than MHA"] == "NOT SO: the reverse"
    assert worse["MHA predicts better than MQA"] == "not resolved"
    assert worse["Coupled RoPE predicts better than decoupled"] == "shown"
    assert worse["Heads differ more under GQA, 2 groups than under MHA"] == "shown"
    assert judged(mla=[1.9, 2.0001, 2.0999])["The rotary key helps prediction"] == "shown"
    assert judged(mqa=[1.9, 2.0001, 2.0999])["Heads are more alike under MQA than under MHA"] == "shown"


def test_times_are_told_apart_by_their_quartiles():
    fast, slow, wide = Time(1.0, 0.9, 1.1), Time(2.0, 1.9, 2.1), Time(2.0, 0.5, 4.0)
    assert slower_than("", "", "", slow, fast).verdict == "shown"
    assert slower_than("", "", "", fast, slow).verdict == "NOT SO: the reverse"
    assert slower_than("", "", "", wide, fast).verdict == "not resolved"
    assert slower_than("", "", "", slow, fast).found == "2 and 1 ms, 2 times"

    def line(*ms: float) -> list[Point]:
        return [Point(n, Time(x, 0.95 * x, 1.05 * x), 1, 1) for n, x in zip((8, 64), ms)]

    grows = of_decoding({"mha": line(2, 3), "gqa": line(1, 2), "mla": line(1, 1), "coupled": line(1, 9)})
    assert [claim.verdict for claim in grows] == ["shown"] * 4
    assert grows[1].found == "1.0 at 8, 9.0 at 64"
    falls = of_decoding({"mha": line(1, 1), "gqa": line(1, 1), "mla": line(1, 9), "coupled": line(9, 9)})
    assert [claim.verdict for claim in falls] == ["not resolved", "NOT SO", "not resolved", "NOT SO: the reverse"]


# ---- the result ---------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_runs(result: Result, runs: dict[str, list[Trained]]):
    plain = result.numbers
    assert list(plain["rungs"]) == NAMES == list(runs)
    for name, of_seeds in runs.items():
        told = plain["rungs"][name]
        assert {run.parameters for run in of_seeds} == {told["parameters"]}
        for run, each in zip(of_seeds, told["runs"], strict=True):
            assert each["bits_per_byte"] == run.checks[-1].bits_per_byte and each["seed"] == run.seed
            held = [b for k in run.checks[-1].by_kind.values() for b in [k]]
            assert min(held) <= run.bits_per_byte <= max(held)
            assert sum(p.numel() for p in run.model().parameters()) == told["parameters"]
            assert run.tokens == plain["tokens"] == QUICK.steps * QUICK.batch
    assert list(plain["decoding"]) == [*NAMES, EXPANDED]
    assert plain["model_apart"] < 1e-12 and len(plain["algebra"]) == 2 * len(TASKS)
    measured = plain["seconds_measuring"]
    assert result.seconds > measured + sum(run.seconds for x in runs.values() for run in x)


def test_the_result_says_all_claims_once_and_its_size(result: Result):
    plain = result.numbers["claims"]
    shown = [c for c in plain if c["verdict"] == "shown"]
    assert len(shown) == len(result.shown) and len({c["says"] for c in plain}) == len(plain) == 22
    told = " ".join(result.not_shown)
    for claim in plain:
        assert (f"{claim['says']} (" in told) == (claim["verdict"] != "shown")
    bits = {name: [r["bits_per_byte"] for r in x["runs"]] for name, x in result.numbers["rungs"].items()}
    apart = [a - b for a, b in zip(bits["mla"], bits["mha"])]
    claim = next(c for c in plain if c["says"] == "MLA predicts better than MHA")
    assert claim["numbers"]["difference"] == pytest.approx(sum(apart) / len(apart))
    assert f"{QUICK.steps * QUICK.batch:,} tokens" in told and "was not searched for" in told
    assert "fell from" in told  # so short a run has learnt nothing, and it says so
    for counted in ("MLA keeps less than MHA", "Two factors are smaller than W_UQ·W_UK", "have one result"):
        assert any(counted in line for line in result.shown)


def test_the_command_writes_everything(folder: Path, result: Result, tmp_path: Path):
    """With the runs that are there already: it trains none, and measures again."""
    arguments = ["study", "attention", "--quick", "--steps", str(QUICK.steps), "--work", str(folder)]
    done = CliRunner().invoke(cli.app, [*arguments, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "12 of 12 runs are in" in done.output
    pictures = {"attention.png", "attention-2.png", "attention-3.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"attention.json", "attention.html", *pictures}
    read = load(tmp_path, "attention")
    assert read.numbers["rungs"] == result.numbers["rungs"] and read.numbers["texts"] == result.numbers["texts"]
    assert read.seeds == (0, 1) and len(read.grids) == 9
    html = (tmp_path / "attention.html").read_text("utf-8")
    assert html.count("data:image/png;base64,") == 3 and "http" not in words(html) and "110.6K" in html


def test_a_rungs_cache_is_counted_by_its_own_leaves():
    rung: Rung = QUICK.ladder()[4]
    layers = Transformer(rung.model).leaves()
    assert rung.elements == sum(width for leaf in layers for width, _ in leaf.values()) and rung.bytes == 2 * 72


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seeds", "1"], "seeds: expected two or more, there is no spread of 1"),
        (["--steps", "3"], "steps: expected 4 or more, got 3"),
        (["--heads", "3"], "heads: expected as many as divide width 32 into multiples of 4, got 3"),
        (["--groups", "3"], "groups: expected a divisor of the 4 heads, got 3"),
        (["--context", "16"], "contexts: expected two or more, rising from 2 or more, got (16,)"),
        (["--context", "64,16"], "contexts: expected two or more, rising from 2 or more, got (64, 16)"),
        (["--context", "a"], "--context: expected positive numbers with commas between them, got 'a'"),
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
    work_folder = tmp_path / "work"
    line = ["abyssal", "study", "attention", "--quick", "--work", str(work_folder), *arguments]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not work_folder.exists()
