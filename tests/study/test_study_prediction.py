"""The study of prediction: equal main models, acceptance found by other means, and verdicts that follow numbers."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from abyssal import cli
from abyssal.config import ModelConfig
from abyssal.costs import inspect
from abyssal.engine import LLM, Sampling
from abyssal.engine.sequence import Sequence
from abyssal.model.objective import Measured
from abyssal.model.transformer import Transformer
from abyssal.study.output import load
from abyssal.study.prediction import Settings, _numbers_of, _slower, study_prediction
from abyssal.study.prediction_claims import Numbers, claims
from abyssal.study.prediction_found import Found
from abyssal.study.prediction_measure import Drafted, Read, generate, read, repeated, together
from abyssal.study.prediction_speed import Timed, cost, module_share
from abyssal.study.prediction_tables import measured, of_module
from abyssal.study.result import Result
from abyssal.study.texts import Texts, open_texts
from abyssal.study.trained import Plan, Trained, train_all
from abyssal.train.trainer import Trainer
from abyssal.train.validation import Validator

QUICK = dataclasses.replace(Settings.quick(), steps=5)
SILENT = Console(quiet=True)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def result(work: Path) -> Result:
    return study_prediction(QUICK, work, "abyssal study prediction", SILENT)


@pytest.fixture(scope="module")
def texts(work: Path, result: Result) -> Texts:
    return open_texts(work, None, QUICK.text, QUICK.vocab, QUICK.sequence, QUICK.held_out)


@pytest.fixture(scope="module")
def runs(work: Path, texts: Texts) -> dict[str, list[Trained]]:
    return train_all(Plan(QUICK.variants(), range(QUICK.seeds), texts, QUICK.training(), work), SILENT)


@pytest.fixture(scope="module")
def model(runs: dict[str, list[Trained]]) -> Transformer:
    return runs["two"][0].model().eval()


# ---- equal main models ------------------------------------------------------------------------------------------


def test_a_seed_means_the_same_main_model_whatever_the_modules():
    none, one, two = (
        Transformer(v.model).init_weights(torch.Generator().manual_seed(3)).state_dict() for v in QUICK.variants()
    )
    assert set(none) < set(one) < set(two) and {n.split(".")[0] for n in set(two) - set(none)} == {"mtp"}
    assert all(torch.equal(none[name], two[name]) for name in none)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_all_variants_begin_with_the_same_loss_and_have_equally_many_steps(runs: dict[str, list[Trained]]):
    for seed in range(QUICK.seeds):
        none, one, two = (runs[name][seed] for name in ("none", "one", "two"))
        assert none.loss[0] == pytest.approx(one.loss[0], abs=1e-6) == pytest.approx(two.loss[0], abs=1e-6)
        assert none.loss[-1] != one.loss[-1] != two.loss[-1]
        assert len(none.loss) == len(one.loss) == len(two.loss) == QUICK.steps and none.tokens == two.tokens
        modules = [sum(p.numel() for p in run.model().mtp.parameters()) for run in (none, one, two)]
        assert [run.parameters - own for run, own in zip((none, one, two), modules)] == [none.parameters] * 3


# ---- held-out text ----------------------------------------------------------------------------------------------


def test_what_is_read_adds_up_to_what_a_validation_finds(model: Transformer, texts: Texts):
    batches = texts.held_out["code"]
    found = read(model, batches)

    def measure(micro: object) -> Measured:
        with torch.no_grad():
            return Measured.of(model, micro)  # type: ignore[arg-type]

    validation = Validator.of(batches, texts.tokenizer, 2).measure(measure)
    assert [module.accuracy for module in found] == pytest.approx(validation.mtp_accuracy)
    assert [module.accepted for module in found] == pytest.approx(validation.mtp_accepted)


def test_what_is_read_is_so_position_by_position(model: Transformer, texts: Texts):
    """Once more, from all logits of one sequence."""
    batch = texts.held_out["prose"][0]
    T, tokens = QUICK.sequence, batch.tokens.tolist()
    with torch.no_grad():
        main = model(batch.tokens, [T]).argmax(-1).tolist()
        ahead = [logits.argmax(-1).tolist() for logits in model.predict(batch.tokens, [T])]
    found = read(model, [batch])
    for d, module in enumerate(found, start=1):
        for t in range(T):
            inside = t + 1 + d < T
            right = (
                [main[t] == tokens[t + 1], *(a[t] == tokens[t + 2 + i] for i, a in enumerate(ahead[:d]))]
                if inside
                else [False]
            )
            assert module.inside[t] == inside
            assert module.right[t] == right[-1]
            assert module.before[t] == (inside and all(right[:-1]))
            assert module.kept[t] == all(right)
            assert module.agrees[t] == (inside and ahead[d - 1][t] == main[t + d])


# ---- drafts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_counted_drafts_are_the_engines_own(
    temperature: float, model: Transformer, texts: Texts, monkeypatch: pytest.MonkeyPatch
):
    """Each step as the engine takes it in, and its totals over all of them."""
    taken: list[tuple[int, int, int]] = []  # tokens that stood already, drafts verified, and accepted
    take = Sequence.take

    def noted(s: Sequence, step: Any, now: float, drafted: bool) -> None:
        if drafted:
            taken.append((s.generated, len(step.verified), step.accepted))
        take(s, step, now, drafted)

    monkeypatch.setattr(Sequence, "take", noted)
    prompts = {kind: [b.tokens[:8].tolist() for b in batches[:2]] for kind, batches in texts.held_out.items()}
    llm = LLM(model, tokenizer=texts.tokenizer, max_batch=6, drafts=2, adapt=False, compiled=False, prefix_cache=False,
              max_context=32)  # fmt: skip
    found = generate(llm, prompts, 16, temperature, 3)
    every = together(list(found.values()))
    assert all(len(text) == 16 for text in every.tokens) and len(every.tokens) == 6
    assert len(taken) == llm.totals.drafted_at[0] and {verified for _, verified, _ in taken} == {2}
    assert [sum(a > place for _, _, a in taken) for place in range(2)] == llm.totals.accepted_at
    for at in range(16):
        goes_on = [a for stood, _, a in taken if stood == at and at + 3 in range(16)]  # of 15 or fewer there is a next
        assert every.steps[at] == len(goes_on)
        assert [of_place[at] for of_place in every.accepted] == [sum(a > place for a in goes_on) for place in range(2)]
    assert max(stood for stood, _, _ in taken) >= 13 > max(at for at, n in enumerate(every.steps) if n)
    assert sum(every.accepted[0]) >= sum(every.accepted[1]) and every.tokens_a_step >= 1
    assert generate(llm, prompts, 16, temperature, 3) == found  # drawn again with the same seeds
    assert sum(every.accepted[0]) > 0  # near-uniform distributions overlap, and greedy text is a loop


def test_a_texts_end_does_not_change_the_share_accepted():
    """Of an engine whose drafts are accepted as the bits of a text's number say: half of them, wherever they are."""
    tokens = 6

    class Even:
        drafts = 1

        def stream(self, prompts: list[list[int]], settings: list[Sampling]) -> Iterator[SimpleNamespace]:
            for index in range(len(prompts)):
                yield SimpleNamespace(index=index, tokens=[0], output=None)
                made, bits = 1, index
                while made < tokens:
                    step = [0] * min(1 + bits % 2, tokens - made)
                    made, bits = made + len(step), bits // 2
                    output = SimpleNamespace(tokens=[0] * tokens) if made == tokens else None
                    yield SimpleNamespace(index=index, tokens=step, output=output)

    found = generate(Even(), {"a": [[1]] * 2 ** (tokens - 1)}, tokens, 0.0, 0)["a"]  # type: ignore[arg-type]
    assert found.steps == [0, 32, 16, 24, 0, 0] and found.rate(0) == 0.5


def test_greedy_drafts_are_those_that_the_modules_make_of_the_whole_text(runs: dict[str, list[Trained]], texts: Texts):
    model = runs["one"][0].model().eval()
    prompt = texts.held_out["tables"][0].tokens[:8].tolist()
    llm = LLM(model, tokenizer=texts.tokenizer, drafts=1, adapt=False, compiled=False, prefix_cache=False,
              max_context=32)  # fmt: skip
    found = generate(llm, {"tables": [prompt]}, 16, 0.0, 0)["tables"]
    text = prompt + found.tokens[0]
    with torch.no_grad():
        drafted = model.predict(torch.tensor(text), [len(text)])[0].argmax(-1).tolist()
    steps, accepted, at = [0] * 16, [0] * 16, 1
    while True:
        right = drafted[len(prompt) + at - 2] == text[len(prompt) + at]
        if at + 1 + 1 >= 16:  # whether it is right or not
            break
        steps[at], accepted[at] = 1, int(right)
        at += 1 + right
    assert found.steps == steps and found.accepted == [accepted]
    plain = LLM(model, tokenizer=texts.tokenizer, drafts=0, compiled=False, max_context=32)
    assert generate(plain, {"tables": [prompt]}, 16, 0.0, 0)["tables"].tokens == found.tokens


def test_repeated_tokens_are_counted_by_hand():
    assert repeated([1, 2, 3, 4], [5, 6, 7]) == 0
    assert repeated([1, 2, 3, 4], [1, 2, 3, 4]) == 0.25
    assert repeated([], [1] * 8) == 0.5


# ---- speed ------------------------------------------------------------------------------------------------------


def test_the_arithmetic_is_that_of_the_costs():
    config = ModelConfig.load("deepseek-v3")
    flops = inspect(config, 4096).flops
    share = flops.decoding_mtp / flops.decoding
    assert module_share(config, 4096) == share
    assert cost(config, 1, 4096) == (1 + share, pytest.approx(2 + 2 * share))
    assert cost(config, 2, 4096) == (1 + 2 * share, pytest.approx(3 + 3 * share + share))  # the second is chained
    assert 1.79 < 1.85 / cost(config, 1, 4096).waiting < 1.85  # as the paper has it
    two = QUICK.model(2)
    share = module_share(two, 64)
    assert cost(two, 2, 64).working == pytest.approx(3 + (3 + 4) * share)


def test_ratios_are_of_the_same_models_and_losses_are_said():
    timed = [
        [Timed(1, 0, 100.0, 1.0), Timed(1, 1, 80.0, 1.5), Timed(8, 0, 400.0, 1.0), Timed(8, 1, 500.0, 1.4)],
        [Timed(1, 0, 200.0, 1.0), Timed(1, 1, 180.0, 1.7), Timed(8, 0, 300.0, 1.0), Timed(8, 1, 330.0, 1.6)],
    ]
    ratios = {(batch, k): of for batch, k, of, _, _ in measured(timed)}
    assert ratios[1, 1] == [0.8, 0.9] and ratios[8, 1] == [1.25, pytest.approx(1.1)] and ratios[1, 0] == [1, 1]
    said = _slower([Found({}, {}, {}, 4, 4, own) for own in timed])
    assert len(said) == 1 and "1 draft with 1 text at once: this machine LOSES. A step makes 1.60 tokens" in said[0]
    assert "1.88 times as long as a plain one: 0.85 times" in said[0]
    assert "2 of 8 differ" in _slower([Found({}, {}, {}, 3, 4, own) for own in timed])[-1]


# ---- verdicts ---------------------------------------------------------------------------------------------------


def numbers(**changes: object) -> Numbers:
    level = [0.5, 0.5001, 0.4999]
    bits = {"none": [2.0, 2.1, 2.2], "one": [2.0, 2.1001, 2.2], "two": [2.0, 2.1001, 2.2]}
    kinds = [{"a": 0.5, "b": 0.51}, {"a": 0.5, "b": 0.52}, {"a": 0.53, "b": 0.5}]
    made = Numbers(bits, level, level, kinds, level, level, [1.0001, 1.0, 0.9999])
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def judged(**changes: object) -> dict[str, str]:
    return {c.says.split(",")[0]: c.verdict for c in claims(numbers(**changes))}


def test_verdicts_follow_the_numbers():
    better, alike = "The main model predicts better for having been trained with MTP", "Its bits a byte are as without"
    faster, much = "One draft makes decoding faster", "It is 1.8 times as fast"
    kinds = "Acceptance is as good whatever the text is of: kinds are apart by less than 5 points"
    base = judged()
    assert base[better] == "not resolved" and base[alike] == "shown" and base[kinds] == "shown"
    assert base["85% or more of the drafts are accepted"] == "NOT SO"
    assert base[faster] == "not resolved" and base[much] == "NOT SO"
    lower = judged(bits={**numbers().bits, "one": [1.9, 2.0001, 2.0999]})
    assert lower[better] == "shown" and lower[alike] == "NOT SO"
    higher = judged(bits={**numbers().bits, "one": [2.1, 2.2001, 2.2999]})
    assert higher[better] == "NOT SO: the reverse" and higher[alike] == "NOT SO"
    second = "A second module costs the main model nothing more"
    assert base[second] == higher[second] == "shown" and lower[second] == "NOT SO"
    good = judged(faster=[1.9, 1.91, 1.92], accepted=[0.9, 0.91, 0.92], sampled=[0.9, 0.91, 0.92])
    assert good[faster] == good[much] == good["85% or more of the drafts are accepted"] == "shown"
    unlike = judged(of_kind=[{"a": 0.4, "b": 0.6}, {"a": 0.41, "b": 0.62}, {"a": 0.6, "b": 0.41}])
    assert unlike[kinds] == "NOT SO"


def test_a_better_first_draft_is_no_better_second_one():
    """Of 100 steps one module has 50 first drafts accepted, and of these 20 second ones; two have 80, and 32."""

    def drafted(first: int, second: int) -> dict[str, Drafted]:
        return {kind: Drafted([0, 50], [[0, first // 2], [0, second // 2]], 0.0, []) for kind in "ab"}

    def found(seed: int, own: tuple[int, int]) -> Found:
        one = drafted(50 + 2 * seed, 20 + 2 * seed)
        greedy = {("one", 1): one, ("one", 2): one, ("two", 2): drafted(*own)}
        return Found({}, greedy, greedy, 4, 4, [Timed(1, 0, 100.0, 1.0), Timed(1, 1, 80.0, 1.5)])

    def verdict(*own: tuple[int, int]) -> str:
        n = _numbers_of({}, [found(seed, pair) for seed, pair in enumerate(own)])
        assert n.second_chained == [20 / 50, 22 / 52, 24 / 54]
        assert n.second_own == [second / first for first, second in own]
        said = claims(dataclasses.replace(n, bits=numbers().bits))
        return next(c.verdict for c in said if "a second module drafts" in c.says)

    assert (
        verdict((80, 32), (82, 34), (84, 38)) == "not resolved"
    )  # jointly 0.32 to 0.38 of all steps, not 0.20 to 0.24
    assert verdict((50, 30), (52, 32), (54, 34)) == "shown"
    assert Drafted([4], [[0], [0]], 0.0, []).following(1) == 0


def test_the_result_says_all_claims_once_and_its_numbers_hold(result: Result, runs: dict[str, list[Trained]]):
    plain = result.numbers["claims"]
    shown, told = " ".join(result.shown), " ".join(result.not_shown)
    assert len(plain) == 10
    for claim in plain:
        assert claim["says"] in (shown if claim["verdict"] == "shown" else told)
    bits = [[run.bits_per_byte for run in runs[name]] for name in ("one", "none")]
    assert plain[0]["numbers"]["difference"] == pytest.approx(sum(a - b for a, b in zip(*bits)) / QUICK.seeds)
    per_seed = result.numbers["runs"]
    rates = []
    for one in per_seed:
        kinds = one["greedy"]["one, 1"].values()
        rates.append(sum(sum(k["accepted"][0]) for k in kinds) / sum(sum(k["steps"]) for k in kinds))
    accepted = next(c for c in plain if "greedy decoding" in c["says"])
    assert accepted["numbers"]["difference"] == pytest.approx(sum(rates) / 2 - 0.85)
    assert "Benchmarks, where the paper sees most" in told and "fell from" in told and "stood there before" in told
    assert all(one["texts"] == 2 * 3 * QUICK.texts + 3 * QUICK.texts for one in per_seed)


def test_kinds_are_added_up():
    a, b = Drafted([0, 2], [[0, 1]], 0.5, [[1]]), Drafted([1, 2], [[1, 2]], 0.0, [[2]])
    assert together([a, b]) == Drafted([1, 4], [[1, 3]], 0.25, [[1], [2]])
    assert together([a, b]).rate(0) == 0.8 and together([a, b]).tokens_a_step == 1.8
    row = Read([1, 1], [0, 1], [1, 1], [0, 1], [1, 0])
    assert of_module({"a": [row], "b": [row]}) == [Read([2, 2], [0, 2], [2, 2], [0, 2], [2, 0])]


# ---- the command ------------------------------------------------------------------------------------------------


def test_the_command_writes_everything_and_trains_nothing_again(
    work: Path, result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Trainer, "step", None)  # would be called
    arguments = ["study", "prediction", "--quick", "--steps", str(QUICK.steps), "--work", str(work)]
    done = CliRunner().invoke(cli.app, [*arguments, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "6 of 6 runs are in" in done.output
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"prediction.json", "prediction.html", "prediction.png", "prediction-2.png"}
    again = load(tmp_path / "out", "prediction")
    for before, after in zip(result.numbers["runs"], again.numbers["runs"]):
        assert {**before, "timed": 0} == {**after, "timed": 0}  # all but the clock's


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seeds", "1"], "seeds: expected two or more, there is no spread of 1"),
        (["--steps", "3"], "steps: expected 4 or more, got 3"),
        (["--weight", "0"], "weight: expected a positive number, got 0.0"),
        (["--generate", "25"], "generate: expected 24 or less, which a prompt of 8 leaves of 32, got 25"),
        (["--batches", "1,0"], "--batches: expected positive numbers with commas between them, got '1,0'"),
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
    monkeypatch.setattr(
        sys, "argv", ["abyssal", "study", "prediction", "--quick", "--work", str(work), *arguments]
    )  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not work.exists()
