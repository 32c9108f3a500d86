"""All studies in one command: what is there is taken, what fails is named, and one page has all of it."""

import dataclasses
import json
import platform
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from html_words import words
from rich.console import Console
from typer.testing import CliRunner

from abyssal import cli
from abyssal.study import everything
from abyssal.study.everything import INDEX, RECORD, Study, chosen, kept, run_all, studies
from abyssal.study.output import load
from abyssal.study.page import duration, page
from abyssal.study.result import Grid, Picture, Result
from abyssal.study.verbs import study as verbs
from abyssal.study.verdicts import counted, verdicts

NAMES = ["cache", "attention", "positions", "experts", "balance", "prediction"]


@dataclasses.dataclass(frozen=True)
class Size:
    """Settings of a study that takes no time."""

    steps: int = 3
    data: Path | None = None


def made(name: str, command: str = "", **changes: object) -> Result:
    claims = [
        {"says": "It <holds>", "where": "Paper, section 1", "verdict": "shown", "numbers": {"margin": 0.1}},
        {"says": "It is open", "where": "Paper, section 2", "verdict": "not resolved", "numbers": {"margin": 0.1}},
        {"says": "It is wrong", "where": "Paper, section 3", "verdict": "NOT SO: the reverse", "numbers": {"agree": 1}},
    ]
    fields: dict[str, object] = {
        "name": name, "title": f"The study of {name}", "claim": "They say so.", "shown": ("It <holds>.",),
        "not_shown": ("Much.",), "command": command, "grids": (Grid("T", ("a", "b"), (("x", "1"),)),),
        "pictures": (Picture("seen", b"\x89PNG"),), "numbers": {"claims": claims}, "seeds": (0, 1), "seconds": 61.0,
    }  # fmt: skip
    return Result(**(fields | changes))  # type: ignore[arg-type]


def study(name: str, ran: list[str], steps: int = 3, fail: Callable[[], None] = lambda: None) -> Study:
    def run(folder: Path, command: str, console: Console) -> Result:
        ran.append(f"{name} {folder.name} {command}")
        fail()
        return made(name, command)

    return Study(name, Size(steps), run)


def recorded() -> Console:
    return Console(record=True, width=200, file=open("/dev/null", "w"))


def run(every: list[Study], out: Path, only: str | None = None) -> tuple[dict[str, str], str]:
    console = recorded()
    failed = run_all(every, chosen(every, only), out, out.parent / "work", True, console)
    return failed, console.export_text()


# ---- the frame --------------------------------------------------------------------------------------------------


def test_every_verb_is_a_study_of_all_in_the_issues_order():
    assert [s.name for s in studies(True)] == [s.name for s in studies(False)] == NAMES
    named = [str(command.name) for command in verbs.registered_commands]
    assert sorted(named) == sorted([*NAMES, "all"])


def test_default_and_quick_are_what_the_studies_own_commands_take():
    for small, large in zip(studies(True), studies(False)):
        assert type(small.settings) is type(large.settings) and small.settings != large.settings
        assert large.settings == type(large.settings)()
        if small.name != "cache":
            assert small.settings == type(small.settings).quick()


def test_all_are_run_in_order_saved_and_put_on_one_page(tmp_path: Path):
    ran: list[str] = []
    failed, told = run([study("a", ran), study("b", ran)], tmp_path / "out")
    assert ran == ["a study-a abyssal study a --quick", "b study-b abyssal study b --quick"] and not failed
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"a.json", "a.html", "a.png", "b.json", "b.html", "b.png", INDEX, RECORD}
    assert load(tmp_path / "out", "b") == made("b", "abyssal study b --quick")
    html = (tmp_path / "out" / INDEX).read_text("utf-8")
    assert 'id="a"' in html and 'id="b"' in html and html.count("data:image/png;base64,") == 2
    assert "study 1 of 2, a; the time left is not known yet" in told and re.search(r"2 of 2, b; about \d+ s left", told)


def test_the_clocks_time_of_the_command_is_told_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not what a result says, which counts training of before."""
    now = [0.0]

    def work() -> None:
        now[0] += 1200.0

    monkeypatch.setattr(everything.time, "perf_counter", lambda: now[0])
    every = [study("a", [], fail=work), study("b", [], fail=work)]
    _, told = run(every, tmp_path)
    assert "study 1 of 2, a: 20 min" in told and "all: 40 min" in told
    records = json.loads((tmp_path / RECORD).read_text())
    assert [records[name]["seconds"] for name in "ab"] == [1200.0, 1200.0]
    records["a"]["seconds"] = 1.0
    del records["b"]["seconds"]
    (tmp_path / RECORD).write_text(json.dumps(records))
    assert all(kept(tmp_path, own) is not None for own in every)
    assert "all: 0 s" in run(every, tmp_path)[1]


def test_what_is_there_with_the_same_settings_is_not_made_again(tmp_path: Path):
    ran: list[str] = []
    out = tmp_path / "out"
    run([study("a", ran), study("b", ran)], out)
    index = (out / INDEX).read_bytes()
    _, told = run([study("a", ran), study("b", ran)], out)
    assert len(ran) == 2 and "study 1 of 2, a: is in" in told and "with the same settings" in told
    assert (out / INDEX).read_bytes() == index
    _, told = run([study("a", ran, steps=4), study("b", ran)], out)
    assert len(ran) == 3 and "a, in place of one of other settings" in told
    (out / "b.json").write_text((out / "b.json").read_text().replace("They", "We"))  # not what was made
    run([study("a", ran, steps=4), study("b", ran)], out)
    assert len(ran) == 4 and ran[-1].startswith("b")
    (out / "b.png").unlink()
    run([study("a", ran, steps=4), study("b", ran)], out)
    assert len(ran) == 5


def test_other_code_makes_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ran: list[str] = []
    run([study("a", ran)], tmp_path)
    monkeypatch.setattr(everything, "code_digest", lambda: "other")
    assert kept(tmp_path, study("a", ran)) is None
    run([study("a", ran)], tmp_path)
    assert len(ran) == 2


def test_another_python_makes_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ran: list[str] = []
    run([study("a", ran)], tmp_path)
    made_by = json.loads((tmp_path / RECORD).read_text())["a"]["made_by"]
    assert made_by["python"] == platform.python_version() and made_by["torch"] == torch.__version__
    monkeypatch.setattr(everything.platform, "python_version", lambda: "2.7")
    assert kept(tmp_path, study("a", ran)) is None


def test_what_is_left_off_the_page_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    every = [study(name, []) for name in "abc"]
    assert "left off" not in run(every, tmp_path, "a,b")[1]
    monkeypatch.setattr(everything, "code_digest", lambda: "other")
    _, told = run(every, tmp_path, "c")
    assert f"left off the page: a, b, which {tmp_path} has of other settings or other code" in told
    html = (tmp_path / INDEX).read_text("utf-8")
    assert 'id="c"' in html and 'id="a"' not in html
    assert "left off the page: b, which" in run(every, tmp_path, "a")[1]
    assert "left off" not in run(every, tmp_path, "b")[1]


def test_a_study_that_fails_is_named_and_the_others_go_on(tmp_path: Path):
    ran: list[str] = []

    def fail() -> None:
        raise ValueError("vocab: expected <more>")

    failed, told = run([study("a", ran), study("b", ran, fail=fail), study("c", ran)], tmp_path)
    assert failed == {"b": "ValueError: vocab: expected <more>"} and len(ran) == 3
    assert "study 2 of 3, b: FAILED: ValueError: vocab: expected <more>" in told
    html = (tmp_path / INDEX).read_text("utf-8")
    assert 'id="c"' in html and 'id="b"' not in html and "ValueError: vocab: expected &lt;more&gt;" in html
    failed, _ = run([study("a", ran), study("b", ran), study("c", ran)], tmp_path)
    assert not failed and len(ran) == 4 and 'id="b"' in (tmp_path / INDEX).read_text("utf-8")


def test_an_interrupted_command_goes_on_where_it_was(tmp_path: Path):
    ran: list[str] = []

    def stop() -> None:
        raise KeyboardInterrupt

    every = [study("a", ran), study("b", ran, fail=stop), study("c", ran)]
    console = recorded()
    with pytest.raises(KeyboardInterrupt):
        run_all(every, every, tmp_path, tmp_path / "work", False, console)
    assert "1 of 3 studies are kept in" in console.export_text() and len(ran) == 2
    assert 'id="a"' in (tmp_path / INDEX).read_text("utf-8")
    run([study("a", ran), study("b", ran), study("c", ran)], tmp_path)
    assert [line[0] for line in ran] == ["a", "b", "b", "c"]


def test_only_some_are_run_and_the_page_keeps_the_others(tmp_path: Path):
    ran: list[str] = []
    every = [study("a", ran), study("b", ran), study("c", ran)]
    run(every, tmp_path, "c, a")
    assert [line[0] for line in ran] == ["a", "c"]
    run(every, tmp_path, "b")
    ids = re.findall(r'<section id="(\w)">', (tmp_path / INDEX).read_text("utf-8"))
    assert len(ran) == 3 and ids == ["a", "b", "c"]
    with pytest.raises(ValueError, match="--only: expected some of a, b, c, with commas between them, got 'd'"):
        chosen(every, "a,d")


def test_a_record_that_is_not_json_is_named(tmp_path: Path):
    (tmp_path / RECORD).write_text("{")
    with pytest.raises(ValueError, match=rf"{RECORD}: malformed"):
        run([study("a", [])], tmp_path)


# ---- the page ---------------------------------------------------------------------------------------------------


def test_the_page_begins_with_every_claim_and_what_became_of_it():
    own = [
        {"says": says, "where": "Paper", "verdict": verdict, "numbers": {}}
        for says, verdict in (("Ten figures agree.", "shown"), ("So does one.", "NOT SO"))
    ]
    plain = made("plain", numbers={"claims": own})
    html = page([made("one"), plain], "All", {"gone": "OSError: full"})
    first = html[: html.index('<section id="one">')]
    for said in ("It &lt;holds&gt;", "It is open", "It is wrong", "Ten figures agree.", "So does one."):
        assert said in first
    each = first[first.index('id="claims"') :]
    assert each.count("✓ shown") == 2 and each.count("? not resolved") == 1
    assert "✗ not so: the reverse" in each and "✗ not so</b>" in each
    total = first[first.index('<tr class="total">') :]
    assert total.startswith(
        '<tr class="total"><td class="word">all</td><td class="yes">2</td><td class="open">1</td><td class="no">2<'
    )
    assert "2 min" in first  # 61 s twice
    assert "failed</b> OSError: full" in first
    assert counted(verdicts(made("one"))) == {"shown": 1, "not resolved": 1, "not so": 1}
    assert counted(verdicts(plain)) == {"shown": 1, "not resolved": 0, "not so": 1}


def test_the_page_says_how_many_claims_chance_would_resolve():
    """Of those judged by an interval: two of each study here."""
    told = "claims are judged by 95% intervals: were there nothing to find, chance alone would resolve"
    many = page([made(f"s{i}") for i in range(28)], "All")
    assert f"56 {told} about 3 of them" in many[: many.index('<section id="claims">')]
    assert f"4 {told} fewer than one of them" in page([made("one"), made("two")], "All")
    assert "chance alone" not in page([made(name, numbers={"claims": []}) for name in ("one", "two")], "All")


def test_every_link_leads_somewhere():
    html = page([made("one"), made("two")], "All")
    targets = re.findall(r'href="#([^"]+)"', html)
    assert set(targets) == set(re.findall(r'id="([^"]+)"', html)) == {"studies", "claims", "one", "two"}


def test_durations_are_seconds_or_minutes():
    assert duration(0.4) == "0 s" and duration(99) == "99 s" and duration(100) == "2 min" and duration(1800) == "30 min"


# ---- the command ------------------------------------------------------------------------------------------------


def test_the_command_runs_two_real_studies_and_names_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    arguments = ["study", "all", "--quick", "--only", "cache,experts", "--work", str(tmp_path / "work")]
    out = tmp_path / "out"

    def fail(*of: object) -> None:
        raise RuntimeError("no more")

    monkeypatch.setattr(everything, "study_experts", fail)
    done = CliRunner().invoke(cli.app, [*arguments, "--out", str(out)])
    assert done.exit_code == 1 and "abyssal: failed: experts" in done.output and "RuntimeError: no more" in done.output
    monkeypatch.undo()
    done = CliRunner().invoke(cli.app, [*arguments, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "study 1 of 2, cache: is in" in done.output and f"written: {out / INDEX}" in done.output
    html = (out / INDEX).read_text("utf-8")
    assert (
        html.count("data:image/png;base64,") == 1 + len(load(out, "experts").pictures)
        and "http" not in words(html)
        and "<script" not in html
    )
    assert load(out, "experts").command == "abyssal study experts --quick"
    assert set(json.loads((out / RECORD).read_text())) == {"cache", "experts"}


@pytest.mark.slow
def test_the_command_runs_all_of_them(tmp_path: Path):
    out = tmp_path / "out"
    done = CliRunner().invoke(cli.app, ["study", "all", "--quick", "--out", str(out), "--work", str(tmp_path / "work")])
    assert done.exit_code == 0, done.output
    html = (out / INDEX).read_text("utf-8")
    assert re.findall(r'<section id="(\w+)">', html) == ["studies", "claims", *NAMES]
    assert "http" not in words(html) and "<script" not in html
    for name in NAMES:
        assert load(out, name).numbers["settings" if name != "cache" else "papers"]


def test_out_is_asked_for_and_must_be_a_folder(tmp_path: Path):
    assert CliRunner().invoke(cli.app, ["study", "all"]).exit_code == 2
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(cli.app, ["study", "all", "--out", str(tmp_path / "file")])
    assert isinstance(done.exception, ValueError) and "--out: expected a folder" in str(done.exception)
