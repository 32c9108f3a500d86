"""What one request asks for. From logits to tokens it is `ops/sample.py`."""

import sys
from dataclasses import dataclass
from typing import Any, Literal

_GREEDY = 1e-5  # a temperature below which float32 overflows before it sharpens


@dataclass(frozen=True)
class Grammar:
    """What a text must match: `text` is a JSON schema, a regular expression or a Lark grammar; of kind "json", any
    JSON object, it is empty."""

    kind: Literal["json", "json_schema", "regex", "lark"]
    text: str = ""


@dataclass(frozen=True)
class Sampling:
    """What one request asks for.

    Raises ValueError naming the field for a value, and TypeError for a type, that it cannot have.
    """

    max_tokens: int = 256
    temperature: float = 1.0  # 0, or less than 1e-5: greedy
    top_k: int = 0  # only the k likeliest; 0: all
    top_p: float = 1.0  # only the likeliest that together reach p
    min_p: float = 0.0  # only what is at least this share of the likeliest's probability
    repetition_penalty: float = 1.0  # of tokens in prompt or output: positive logits divided, negative multiplied
    presence_penalty: float = 0.0  # subtracted once from the logits of tokens in the output
    frequency_penalty: float = 0.0  # subtracted for each time that a token is in the output
    seed: int | None = None  # None: a different one every time
    stop: tuple[str, ...] = ()  # the text ends before the first of these; one string or several
    logprobs: int | None = None  # log-probabilities of the token and of this many likeliest; None: of none
    ignore_eos: bool = False
    speculate: bool | None = None  # None: where the checkpoint has the MTP layer
    n: int = 1  # samples of one prompt, which share its pages
    logit_bias: tuple[tuple[int, float], ...] = ()  # added to the logits of these ids; a dict will do
    grammar: Grammar | None = None  # what the text must match
    prompt_logprobs: int | None = None  # as `logprobs`, of the prompt, which is then computed whole

    def __post_init__(self) -> None:
        self._integer("max_tokens", 1, sys.maxsize, "1 or more")
        self._number("temperature", 0.0, 1e6, "0 (greedy) to a million")
        self._integer("top_k", 0, sys.maxsize, "0 (off) or more")
        self._number("top_p", 5e-324, 1.0, "above 0, at most 1")
        self._number("min_p", 0.0, 1.0, "from 0 to 1")
        self._number("repetition_penalty", 0.01, 100.0, "from 0.01 to 100")
        self._number("presence_penalty", -2.0, 2.0, "from -2 to 2")
        self._number("frequency_penalty", -2.0, 2.0, "from -2 to 2")
        if self.seed is not None:
            self._integer("seed", -(2**63), 2**64 - 1, "of 64 bits, or None")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._integer(name, 0, sys.maxsize, "0 or more, or None")
        self._integer("n", 1, sys.maxsize, "1 or more")
        self._biases()
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise self._refused(TypeError, "grammar", "a Grammar or None")
        if not isinstance(self.ignore_eos, bool):
            raise self._refused(TypeError, "ignore_eos", "True or False")
        if not isinstance(self.speculate, bool | None):
            raise self._refused(TypeError, "speculate", "True, False or None")
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stops, tuple | list) or not all(isinstance(stop, str) for stop in stops):
            raise self._refused(TypeError, "stop", "a string or several")
        if "" in stops:
            raise self._refused(ValueError, "stop", "strings that are not empty")
        object.__setattr__(self, "stop", tuple(stops))

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken and nothing is drawn."""
        return self.temperature < _GREEDY

    @property
    def penalised(self) -> bool:
        """Whether `distribution` needs to know which tokens came before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def _biases(self) -> None:
        given: Any = self.logit_bias
        pairs = tuple(given.items() if isinstance(given, dict) else given)
        for pair in pairs:
            id, value = pair if isinstance(pair, tuple | list) and len(pair) == 2 else (None, None)
            if isinstance(id, bool) or not isinstance(id, int) or id < 0:
                raise self._refused(TypeError, "logit_bias", "pairs of a token id and a number")
            if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
                raise self._refused(ValueError, "logit_bias", "numbers from -100 to 100")
        object.__setattr__(self, "logit_bias", tuple((id, float(value)) for id, value in pairs))

    def _integer(self, name: str, low: int, high: int, expected: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._refused(TypeError, name, f"an integer {expected}")
        if not low <= value <= high:
            raise self._refused(ValueError, name, f"an integer {expected}")

    def _number(self, name: str, low: float, high: float, expected: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._refused(TypeError, name, f"a number {expected}")
        if not low <= value <= high:  # NaN is refused here too
            raise self._refused(ValueError, name, f"a number {expected}")
        object.__setattr__(self, name, float(value))

    def _refused(self, error: type[Exception], name: str, expected: str) -> Exception:
        value: Any = getattr(self, name)
        return error(f"{name}: expected {expected}, got {value!r}")
