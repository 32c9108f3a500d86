"""A fault in a repository and a problem of a contest, from `abyssal serve`'s answer to the verdict."""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from evaluate_memory import remembering, serving

from abyssal.evaluate import contests, patches, sandbox
from abyssal.evaluate.contests import Problem, program_of, rule
from abyssal.evaluate.patches import Instance, Prediction, judge, patch_of
from abyssal.evaluate.served import Served

TEXT = """def initials(name):
    return "".join(word[0] for word in name.split())
"""
TESTS = """import unittest

from calc import initials


def test_no_name():
    assert initials("") == ""


class Names(unittest.TestCase):
    def setUp(self):
        self.name = "ada lovelace"

    def test_capitals(self):
        self.assertEqual(initials(self.name), "AL")
"""


@pytest.fixture(scope="module", autouse=True)
def held() -> None:
    try:
        sandbox.check()
    except sandbox.Unsafe as error:
        pytest.skip(str(error))


def git(repo: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", *who, *words], cwd=repo, check=True, capture_output=True, text=True).stdout


def changed(repo: Path, path: str, text: str) -> str:
    """The patch that makes a file so; the repository stays as it was."""
    (repo / path).parent.mkdir(parents=True, exist_ok=True)
    (repo / path).write_text(text)
    git(repo, "add", "-N", path)
    patch = git(repo, "diff")
    git(repo, "reset", "-q", "--hard")
    return patch


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Instance:
    """A repository with a fault; the tests that show it come with the instance, one of them in a new file."""
    repo = tmp_path_factory.mktemp("fault") / "repo"
    (repo / "src/calc").mkdir(parents=True)
    (repo / "src/calc/__init__.py").write_text("from .text import initials\n")
    (repo / "src/calc/text.py").write_text(TEXT)
    git(repo, "init", "-q")
    git(repo, "add", ".")
    git(repo, "commit", "-q", "-m", "as it was")
    commit = git(repo, "rev-parse", "HEAD").strip()
    tests = changed(repo, "tests/test_text.py", TESTS)
    (repo / "src/calc/text.py").write_text("later\n")
    git(repo, "commit", "-q", "-a", "-m", "not the instance's commit")
    fails, passes = ("tests/test_text.py::Names::test_capitals",), ("tests/test_text.py::test_no_name",)
    return Instance("calc-1", repo, commit, "Initials should be capitals.", tests, fails, passes)


def patch_with(instance: Instance, method: str, of: str = TEXT) -> str:
    """The patch that calls a method of the letters, of a file that reads as `of`."""
    old, new = of.splitlines()[1], of.splitlines()[1].replace("word[0]", f"word[0].{method}()")
    path = "src/calc/text.py"
    return f"--- a/{path}\n+++ b/{path}\n@@ -1,2 +1,2 @@\n {of.splitlines()[0]}\n-{old}\n+{new}\n"


SUM = Problem("sum-1", "Add two numbers.", (("1 2\n", "3\n"), ("40 2\n", "42\n"), ("5 -5\n", "0\n")), 2.0, 256.0)
RIGHT_SUM = "a, b = map(int, input().split())\nprint(a + b)\n"
WRONG_SUM = "a, b = map(int, input().split())\nprint(a + abs(b))\n"


@pytest.fixture(scope="module")
def asked(instance: Instance) -> dict[str, tuple[str, str]]:
    """Prompts, and what the model is to have learnt to answer them."""
    elsewhere = patch_with(instance, "upper", TEXT.replace("name.split()", "name.split(' ')"))
    said = {"right": patch_with(instance, "upper"), "wrong": patch_with(instance, "lower"), "elsewhere": elsewhere}
    found = {}
    for name, patch in said.items():
        own = replace(instance, problem_statement=f"{instance.problem_statement} ({name})")
        found[name] = (patches.prompt_of(own), f"So it is better.\n```diff\n{patch}```\n")
    for name, program in (("right sum", RIGHT_SUM), ("wrong sum", WRONG_SUM)):
        own_sum = replace(SUM, description=f"{SUM.description} ({name})")
        found[name] = (contests.prompt_of(own_sum), f"As asked:\n```python\n{program}```\n")
    return found


@pytest.fixture(scope="module")
def served(asked: dict[str, tuple[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = remembering(tmp_path_factory.mktemp("memory") / "learnt", dict(asked.values()))
    with serving(folder) as address:
        yield Served(address, "learnt", max_tokens=400, seconds=60)


def test_a_served_models_patch_is_taken_from_its_answer_applied_and_judged(
    instance: Instance, asked: dict[str, tuple[str, str]], served: Served, tmp_path: Path
) -> None:
    patches.check(instance)  # without a patch one test fails, and the other passes
    path = tmp_path / "preds.jsonl"
    prompts = {name: prompt for name, (prompt, _) in asked.items() if not name.endswith("sum")}
    patches.save(path, patches.predict(prompts, served))
    found = {row["instance_id"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert list(found) == ["right", "wrong", "elsewhere"]
    assert all(set(row) == {"instance_id", "model_name_or_path", "model_patch"} for row in found.values())
    assert found["right"]["model_name_or_path"] == "learnt"
    right, wrong, elsewhere = (judge(instance, row["model_patch"]) for row in found.values())
    assert right.end == "resolved", right
    assert wrong.end == "failed" and "Names::test_capitals: failed: AssertionError: 'al' != 'AL'" in wrong.why
    assert elsewhere.end == "not applied" and "patch does not apply" in elsewhere.why


def test_a_served_models_program_is_taken_from_its_answer_and_ruled_on(
    asked: dict[str, tuple[str, str]], served: Served
) -> None:
    rulings = [rule(SUM, program_of(served.answer(asked[name][0]))) for name in ("right sum", "wrong sum")]
    assert [(r.end, r.test) for r in rulings] == [("accepted", 0), ("wrong answer", 3)]


def test_what_a_server_refuses_is_said(served: Served) -> None:
    with pytest.raises(ValueError, match=r"/v1/chat/completions: 404: .*nobody"):
        replace(served, model="nobody").answer("hi")
    with pytest.raises(ConnectionError, match=r"http://127.0.0.1:9/v1/chat/completions"):
        Served("http://127.0.0.1:9/v1", "m").answer("hi")
    with pytest.raises(ValueError, match="expected http:// or https://"):
        Served("file:///etc", "m").answer("hi")


def test_a_patch_can_neither_change_the_tests_nor_leave_the_repository(instance: Instance, tmp_path: Path) -> None:
    lenient = TESTS.replace('"AL"', '"al"')
    assert judge(instance, changed(instance.repo, "tests/test_text.py", lenient)).end == "failed"
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "test_text.py").write_text("kept")
    head = "diff --git a/tests b/tests\nnew file mode 120000\n--- /dev/null\n+++ b/tests\n"
    link = f"{head}@@ -0,0 +1 @@\n+{outside}\n\\ No newline at end of file\n"
    assert judge(instance, link).end == "failed"
    assert (outside / "test_text.py").read_text() == "kept" and len(list(outside.iterdir())) == 1
    above = "--- /dev/null\n+++ b/../above.py\n@@ -0,0 +1 @@\n+x = 1\n"
    assert judge(instance, above).end == "not applied"
    assert judge(instance, " \n") == patches.Judged("calc-1", "empty", "the answer has no patch")
    leaves = "src/calc/text.py", "import socket\nsocket.socket()\n" + TEXT.replace("word[0]", "word[0].upper()")
    git(instance.repo, "checkout", "-q", instance.base_commit)
    found = judge(instance, changed(instance.repo, *leaves))
    assert found.end == "failed" and "PermissionError" in found.why


def test_a_patch_can_change_no_test_that_the_repository_has_nor_stand_in_its_place(instance: Instance) -> None:
    repo = instance.repo
    git(repo, "checkout", "-q", instance.base_commit)
    (repo / "tests").mkdir()
    (repo / "tests/test_text.py").write_text(TESTS)
    git(repo, "add", "tests")
    git(repo, "commit", "-q", "-m", "with its tests")
    whole = replace(instance, base_commit=git(repo, "rev-parse", "HEAD").strip(), test_patch="")
    patches.check(whole)
    lenient = TESTS.replace('"AL"', '"al"')
    assert judge(whole, changed(repo, "tests/test_text.py", lenient)).end == "failed"
    for own in (whole, instance):
        git(repo, "checkout", "-q", own.base_commit)
        assert judge(own, changed(repo, "tests/test_text/__init__.py", lenient)).end == "failed"
        assert judge(own, patch_with(own, "upper")).end == "resolved"


FAST = """
import os, sys
from io import BytesIO, IOBase
class Fast(IOBase):
    def __init__(self, file):
        self.fd, self.buffer, self.writable = file.fileno(), BytesIO(), "r" not in file.mode
    def readline(self):
        size = os.fstat(self.fd).st_size
        return os.read(self.fd, max(size, 8192)).decode()
    def write(self, text):
        self.buffer.write(text.encode())
    def flush(self):
        if self.writable:
            os.write(self.fd, self.buffer.getvalue())
sys.stdin, sys.stdout = Fast(sys.stdin), Fast(sys.stdout)
print(sum(map(int, sys.stdin.readline().split())))
"""


@pytest.mark.parametrize(
    "program",
    [
        "print(sum(map(int, open(0).read().split())))",
        "print(sum(map(int, open(0, 'rb').read().decode().split())))",
        "import os\nprint(sum(map(int, os.read(0, os.fstat(0).st_size).split())))",
        "import os\nos.write(1, str(sum(map(int, input().split()))).encode())",
        "import sys\nsys.stdout.buffer.write(str(sum(map(int, sys.stdin.buffer.readline().split()))).encode())",
        "print(sum(map(int, input().split())))\nexit()",
        "print(sum(map(int, input().split())))\nquit(0)",
        FAST,
    ],
)
def test_a_program_reads_and_writes_as_contests_programs_do(program: str) -> None:
    assert rule(SUM, program) == contests.Ruling("sum-1", "accepted")


def test_an_instance_whose_tests_are_otherwise_than_it_says_is_refused(instance: Instance, tmp_path: Path) -> None:
    swapped = replace(instance, fail_to_pass=instance.pass_to_pass, pass_to_pass=())
    with pytest.raises(ValueError, match=r"calc-1: tests/test_text.py::test_no_name passes without a patch"):
        patches.check(swapped)
    with pytest.raises(ValueError, match=r"calc-1: .*nothing"):
        judge(replace(instance, base_commit="nothing"), "x")
    row = {
        "instance_id": "calc-1", "repo": str(instance.repo), "base_commit": instance.base_commit,
        "problem_statement": instance.problem_statement, "test_patch": instance.test_patch,
        "FAIL_TO_PASS": json.dumps(instance.fail_to_pass), "PASS_TO_PASS": list(instance.pass_to_pass),
    }  # fmt: skip
    path = tmp_path / "instances.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert patches.read_instances(path) == [instance]
    path.write_text(json.dumps({**row, "base_commit": None}) + "\n" + json.dumps({"instance_id": "x"}) + "\n")
    with pytest.raises(ValueError, match="question 2: has no field 'repo'"):
        patches.read_instances(path)


@pytest.mark.parametrize(
    "answer,patch",
    [
        ("So:\n```diff\n--- a/x\n+++ b/x\n```\nDone.", "--- a/x\n+++ b/x\n"),
        ("<patch>\ndiff --git a/x b/x\n</patch>", "diff --git a/x b/x\n"),
        ("This is it.\ndiff --git a/x b/x\n@@ -1 +1 @@\n-a\n+b", "diff --git a/x b/x\n@@ -1 +1 @@\n-a\n+b\n"),
        ("```patch\n--- a/x\n+++ b/x\n+cut sho", "--- a/x\n+++ b/x\n+cut sho\n"),
        ("I don't know.\n```python\nx = 1\n```", ""),
    ],
)
def test_the_patch_of_an_answer(answer: str, patch: str) -> None:
    assert patch_of(answer) == patch
    assert Prediction("x", "m", patch_of(answer)).model_patch == patch


@pytest.mark.parametrize(
    "program,end,test",
    [
        ("import sys\nprint(sum(map(int, sys.stdin.read().split())))\nsys.exit()", "accepted", 0),
        ("a, b = open(0).read().split()\nprint(int(a) + int(b), end='')", "accepted", 0),
        ("import sys\nfor line in sys.stdin.buffer:\n    print(sum(map(int, line.split())))", "accepted", 0),
        ("print(3)", "wrong answer", 2),
        ("print(3, 3)", "wrong answer", 1),
        ("pass", "wrong answer", 1),
        ("raise SystemExit('wrong answer')", "runtime error", 1),
        ("print(3)\nimport sys\nsys.exit(1)", "runtime error", 1),
        ("print(1 // 0)", "runtime error", 1),
        ("x = bytearray(1 << 30)", "runtime error", 1),
        ("while True: pass", "time limit exceeded", 1),
        ("import os\nos._exit(0)", "runtime error", 1),
        ("print(", "runtime error", 1),
        ("", "no program", 0),
    ],
)
def test_rulings(program: str, end: str, test: int) -> None:
    found = rule(replace(SUM, time_limit=0.5), program)
    assert (found.end, found.test) == (end, test), found


def test_problems_are_read_as_the_public_set_has_them(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    row = {
        "id": "sum-1", "description": SUM.description, "time_limit": 2.0, "memory_limit": 256.0, "rating": 800,
        "official_tests": [{"input": given, "output": expected} for given, expected in SUM.tests],
    }  # fmt: skip
    path.write_text(json.dumps(row) + "\n")
    assert contests.read_problems(path) == [SUM]
    path.write_text(json.dumps({**row, "official_tests": []}) + "\n")
    with pytest.raises(ValueError, match="question 1: official_tests: expected at least one"):
        contests.read_problems(path)
    assert program_of("```cpp\nint main() {}\n```") == ""
    assert program_of("```\nx\n```\nor\n```python\ny\n```") == "y\n"
