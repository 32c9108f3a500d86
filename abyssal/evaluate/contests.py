"""Programs for contests, as Codeforces has them: what stands on the standard output for each standard input, within
limits of time and memory.

Codeforces itself judges what its own harnesses send there. This judge is for problems of one's own, with answers in
Python, and outputs that are compared word by word.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from abyssal.evaluate import sandbox
from abyssal.evaluate.questions import each, read_rows

_BLOCK = re.compile(r"```(?:[Pp]ython3?|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Problem:
    """A statement, and pairs of input and output that a program is tried on, in this order."""

    id: str
    description: str
    tests: tuple[tuple[str, str], ...]
    time_limit: float = 2.0  # seconds a test, beside the interpreter's start
    memory_limit: float = 256.0  # MB of address space


@dataclass(frozen=True)
class Ruling:
    """As Codeforces rules. `test` is the first that the program does not pass, from 1; 0 where there is none."""

    id: str
    end: Literal["accepted", "wrong answer", "time limit exceeded", "runtime error", "no program"]
    test: int = 0
    why: str = ""


def read_problems(path: Path) -> list[Problem]:
    """Of JSON lines with the fields of the set `open-r1/codeforces`: id, description, official_tests (input and output
    each), and where they are there time_limit in seconds and memory_limit in MB. Raises ValueError naming the line's
    number and the field."""

    def made(row: Mapping[str, Any]) -> Problem:
        tests = tuple((test["input"], test["output"]) for test in row["official_tests"])
        if not tests:
            raise ValueError("official_tests: expected at least one")
        return Problem(
            row["id"], row["description"], tests, float(row.get("time_limit") or 2.0),
            float(row.get("memory_limit") or 256.0),
        )  # fmt: skip

    return list(each(read_rows(path), made))


def prompt_of(problem: Problem) -> str:
    """The statement, the limits, the first test as an example, and how to answer."""
    given, expected = problem.tests[0]
    return (
        f"{problem.description}\n\nTime limit: {problem.time_limit:g} s. Memory limit: {problem.memory_limit:g} MB.\n"
        f"Input:\n{given.rstrip()}\nOutput:\n{expected.rstrip()}\n\n"
        "Answer with a Python program that reads the standard input, in a ```python block.\n"
    )


def program_of(answer: str) -> str:
    """The last block of code in an answer, or "" if there is none."""
    blocks = _BLOCK.findall(answer)
    return str(blocks[-1]) if blocks else ""


def rule(problem: Problem, program: str) -> Ruling:
    """Runs a program on one test after another, until one is not passed. Raises sandbox.Unsafe if this machine can't
    hold code."""
    sandbox.check()
    if not program.strip():
        return Ruling(problem.id, "no program", why="the answer has no block of code")
    limits = sandbox.Limits(seconds=problem.time_limit, memory_bytes=int(problem.memory_limit * 1e6))
    for place, (given, expected) in enumerate(problem.tests, 1):
        words = json.dumps([program, given, expected.split()])
        verdict = sandbox.run(_PROGRAM.format(words=words), limits)
        if verdict.end == "timeout":
            return Ruling(problem.id, "time limit exceeded", place, verdict.why)
        if verdict.end != "passed":
            wrong = verdict.why.startswith("SystemExit: wrong answer")
            why = verdict.why.removeprefix("SystemExit: ")
            return Ruling(problem.id, "wrong answer" if wrong else "runtime error", place, why)
    return Ruling(problem.id, "accepted")


# A program may end by exit, and read and write the standard streams as descriptors 0 and 1, as fast templates do.
_PROGRAM = """
import builtins, io, json, os, sys, types

program, given, expected = json.loads({words!r})

class Stream(io.BytesIO):
    def __init__(self, number, data=b""):
        super().__init__(data)
        self.number = number

    def fileno(self):
        return self.number

    def close(self):
        pass  # nor by what a program replaces

data = given.encode()
asked, written = Stream(0, data), Stream(1)
sys.stdin, sys.stdout = io.TextIOWrapper(asked), io.TextIOWrapper(written, write_through=True)
sys.stdin.mode, sys.stdout.mode = "r", "w"
builtins.exit = builtins.quit = sys.exit
really, read, write, fstat = builtins.open, os.read, os.write, os.fstat

def opened(file, mode="r", *a, **k):
    if file in (0, "/dev/stdin"):
        return asked if "b" in mode else sys.stdin
    return really(file, mode, *a, **k)

builtins.open = opened
os.read = lambda file, size: asked.read(size) if file == 0 else read(file, size)
os.write = lambda file, data: written.write(data) if file == 1 else write(file, data)
os.fstat = lambda file: types.SimpleNamespace(st_size=len(data)) if file == 0 else fstat(file)
try:
    exec(compile(program, "<answer>", "exec"), {{"__name__": "__main__"}})
except SystemExit as end:
    if end.code not in (None, 0):
        raise RuntimeError("ended with code " + repr(end.code)) from None
sys.stdout.flush()
said = written.getvalue().decode("utf-8", "replace").split()
if said != expected:
    at = next((i for i, (a, b) in enumerate(zip(said, expected)) if a != b), min(len(said), len(expected)))
    raise SystemExit("wrong answer: word %d is %r" % (at + 1, (said[at:at + 1] or [None])[0]))
"""
