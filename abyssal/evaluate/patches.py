"""Patches that a model writes: asked for, kept as SWE-bench's harness reads them, and judged where the tests need
nothing but Python.

SWE-bench itself is judged by its own harness, in containers. This judge is for repositories of one's own: a patch is
applied with git to a copy, and the tests run in the sandbox, which has the repository's Python files in memory and the
standard library.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from abyssal.evaluate import sandbox
from abyssal.evaluate.questions import each, read_rows
from abyssal.evaluate.served import Served

_BLOCK = re.compile(r"```(?:diff|patch)[ \t]*\n(.*?)(?:```|\Z)|<patch>\n?(.*?)(?:</patch>|\Z)", re.DOTALL)
_BARE = re.compile(r"^(?:diff --git |--- ).*\Z", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Prediction:
    """A line of the file that SWE-bench's harness reads."""

    instance_id: str
    model_name_or_path: str
    model_patch: str


@dataclass(frozen=True)
class Instance:
    """A fault in a repository. Tests are `path.py::function` or `path.py::Class::method`."""

    instance_id: str
    repo: Path
    base_commit: str
    problem_statement: str
    test_patch: str  # what adds the tests; "" where the repository has them
    fail_to_pass: tuple[str, ...]
    pass_to_pass: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judged:
    """`resolved`: all tests pass. `failed`: one does not. `not applied`: git refuses the patch. `empty`: there is none.
    `why` is of the first test that does not pass, or what git says."""

    instance_id: str
    end: Literal["resolved", "failed", "not applied", "empty"]
    why: str = ""


# ---- files --------------------------------------------------------------------------------------------------------


def read_instances(path: Path) -> list[Instance]:
    """Of JSON lines with SWE-bench's fields, where `repo` is a folder, beside the file if it is relative. Raises
    ValueError naming the line's number and the field."""

    def names(value: Any) -> tuple[str, ...]:
        return tuple(json.loads(value) if isinstance(value, str) else value)  # the hub's rows have them as JSON

    def made(row: Mapping[str, Any]) -> Instance:
        return Instance(
            row["instance_id"], path.parent / row["repo"], row["base_commit"], row["problem_statement"],
            row.get("test_patch", ""), names(row["FAIL_TO_PASS"]), names(row.get("PASS_TO_PASS", ())),
        )  # fmt: skip

    return list(each(read_rows(path), made))


def save(path: Path, predictions: Iterable[Prediction]) -> None:
    """A line each, on the way to the disk before the next is made."""
    with path.open("w", encoding="utf-8") as stream:
        for prediction in predictions:
            stream.write(json.dumps(asdict(prediction)) + "\n")
            stream.flush()


# ---- asking -------------------------------------------------------------------------------------------------------


def predict(prompts: Mapping[str, str], served: Served) -> Iterator[Prediction]:
    """The patches of a model's answers, by instance."""
    for name, prompt in prompts.items():
        yield Prediction(name, served.model, patch_of(served.answer(prompt)))


def prompt_of(instance: Instance) -> str:
    """The problem, and every Python file of the repository as it is."""
    with tempfile.TemporaryDirectory() as folder:
        files = _files(_copy(instance, Path(folder)))
    shown = "\n".join(f"{name}\n```python\n{text}```" for name, text in files.items())
    return (
        f"{instance.problem_statement}\n\n{shown}\n\nAnswer with a patch that `git apply` takes, in a ```diff block.\n"
    )


def patch_of(answer: str) -> str:
    """The patch in an answer: in a block of `diff` or `patch`, in `<patch>`, or from its first line to the end. "" if
    there is none."""
    found = _BLOCK.search(answer)
    if found is not None:
        text = found[1] if found[1] is not None else found[2]
    else:
        bare = _BARE.search(answer)
        text = bare[0] if bare else ""
    return text if text.endswith("\n") or not text.strip() else text + "\n"


# ---- judging ------------------------------------------------------------------------------------------------------


def judge(instance: Instance, patch: str) -> Judged:
    """Applies a patch to a copy of the repository, and the tests over it, which a patch so can't change. Raises
    ValueError if the instance's own commit or tests can't be had, sandbox.Unsafe if this machine can't hold code."""
    sandbox.check()
    name = instance.instance_id
    if not patch.strip():
        return Judged(name, "empty", "the answer has no patch")
    with tempfile.TemporaryDirectory() as folder:
        copy = _copy(instance, Path(folder))
        refused = _git(copy, "apply", "--whitespace=nowarn", "-", given=patch)
        if refused:
            return Judged(name, "not applied", refused)
        files = _tested(instance, _files(copy))
    for test in (*instance.fail_to_pass, *instance.pass_to_pass):
        verdict = run_test(files, test)
        if verdict.end != "passed":
            return Judged(name, "failed", f"{test}: {verdict.end}: {verdict.why}")
    return Judged(name, "resolved")


def check(instance: Instance) -> None:
    """Raises ValueError naming a test that does not, without a patch, what its list says."""
    with tempfile.TemporaryDirectory() as folder:
        files = _tested(instance, _files(_copy(instance, Path(folder))))
    for test in (*instance.fail_to_pass, *instance.pass_to_pass):
        passes = run_test(files, test).end == "passed"
        if passes != (test in instance.pass_to_pass):
            raise ValueError(f"{instance.instance_id}: {test} {'passes' if passes else 'fails'} without a patch")


def run_test(files: Mapping[str, str], test: str) -> sandbox.Verdict:
    """One test of a repository's Python files, in the sandbox."""
    path, *names = test.split("::")
    module = path.removesuffix(".py").replace("/", ".")
    return sandbox.run(_PROGRAM.format(files=dict(files), module=module, names=names), sandbox.Limits(seconds=10))


_PROGRAM = """
import importlib, importlib.abc, importlib.util, sys, unittest

FILES = {files!r}

class Repository(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        for root in ("", "src/"):
            stem = root + name.replace(".", "/")
            for file in (stem + "/__init__.py", stem + ".py"):
                if file in FILES:
                    package = file.endswith("__init__.py")
                    return importlib.util.spec_from_loader(name, self, origin=file, is_package=package)
            if any(file.startswith(stem + "/") for file in FILES):
                return importlib.util.spec_from_loader(name, self, origin="", is_package=True)

    def exec_module(self, module):
        file = module.__spec__.origin
        exec(compile(FILES.get(file, ""), file, "exec"), module.__dict__)

sys.meta_path.insert(0, Repository())
found, names = importlib.import_module({module!r}), {names!r}
if len(names) == 1:
    getattr(found, names[0])()
else:
    kind = getattr(found, names[0])
    if issubclass(kind, unittest.TestCase):
        kind(names[1]).debug()
    else:
        getattr(kind(), names[1])()
"""


def _copy(instance: Instance, folder: Path) -> Path:
    """The repository at the instance's commit."""
    copy = folder / "repository"
    refused = _git(folder, "clone", "-q", "--template=", "--no-checkout", str(instance.repo.resolve()), str(copy))
    refused = refused or _git(copy, "checkout", "-q", "--detach", instance.base_commit)
    if refused:
        raise ValueError(f"{instance.instance_id}: {refused}")
    return copy


def _tested(instance: Instance, files: Mapping[str, str]) -> dict[str, str]:
    """The files, with each that the instance's tests change or stand in as they have it, whatever it was, and none that
    Python would import in a test's place."""
    with tempfile.TemporaryDirectory() as folder:
        copy = _copy(instance, Path(folder))
        before = _files(copy)
        refused = instance.test_patch and _git(copy, "apply", "-", given=instance.test_patch)
        if refused:
            raise ValueError(f"{instance.instance_id}: test_patch: {refused}")
        after = _files(copy)
    tests = {test.partition("::")[0] for test in (*instance.fail_to_pass, *instance.pass_to_pass)}
    packages = tuple(path.removesuffix(".py") + "/" for path in tests)  # of a test's name: they come before its file
    new = {path for path in files if path not in before and not path.startswith(packages)}
    kept = {path: text for path, text in files.items() if path in after or path in new}
    return kept | {path: text for path, text in after.items() if before.get(path) != text or path in tests}


def _files(copy: Path) -> dict[str, str]:
    """Python files by their paths."""
    paths = (path for path in sorted(copy.rglob("*.py")) if path.is_file())
    return {p.relative_to(copy).as_posix(): p.read_text(encoding="utf-8", errors="replace") for p in paths}


def _git(folder: Path, *words: str, given: str | None = None) -> str:
    """What git says where it refuses; "" where it does not. No hook runs, and links are plain files: a patch
    might point them anywhere."""
    command = ["git", "-c", "core.hooksPath=/dev/null", "-c", "core.symlinks=false", *words]
    done = subprocess.run(command, cwd=folder, input=given, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stderr.strip() or f"git ended with code {done.returncode}"
