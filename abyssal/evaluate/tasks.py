"""A benchmark set as a task of lm-evaluation-harness. Prompts are made here, in Python; no template is evaluated."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task
from lm_eval.config.task import TaskConfig
from lm_eval.filters import build_filter_ensemble

from abyssal.evaluate import sandbox
from abyssal.evaluate.grade import (
    code_of,
    equal_mathematics,
    last_number,
    plain_number,
    plain_words,
    stated_letter,
    stated_number,
)
from abyssal.evaluate.questions import Question
from abyssal.evaluate.sets import Set

Chat = Callable[..., str]


class SetTask(Task):
    """`shots` examples stand before each question: the set's own, or others of its questions, drawn by `seed` and the
    question's place. As a conversation, each example is a turn of each side.

    Raises ValueError if there are not so many examples, or if the set needs code to be run and `run_code` is False;
    sandbox.Unsafe if this machine can't hold it.
    """

    VERSION = 1

    def __init__(self, own: Set, shots: int | None = None, seed: int = 0, run_code: bool = False) -> None:
        if own.kind == "code":
            if not run_code:
                raise ValueError(f"{own.name}: runs code that the model writes, in a sandbox; give --run-code")
            sandbox.check()
        self.own, self.seed, self.shots = own, seed, own.shots if shots is None else shots
        try:
            self.questions = own.load()
        except ValueError as error:
            raise ValueError(f"{own.name}: {error}") from error
        self.examples = own.examples() if own.examples and self.shots else None
        most = len(self.questions) - 1 if self.examples is None else len(self.examples)
        if not 0 <= self.shots <= most:
            raise ValueError(f"{own.name}: shots: expected 0 to {most}, got {self.shots}")
        self.places = {id(question): i for i, question in enumerate(self.questions)}
        # Not `Task.__init__`, which downloads, and takes the whole configuration for the task's name.
        self._config = TaskConfig(
            task=own.name, num_fewshot=self.shots, output_type=self._output(), metadata={"version": self.VERSION},
            generation_kwargs=self._generation(False) if self._output() == "generate_until" else None,
        )  # fmt: skip
        self._instances: list[Instance] | None = None
        self._filters = [build_filter_ensemble("none", [("take_first", None)])]
        self.fewshot_rnd = None

    def _output(self) -> Any:
        """The harness's word for what is asked."""
        known = {"choice": "multiple_choice", "text": "loglikelihood_rolling"}
        return known.get(self.own.kind, "generate_until")

    def _generation(self, chat: bool) -> dict[str, Any]:
        # In a conversation, code comes in a block and ends with it.
        stops = [] if chat and self.own.kind == "code" else list(self.own.stops)
        return {"until": stops, "max_gen_toks": self.own.max_tokens, "do_sample": False}

    def has_training_docs(self) -> bool:
        return False

    def has_validation_docs(self) -> bool:
        return False

    def has_test_docs(self) -> bool:
        return True

    def test_docs(self) -> list[Question]:
        return self.questions

    def doc_to_text(self, doc: Question) -> str:
        return doc.prompt

    def doc_to_target(self, doc: Question) -> str:
        return doc.answer

    # ---- asking ---------------------------------------------------------------------------------------------

    def fewshot_context(self, doc: Question, num_fewshot: int, rnd: Any = None, **kwargs: Any) -> str:
        """The examples and the question."""
        shown = self._shown(doc, num_fewshot)
        if not kwargs.get("apply_chat_template"):
            front = kwargs.get("system_instruction")
            asked = [e.prompt + e.answer for e in shown] + [doc.prompt]
            return "\n\n".join([front, *asked] if front else asked)
        chat: Chat = kwargs["chat_template"]
        turns = [{"role": "system", "content": kwargs["system_instruction"]}] if kwargs["system_instruction"] else []
        for e in shown:
            turns += [{"role": "user", "content": self._turn(e)}, {"role": "assistant", "content": e.answer.strip()}]
        return chat([*turns, {"role": "user", "content": self._turn(doc)}])

    def _turn(self, question: Question) -> str:
        if question.stems:
            raise ValueError(f"{self.own.name}: fills in blanks, which a conversation can't ask; leave --chat out")
        if self.own.kind != "code" or not question.entry:
            return question.prompt
        return (
            f"Complete this function. Answer with all of it, in a ```python block.\n```python\n{question.prompt}\n```"
        )

    def _shown(self, doc: Question, count: int) -> list[Question]:
        if self.examples is not None:
            return self.examples[:count]
        place = self.places[id(doc)]
        draw = random.Random(f"{self.seed} {self.own.name} {place}")
        others = draw.sample(range(len(self.questions) - 1), count)
        return [self.questions[i + (i >= place)] for i in others]

    def construct_requests(self, doc: Question, ctx: str, **kwargs: Any) -> list[Instance]:
        """What the model is asked of one question."""
        chat, metadata = bool(kwargs.get("apply_chat_template")), kwargs["metadata"]

        def ask(kind: Any, arguments: tuple[Any, ...], place: int = 0) -> Instance:
            return Instance(kind, doc, arguments, place, metadata=metadata)

        if self.own.kind == "text":
            return [ask("loglikelihood_rolling", (doc.prompt,))]
        if self.own.kind == "choice":
            front = ctx[: len(ctx) - len(doc.prompt)]
            contexts = [front + stem for stem in doc.stems] or [ctx] * len(doc.choices)
            texts = [choice.lstrip() if chat else choice for choice in doc.choices]
            return [ask("loglikelihood", pair, i) for i, pair in enumerate(zip(contexts, texts))]
        stops = list(self.own.stops) if not (chat and self.own.kind == "code") else []
        return [ask("generate_until", (ctx, {"until": stops, "max_gen_toks": self.own.max_tokens, "do_sample": False}))]

    # ---- grading --------------------------------------------------------------------------------------------

    def process_results(self, doc: Question, results: Sequence[Any]) -> dict[str, Any]:
        """The question's figures by name."""
        match self.own.kind:
            case "text":
                return {"bits_per_byte": (-results[0] / math.log(2), len(doc.prompt.encode()))}
            case "choice":
                likely = [logprob for logprob, _ in results]
                lengths = [max(len(choice.removeprefix(" ")), 1) for choice in doc.choices]  # the space is ours
                by_length = [logprob / length for logprob, length in zip(likely, lengths)]
                places = [values.index(max(values)) for values in (likely, by_length)]
                return dict(zip(("acc", "acc_norm"), (float(place == doc.correct) for place in places)))
            case "letter":
                return {"exact_match": float(stated_letter(results[0]) == "ABCDEFGHIJ"[doc.correct])}
            case "code":
                program = code_of(results[0], doc.entry, doc.prompt if doc.entry else "")
                verdict = sandbox.run(f"{program}\n{doc.test}", sandbox.Limits(seconds=10))
                return {"pass_at_1": float(verdict.end == "passed")}
            case "mathematics":
                return {"math_verify": float(equal_mathematics(doc.answer, results[0]))}
            case "number":
                right, text = plain_number(doc.answer.strip()), results[0]
                return {
                    "exact_match": float(stated_number(text) == right),
                    "last_number": float(last_number(text) == right),
                    "math_verify": float(equal_mathematics(right, text)),
                }
            case "written":
                same = plain_words(results[0].strip().split("\n")[0]) == plain_words(doc.answer)
                return {"exact_match": float(same), "math_verify": float(equal_mathematics(doc.answer, results[0]))}

    def aggregation(self) -> dict[str, Callable[[Any], float]]:
        """Means; of texts, all bits over all bytes."""
        return {name: ratio if name == "bits_per_byte" else mean for name in self._figures()}

    def higher_is_better(self) -> dict[str, bool]:
        return {name: name != "bits_per_byte" for name in self._figures()}

    def _figures(self) -> tuple[str, ...]:
        return {
            "text": ("bits_per_byte",), "choice": ("acc", "acc_norm"), "letter": ("exact_match",),
            "code": ("pass_at_1",), "mathematics": ("math_verify",),
            "number": ("exact_match", "last_number", "math_verify"),
            "written": ("exact_match", "math_verify"),
        }[self.own.kind]  # fmt: skip


def ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """Σ first / Σ second."""
    return sum(a for a, _ in pairs) / max(sum(b for _, b in pairs), 1)
