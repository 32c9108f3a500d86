"""The study of experts: shapes that are equal, experts taken out token by token, and numbers recomputed by other
means."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from html_words import words
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cosine_similarity, silu
from typer.testing import CliRunner

from abyssal import cli
from abyssal.config import ConfigError, ModelConfig
from abyssal.model.experts import Experts, Gate, MoE
from abyssal.model.objective import Measured, Microbatch
from abyssal.model.transformer import Transformer
from abyssal.study.experts import Settings, study_experts
from abyssal.study.experts_alike import alike, combined, picks, tells_of_token
from abyssal.study.experts_claims import claims
from abyssal.study.experts_disable import OtherGate, routed_otherwise
from abyssal.study.experts_measure import Found, Measurer
from abyssal.study.experts_pictures import by_favourite
from abyssal.study.experts_shapes import check_equal, counted, shapes
from abyssal.study.experts_tokens import context_of
from abyssal.study.output import load
from abyssal.study.result import Result
from abyssal.study.texts import Texts, open_texts
from abyssal.study.trained import Plan, Trained, train_all

QUICK = dataclasses.replace(Settings.quick(), steps=4)
SILENT = Console(quiet=True)
LABELS = {"few": "2 of 4", "few_shared": "1 shared + 1 of 3", "fine": "4 of 8", "fine_shared": "1 shared + 3 of 7"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def result(work: Path) -> Result:
    return study_experts(QUICK, work, "abyssal study experts", SILENT)


@pytest.fixture(scope="module")
def texts(result: Result, work: Path) -> Texts:
    return open_texts(work, None, QUICK.text, QUICK.vocab, QUICK.sequence, QUICK.held_out)


@pytest.fixture(scope="module")
def runs(texts: Texts, work: Path) -> dict[str, list[Trained]]:
    """Those that the study made, read back."""
    return train_all(Plan(QUICK.variants(), range(QUICK.seeds), texts, QUICK.training(), work), SILENT)


@pytest.fixture(scope="module")
def measurer(texts: Texts) -> Measurer:
    return Measurer(texts, QUICK.levels(), QUICK.parts, QUICK.vocab, "cpu")


def drawn(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model in float64 whose weights are not near zero and whose biases are not zero."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config).init_weights(generator).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10)
        for gate in model.gates():
            assert gate.bias is not None
            gate.bias.normal_(0, 0.05, generator=generator)
    return model.eval()


# ---- shapes -------------------------------------------------------------------------------------------------------


@given(st.integers(4, 20), st.integers(2, 4), st.integers(1, 6), st.integers(2, 4))
@settings(max_examples=10, deadline=None)
def test_shapes_are_equal_but_for_their_routers(experts: int, chosen: int, narrow: int, parts: int):
    model = QUICK.model()
    made = shapes(experts, chosen, narrow * parts, parts)
    sizes = [counted(shape, model) for shape in made]
    check_equal(sizes)
    for shape, size in zip(made[:-1], sizes):
        assert shape.routed is not None
        assert size.routers == QUICK.layers * shape.routed * (QUICK.width + 1)
        assert size.routed_experts + size.shared_experts == QUICK.layers * experts * 3 * QUICK.width * narrow * parts
        assert shape.shared + shape.routed == experts * (parts if shape.name.startswith("fine") else 1)
    assert sizes[-1].dense_mlps == QUICK.layers * chosen * 3 * QUICK.width * narrow * parts
    assert sizes[-1].routers == 0


def test_shapes_that_are_not_equal_are_refused():
    model = QUICK.model()
    made = shapes(4, 2, 16, 2)
    wide = dataclasses.replace(made[2], width=9)
    with pytest.raises(ValueError, match="shapes: expected equal parameters"):
        check_equal([counted(shape, model) for shape in (*made[:2], wide, *made[3:])])
    other = dataclasses.replace(made[1], chosen=2)
    with pytest.raises(ValueError, match="shapes: expected equal parameters"):
        check_equal([counted(shape, model) for shape in (made[0], other, *made[2:])])


def test_the_models_that_were_trained_have_the_parameters_that_are_told(result: Result, runs: dict[str, list[Trained]]):
    for name, told in result.numbers["shapes"].items():
        biases = QUICK.layers * (told["routed"] or 0)  # buffers, and counted with the routers
        for run in runs[name]:
            assert run.parameters == told["parameters"]["total"] - biases
            model = run.model()
            layers = [m for m in model.modules() if isinstance(m, MoE)]
            assert len(layers) == (0 if name == "dense" else QUICK.layers)
            for layer in layers:
                assert layer.experts.w1.shape == (told["routed"], told["width"], QUICK.width)
                assert (layer.shared_experts is not None) == bool(told["shared"])


def test_experts_cut_into_parts_of_the_same_affinity_compute_what_they_did():
    """So the shapes with small experts have all that the large ones have, and gates that are not normalised do not
    make them smaller."""
    made = {shape.name: shape.of(QUICK.model()) for shape in QUICK.shapes()}
    few, fine = drawn(made["few"]), drawn(made["fine"], 1)
    state = few.state_dict()
    for name, whole in state.items():
        if ".ffn.gate." in name:
            state[name] = whole.repeat_interleave(QUICK.parts, 0)
        elif name.endswith((".experts.w1", ".experts.w3")):  # [E, F, D] -> [m E, F/m, D]
            state[name] = whole.reshape(-1, whole.shape[1] // QUICK.parts, whole.shape[2])
        elif name.endswith(".experts.w2"):  # [E, D, F] -> [m E, D, F/m]
            state[name] = torch.cat([p for e in whole for p in e.chunk(QUICK.parts, -1)]).reshape(
                -1, whole.shape[1], whole.shape[2] // QUICK.parts
            )
    fine.load_state_dict(state)
    tokens = torch.randint(0, QUICK.vocab, (40,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(fine(tokens, [25, 15]), few(tokens, [25, 15]), rtol=1e-11, atol=1e-11)


# ---- disabling ----------------------------------------------------------------------------------------------------


@given(st.integers(0, 4), st.integers(1, 4), st.booleans(), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_a_masked_gate_picks_those_that_come_next(masked: int, chosen: int, biased: bool, norm: bool, seed: int):
    config = ModelConfig.load("tiny").replace(
        n_routed_experts=8, num_experts_per_tok=2, n_group=1, topk_group=1, norm_topk_prob=norm,
        topk_method="noaux_tc" if biased else "greedy",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    gate = Gate(config).double()
    with torch.no_grad():
        gate.weight.normal_(0, 0.3, generator=generator)
        if gate.bias is not None:
            gate.bias.normal_(0, 0.3, generator=generator)
    x = torch.randn(9, config.hidden_size, dtype=torch.float64, generator=generator)
    routing = OtherGate(gate, masked, chosen)(x)
    scores = (x @ gate.weight.T).sigmoid()
    steered = scores if gate.bias is None else scores + gate.bias
    order = steered.argsort(-1, descending=True)[:, masked : masked + chosen]
    assert torch.equal(routing.indices.sort(-1).values, order.sort(-1).values)
    values = scores.gather(1, routing.indices)
    expected = (values / values.sum(-1, keepdim=True) if norm else values) * config.routed_scaling_factor
    torch.testing.assert_close(routing.weights, expected)
    torch.testing.assert_close(routing.scores, scores)
    own = gate(x)
    if masked == 0 and chosen == 2:
        assert torch.equal(own.indices, routing.indices) and torch.equal(own.weights, routing.weights)


def test_a_gate_with_too_few_experts_left_is_refused():
    config = ModelConfig.load("tiny").replace(n_group=1, topk_group=1)
    with pytest.raises(ConfigError, match=r"num_experts_per_tok: expected 1 to n_routed_experts \(16\), got 17"):
        OtherGate(Gate(config), 13, 4)


def by_hand(model: Transformer, tokens: Tensor, masked: int, more: int, shared: bool) -> Tensor:
    """Logits of one sequence where every MoE layer is a loop over tokens and experts."""

    def looped(layer: MoE, x: Tensor) -> Tensor:
        e, bias, rows = layer.experts, layer.gate.bias, []
        assert bias is not None
        for row in x:
            scores = (layer.gate.weight @ row).sigmoid()
            order = sorted(range(len(scores)), key=lambda i: -float(scores[i] + bias[i]))
            left = order[masked : masked + layer.gate.config.num_experts_per_tok + more]
            y = sum(scores[i] * (e.w2[i] @ (silu(e.w1[i] @ row) * (e.w3[i] @ row))) for i in left)
            if shared and layer.shared_experts is not None:
                y = y + layer.shared_experts(row[None])[0]
            rows.append(y)
        return torch.stack(rows)

    def replaced(layer: MoE, given: tuple[Tensor], out: tuple) -> tuple:
        return looped(layer, given[0]), out[1]

    hooks = [m.register_forward_hook(replaced) for m in model.modules() if isinstance(m, MoE)]
    try:
        return model(tokens, [len(tokens)])
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", ["few", "few_shared", "fine", "fine_shared"])
@pytest.mark.parametrize("masked, more, shared", [(0, 0, True), (1, 0, True), (2, 0, True), (0, 1, False)])
@torch.no_grad()
def test_a_model_with_experts_out_is_that_of_a_loop_over_tokens(name: str, masked: int, more: int, shared: bool):
    model = drawn(next(shape for shape in QUICK.shapes() if shape.name == name).of(QUICK.model()))
    tokens = torch.randint(0, QUICK.vocab, (12,), generator=torch.Generator().manual_seed(3))
    before = model(tokens, [12])
    state, modules = {k: v.clone() for k, v in model.state_dict().items()}, dict(model.named_modules())
    with routed_otherwise(model, masked, more, shared):
        found = model(tokens, [12])
    torch.testing.assert_close(found, by_hand(model, tokens, masked, more, shared), rtol=1e-10, atol=1e-10)
    changed = masked or more or (not shared)
    assert bool(changed) != torch.allclose(found, before, rtol=1e-9, atol=1e-9)
    assert torch.equal(model(tokens, [12]), before)  # and afterwards it is as it was
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_model_is_as_it_was_though_it_fails_within():
    model = drawn(QUICK.shapes()[1].of(QUICK.model()))
    modules = dict(model.named_modules())
    with pytest.raises(KeyError), routed_otherwise(model, shared=False):
        raise KeyError
    assert dict(model.named_modules()) == modules


# ---- numbers ------------------------------------------------------------------------------------------------------


def test_nothing_disabled_is_the_model_that_was_trained(result: Result, runs: dict[str, list[Trained]]):
    """Measured again in larger batches, through the gates that can disable."""
    for name, told in result.numbers["shapes"].items():
        for run, numbers in zip(runs[name], told["runs"], strict=True):
            assert numbers["bits_per_byte"] == run.bits_per_byte
            if name != "dense":
                assert numbers["disabled"][0] == pytest.approx(run.bits_per_byte, rel=1e-5)
                assert len(numbers["disabled"]) == len(told["masked"]) == len(QUICK.levels())
                assert (numbers["replaced"] is not None) == bool(told["shared"])
        if name != "dense":
            assert told["masked"] == [n * (QUICK.parts if name.startswith("fine") else 1) for n in QUICK.levels()]


@torch.no_grad()
def test_what_disabling_costs_is_that_of_sequences_one_by_one(
    result: Result, runs: dict[str, list[Trained]], texts: Texts
):
    told = result.numbers["shapes"]["fine_shared"]
    model = runs["fine_shared"][1].model()

    def bits(masked: int, more: int, shared: bool) -> float:
        nats, size = 0.0, 0
        for batch in (b for batches in texts.held_out.values() for b in batches):
            with routed_otherwise(model, masked, more, shared):
                nats += float(Measured.of(model, Microbatch.of(batch, 0)).nats)
            size += sum(len(texts.tokenizer.token_bytes(int(token))) for token in batch.tokens[1:])
        return nats / math.log(2) / size

    numbers = told["runs"][1]
    assert numbers["disabled"][1] == pytest.approx(bits(told["masked"][1], 0, True), rel=1e-5)
    assert numbers["without_first"] == pytest.approx(bits(1, 0, True), rel=1e-5)
    assert numbers["replaced"] == pytest.approx(bits(0, 1, False), rel=1e-5)
    assert numbers["rise"] == pytest.approx(np.mean(numbers["disabled"][1:]) - numbers["disabled"][0])


@torch.no_grad()
def test_cosines_are_those_of_pairs_one_by_one():
    config = ModelConfig.load("tiny").replace(n_routed_experts=5, num_experts_per_tok=3, n_group=1, topk_group=1)
    generator = torch.Generator().manual_seed(0)
    experts = Experts(config)
    for p in experts.parameters():
        p.normal_(0, 0.3, generator=generator)
    x = torch.randn(6, config.hidden_size, generator=generator)
    indices = torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(6)])
    out = [silu(x @ w1.T) * (x @ w3.T) @ w2.T for w1, w2, w3 in zip(experts.w1, experts.w2, experts.w3)]
    pairs = [(i, j) for i in range(5) for j in range(i)]
    every = torch.stack([cosine_similarity(out[i], out[j]) for i, j in pairs])
    both = torch.tensor([[i in row and j in row for row in indices.tolist()] for i, j in pairs])
    found = alike(experts, x, indices)
    assert found.all == pytest.approx(float(every.mean()), abs=1e-5)
    assert found.together == pytest.approx(float(every[both].mean()), abs=1e-5)
    assert alike(experts, x, indices[:, :1]).together is None
    experts.w1[:], experts.w2[:], experts.w3[:] = experts.w1[0], experts.w2[0], experts.w3[0]
    assert alike(experts, x, indices) == (pytest.approx(1.0), pytest.approx(1.0))


def test_combinations_are_sets():
    found = combined(torch.tensor([[0, 3], [3, 0], [1, 2], [2, 1], [1, 2], [1, 2]]))
    entropy = -(1 / 3 * math.log2(1 / 3) + 2 / 3 * math.log2(2 / 3))
    assert found.met == 2 and found.effective == pytest.approx(2**entropy)


def test_what_an_expert_tells_of_the_token_by_hand():
    tokens = torch.tensor([0, 1, 0, 1, 2, 2, 2, 2])
    alone = tokens[:, None].clamp(max=1)  # token 0 has expert 0; 1 and 2 have expert 1
    found, chance = tells_of_token(alone, tokens, 2, 4)
    assert found == pytest.approx(-(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75)))
    assert 0 < chance < found
    assert tells_of_token(torch.tensor([[0, 1]] * 8), tokens, 2, 4)[0] == pytest.approx(0.0, abs=1e-12)
    assert picks(alone, tokens, 2, 4).tolist() == [[2, 0, 0, 0], [0, 2, 4, 0]]


@torch.no_grad()
def test_what_is_seen_of_a_pass_belongs_together(runs: dict[str, list[Trained]], measurer: Measurer, texts: Texts):
    """Of every token what its experts read is what its gate made its choice of; every token is there once, in order."""
    model = runs["fine_shared"][0].model()
    seen = measurer.seen(model)
    for gate, indices, weights, inputs in zip(model.gates(), seen.indices, seen.weights, seen.inputs, strict=True):
        routing = gate(inputs)
        assert int((routing.indices.sort(-1).values != indices.sort(-1).values).any(-1).sum()) <= 2  # near-ties
        torch.testing.assert_close(routing.scores.gather(1, indices), weights, rtol=1e-4, atol=1e-5)
    batches = [b for of_kind in texts.held_out.values() for b in of_kind]
    assert torch.equal(seen.tokens, torch.cat([b.tokens for b in batches]))
    assert seen.starts.tolist() == [i * QUICK.sequence for i in range(len(batches)) for _ in range(QUICK.sequence)]


def test_a_context_stays_within_its_sequence(measurer: Measurer, runs: dict[str, list[Trained]], texts: Texts):
    seen = measurer.seen(runs["few"][0].model())
    first, last = QUICK.sequence, 2 * QUICK.sequence - 1
    decoded = texts.tokenizer.decode(seen.tokens[first : last + 1].tolist())
    for at in (first, first + 9, last):
        told = context_of(seen, at, texts.tokenizer)
        before, _, rest = told.partition("«")
        token, _, after = rest.rpartition("»")
        whole = before + token.replace("␣", " ") + after
        assert whole.replace("⏎", "\n").replace("·", "") in decoded.replace("·", "")
        assert (before == "") == (at == first) and (after == "") == (at == last)


def test_the_tokens_told_are_those_picked(result: Result, runs: dict[str, list[Trained]], texts: Texts):
    """Counted anew, sequence by sequence, in plain Python."""
    run = runs["fine_shared"][0]
    model = run.model()
    batches = [b for of_kind in texts.held_out.values() for b in of_kind]
    with torch.no_grad():
        routings = [model.hidden(m.tokens, m.packing).routings for m in (Microbatch.of(b, 0) for b in batches)]
    names = [texts.tokenizer.decode([i]) for i in range(QUICK.vocab)]
    all_tokens = [int(t) for b in batches for t in b.tokens]
    checked = 0
    for gate, of_layer in enumerate(result.numbers["takers"]["fine_shared"]):
        assert len(of_layer) == 7
        for taker in of_layer:
            mine = [
                int(token)
                for batch, of_gates in zip(batches, routings)
                for token, picked in zip(batch.tokens, of_gates[gate].indices.tolist())
                if taker["expert"] in picked
            ]
            assert taker["load"] == pytest.approx(len(mine) * 7 / (3 * len(all_tokens)), abs=0.01)
            for text, lift, picked, occurs, context in taker["tokens"]:
                same = [i for i in set(mine) if names[i].replace(" ", "␣").replace("\n", "⏎") == text]
                if len(same) != 1:
                    continue
                assert abs(picked - mine.count(same[0])) <= 1  # a near-tie may fall otherwise
                assert occurs == all_tokens.count(same[0]) >= picked >= 4
                share = picked / len(mine) / (occurs / len(all_tokens))
                assert lift == pytest.approx(share, rel=0.02) and lift > 1
                assert f"«{text}»" in context
                checked += 1
    assert checked > 20


def test_counts_of_the_heat_map_add_up_to_every_tokens_picks(runs: dict[str, list[Trained]], result: Result):
    for name, of_seeds in runs.items():
        if name == "dense":
            continue
        told = result.numbers["shapes"][name]
        for run, numbers in zip(of_seeds, told["runs"], strict=True):
            loads = np.array(numbers["balance"]["loads"])  # [kinds, layers, E]
            assert loads.shape == (3, QUICK.layers, told["routed"])
            assert np.allclose(loads.mean(-1), 1)
            sums = {sum(gate) for of_kind in run.counts.values() for sequence in of_kind for gate in sequence}
            assert sums == {QUICK.sequence * told["chosen"]}


def test_the_heat_map_has_the_experts_of_a_kind_side_by_side():
    loads = np.array([[1.0, 4.0, 0.0, 2.0], [2.0, 1.0, 3.0, 1.0]])
    assert by_favourite(loads).tolist() == [[4.0, 2.0, 0.0, 1.0], [1.0, 1.0, 3.0, 2.0]]


# ---- verdicts -----------------------------------------------------------------------------------------------------


def made(bits: float, rise: float = 0.1, first: float = 0.05, replaced: float | None = 0.3) -> Found:
    replaced = None if replaced is None else bits + replaced
    return Found(None, [bits, bits + rise], bits + first, replaced, [], None, [], [], [], [])  # type: ignore[arg-type]


def judged(**of: list[Found]) -> dict[str, str]:
    base = [made(2.0), made(2.1), made(2.2)]
    names = ("few", "few_shared", "fine", "fine_shared")
    found = {name: of.get(name, base) for name in names}
    bits = {name: [one.disabled[0] for one in of_seeds] for name, of_seeds in found.items()}
    labels = {**LABELS, "dense": "dense"}
    return {c.says: c.verdict for c in claims({**bits, "dense": [2.0, 2.1, 2.2]}, found, labels)}


def test_verdicts_follow_the_numbers():
    """The same claims are shown, reversed or left open by other numbers alone."""
    better = "Many small experts and a shared one predict better than few large"
    costs, replaced = "Disabling the first experts costs small ones more", "A routed expert more does not replace the"
    control = "Losing the shared expert costs more than losing the routed one picked first"
    equal = judged()
    assert equal[better] == equal[costs] == "not resolved"
    assert equal[f"{replaced} shared one"] == equal[control] == "shown"
    good = judged(fine_shared=[made(1.9, 0.2), made(2.0001, 0.2), made(2.0999, 0.2)])
    assert good[better] == good[costs] == "shown"
    bad = judged(fine_shared=[made(2.1, 0.0, 0.4), made(2.2001, 0.0, 0.4), made(2.2999, 0.0, 0.4)])
    assert bad[better] == bad[costs] == bad[control] == "NOT SO: the reverse"
    noisy = judged(fine_shared=[made(2.2, 0.3), made(2.0, 0.0), made(2.2, 0.1)])
    assert noisy[better] == noisy[costs] == "not resolved"


def test_the_result_says_all_claims_once_and_its_size(result: Result, runs: dict[str, list[Trained]]):
    plain = result.numbers["claims"]
    assert len(plain) == 10 and len(result.shown) == sum(c["verdict"] == "shown" for c in plain)
    told = " ".join(result.not_shown)
    for claim in plain:
        assert (claim["says"] in told) == (claim["verdict"] != "shown")
    of = {name: [r["bits_per_byte"] for r in s["runs"]] for name, s in result.numbers["shapes"].items()}
    apart = [a - b for a, b in zip(of["fine_shared"], of["few"])]
    found = next(c for c in plain if c["says"].startswith("Many small"))
    assert found["numbers"]["difference"] == pytest.approx(sum(apart) / len(apart))
    assert f"{QUICK.steps * QUICK.batch:,} tokens" in told and "was not searched for" in told
    assert "fell from" in told  # so short a run has learnt nothing, and it says so
    assert result.seconds > sum(run.seconds for x in runs.values() for run in x)
    sizes = next(grid for grid in result.grids if grid.title == "The shapes")
    assert len({row[-2] for row in sizes.rows[:-1]}) == 1 and len({row[-1] for row in sizes.rows}) == 1


# ---- the command --------------------------------------------------------------------------------------------------


def test_the_command_writes_everything(work: Path, result: Result, tmp_path: Path):
    """With the runs that are there already: it trains none."""
    arguments = ["study", "experts", "--quick", "--steps", str(QUICK.steps), "--work", str(work)]
    done = CliRunner().invoke(cli.app, [*arguments, "--out", str(tmp_path / "out"), "--json", str(tmp_path / "n.json")])
    assert done.exit_code == 0, done.output
    assert "10 of 10 runs are in" in done.output
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"experts.json", "experts.html", "experts.png", "experts-2.png"}
    read = load(tmp_path / "out", "experts")
    assert read.numbers == json.loads(json.dumps(result.numbers)) and read.seeds == (0, 1) and len(read.grids) == 10
    assert (tmp_path / "n.json").read_bytes() == (tmp_path / "out" / "experts.json").read_bytes()
    html = (tmp_path / "out" / "experts.html").read_text("utf-8")
    assert html.count("data:image/png;base64,") == 2 and "http" not in words(html) and "1.808 → 2.414" in html


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seeds", "1"], "seeds: expected two or more, there is no spread of 1"),
        (["--chosen", "1"], "chosen: expected 2 or more, got 1"),
        (["--chosen", "4"], "chosen: expected at most 3, the experts that are left when a quarter of 4 is masked"),
        (["--parts", "3"], "expert_width: expected a multiple of the 3 parts, got 16"),
        (["--experts", "3"], "experts: expected 4 or more, got 3"),
        (["--speed", "nan"], "speed: expected a positive number, got nan"),
        (["--device", "abacus"], "device: 'abacus' cannot be used"),
        (["--data", "no/such/folder"], "--data: no/such/folder is no folder"),
    ],
)
def test_errors_are_one_line_and_come_before_any_work(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    monkeypatch.setattr("abyssal.study.small.train_all", None)  # would be called
    work = tmp_path / "work"
    monkeypatch.setattr(sys, "argv", ["abyssal", "study", "experts", "--quick", "--work", str(work), *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not work.exists()
