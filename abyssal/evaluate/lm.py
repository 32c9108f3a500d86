"""The engine as lm-evaluation-harness knows language models: likelihoods of texts, and texts until they stop."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Console
from rich.progress import Progress

from abyssal.engine import LLM, Sampling
from abyssal.engine.compiled import can_compile
from abyssal.evaluate.journal import Journal
from abyssal.evaluate.score import Pair, fitted, pass_tokens, score
from abyssal.source import code_digest

MAX_NEW = 256  # tokens generated where a task does not say
# Steps of decoding that there may be, from which compiling pays where most texts end early: it takes a minute and saves
# a few milliseconds a step.
WORTH_COMPILING = 8192
ANSWERED_BY = (  # what the answers hang on; how they are graded does not change them
    "checkpoint", "config.py", "public_config.py", "data", "engine", "kernels", "model", "ops",
    "evaluate/lm.py", "evaluate/prefixes.py", "evaluate/score.py",
)  # fmt: skip
_SETTINGS = ("top_p", "top_k", "min_p", "repetition_penalty")  # of a task, that are those of `Sampling`
_IDLE: dict[str, Any] = {"num_beams": 1, "use_cache": True}  # settings of other engines: only as they are here anyway


@dataclass
class Counts:
    """What an evaluation came to, beside its answers."""

    requests: int = 0
    reused: int = 0  # of these, answered in the journal
    truncated: int = 0  # inputs whose first tokens were left out
    truncated_tokens: int = 0
    shortened: int = 0  # generations that could have fewer tokens than the task asked for


class EngineLM(TemplateLM):
    """A checkpoint behind the harness's interface.

    Tokens are those of the checkpoint's own tokenizer, special tokens in a text among them, with the id that begins a
    text where the checkpoint asks for one and the text does not begin with it. An empty context is that id, or else
    the one that ends a text. Inputs longer than `max_length` lose their first tokens; `counts` says how many did.
    A generation that does not fit behind its prompt gives way down to half of `max_length`, and then the prompt does.
    `seed` and what is asked make a sampled text's own seed.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        answers: Path | None = None,
        name: str = "",
        seed: int = 0,
        system: str | None = None,
        quiet: bool = False,
    ) -> None:
        """`max_length`: tokens of context (None: the engine's). `batch_tokens` of a scoring pass (None: 4096, and
        32768 on a GPU). `answers`: a file that keeps every answer, see `Journal`; `name` says there whose weights these
        are. Raises ValueError if answers have no name, if the tokenizer is absent or knows no token that begins or
        ends a text."""
        super().__init__()
        if answers is not None and not name:
            raise ValueError("name: answers are kept by the name of the weights that gave them")
        if llm.tokenizer is None:
            raise ValueError("tokenizer: an evaluation needs one")
        if llm.tokenizer.eos_id is None:
            raise ValueError("tokenizer_config.json: has no eos_token, which the harness needs")
        longest = llm.options.context
        if max_length is not None and not 2 <= max_length <= longest:
            raise ValueError(f"max_length: expected 2 to the engine's {longest}, got {max_length}")
        self.llm, self.tokenizer, self.seed, self.quiet = llm, llm.tokenizer, seed, quiet
        self.max_length = max_length or longest
        self._device = llm.model.embed.weight.device
        self.batch_tokens = batch_tokens or pass_tokens(self._device)
        self.counts = Counts()
        weights = str(llm.model.embed.weight.dtype)
        whose = [name, llm.model.config.source, llm.tokenizer.fingerprint, weights, self.max_length]
        made_by = [self._device.type, str(torch.__version__), code_digest(*ANSWERED_BY)]
        self.journal = Journal(answers, json.dumps([whose, made_by]))

    # ---- what the harness asks of a tokenizer ---------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        assert self.tokenizer.eos_id is not None
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text of which every token is scored."""
        return self.eot_token_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text. `add_special_tokens` None: what begins a text is put before it where the checkpoint asks
        for it and it is not there."""
        begins = self.tokenizer.adds_bos if add_special_tokens is None else bool(add_special_tokens)
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id], True)):
            begins = False
        front = [self.prefix_token_id] if begins and self.tokenizer.adds_bos else []
        return [*front, *self.tokenizer.encode(string, special=True)]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """By the checkpoint's own template, in a sandbox; what it writes to begin a text stays as it is."""
        if add_generation_prompt or not chat_history or chat_history[-1]["role"] != "assistant":
            return self.tokenizer.chat(chat_history, add_generation_prompt)
        # An answer that is begun and goes on: the text up to where its content ends.
        text, last = self.tokenizer.chat(chat_history, False), chat_history[-1]["content"]
        at = text.rfind(last.strip())
        if at < 0:
            raise ValueError("chat template: does not show the beginning of an answer as it was given")
        return text[:at] + last

    # ---- likelihoods ----------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(Σ log p of the continuation's tokens in nats, whether each is the likeliest), in order."""
        asked = [tuple(r.args) for r in requests]
        answers = self._answered("loglikelihood", asked, self._likelihoods)
        return [(float(logprob), bool(greedy)) for logprob, greedy in answers]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Σ log p of a text's tokens, all of them, in windows of `max_length`: each token once, with as much before it
        as its window holds."""
        return [float(x) for x in self._answered("rolling", [tuple(r.args) for r in requests], self._rolling)]

    def _likelihoods(self, asked: Sequence[tuple[Any, ...]], repeats: Sequence[int]) -> Iterator[list[tuple[int, Any]]]:
        pairs = [self._pair(context, continuation) for context, continuation in asked]
        for found in self._scores(pairs):
            yield [(i, [scored.logprob, scored.greedy]) for i, scored in found]

    def _rolling(self, asked: Sequence[tuple[Any, ...]], repeats: Sequence[int]) -> Iterator[list[tuple[int, Any]]]:
        pairs: list[Pair] = []
        owners: list[int] = []
        for i, (text,) in enumerate(asked):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            for context, continuation in map(make_disjoint_window, windows):
                pairs.append(Pair(tuple(context), tuple(continuation)))
                owners.append(i)
        left, sums = Counter(owners), [0.0] * len(asked)
        yield [(i, 0.0) for i in range(len(asked)) if not left[i]]  # texts without tokens
        for found in self._scores(pairs):
            whole = []
            for pair, scored in found:
                owner = owners[pair]
                sums[owner] += scored.logprob
                left[owner] -= 1
                if not left[owner]:
                    whole.append((owner, sums[owner]))
            yield whole

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        """The harness's own entry for pairs of ids: `((texts), context, continuation)` each."""
        pairs = [Pair(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        found = dict(x for batch in self._scores(pairs) for x in batch)
        return [(found[i].logprob, found[i].greedy) for i in range(len(pairs))]

    def _pair(self, context: str, continuation: str) -> Pair:
        if context:
            before, after = self._encode_pair(context, continuation)
        else:
            ids = self.tok_encode(continuation, add_special_tokens=False)
            before, after = [self.prefix_token_id], ids
            if ids[:1] == before:
                before, after = ids[:1], ids[1:]
        if not before or not after:
            raise ValueError(f"request: {continuation!r} after {context[-40:]!r} has no token of its own to be scored")
        return Pair(tuple(before), tuple(after))

    def _scores(self, pairs: list[Pair]) -> Iterator[list[tuple[int, Any]]]:
        for pair in pairs:
            self._cut(fitted(pair, self.max_length)[1])
        return score(self.llm.model, pairs, self.max_length, self.batch_tokens)

    # ---- texts ----------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model goes on with, up to a stop string of the task, the end of the text, or as many tokens as the
        task allows. Raises ValueError naming a setting that the engine lacks."""
        return [str(x) for x in self._answered("generate", [tuple(r.args) for r in requests], self._texts)]

    def _texts(self, asked: Sequence[tuple[Any, ...]], repeats: Sequence[int]) -> Iterator[list[tuple[int, Any]]]:
        prompts, settings = [], []
        for (context, wanted), repeat in zip(asked, repeats):
            ids = self.tok_encode(context) or [self.prefix_token_id]
            sampling = self._sampling(dict(wanted), context, repeat, self.max_length - len(ids))
            most = self.max_length - sampling.max_tokens
            self._cut(max(len(ids) - most, 0))
            prompts.append(ids[-most:])
            settings.append(sampling)
        # Longest first: what a pool must hold is known at once, and the time that is left is not underestimated.
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i]))
        stated = self.llm.compiled
        if stated is None:
            steps = sum(own.max_tokens for own in settings) / min(self.llm.max_batch, max(len(settings), 1))
            self.llm.compiled = steps >= WORTH_COMPILING and can_compile(self._device)
        try:
            for piece in self.llm.stream([prompts[i] for i in order], [settings[i] for i in order]):
                if piece.output is not None:
                    if piece.output.error:
                        raise RuntimeError(f"request {order[piece.index]}: {piece.output.error}")
                    yield [(order[piece.index], piece.output.text)]
        finally:
            self.llm.compiled = stated

    def _sampling(self, wanted: dict[str, Any], context: str, repeat: int, room: int) -> Sampling:
        given = dict(normalize_gen_kwargs(wanted, MAX_NEW))
        stops = [stop for stop in given.pop("until") if stop]
        end = self.tokenizer.decode([self.eot_token_id], True)
        asked = int(given.pop("max_gen_toks"))
        most = max(min(asked, max(room, self.max_length // 2)), 1)
        self.counts.shortened += asked > most
        drawn, temperature = given.pop("do_sample"), float(given.pop("temperature", 0.0))
        known = {name: given.pop(name) for name in _SETTINGS if name in given}
        for name, value in given.items():
            if name not in _IDLE or value != _IDLE[name]:
                raise ValueError(f"generation setting {name} = {value!r}: the engine has no such setting")
        own = hashlib.sha256(f"{self.seed} {repeat} {context}".encode()).digest()[:8]
        return Sampling(
            max_tokens=most, temperature=temperature if drawn else 0.0, stop=tuple(dict.fromkeys([*stops, end])),
            seed=int.from_bytes(own, "big"), **known,
        )  # fmt: skip

    # ---- both -----------------------------------------------------------------------------------------------

    def _answered(
        self,
        kind: str,
        asked: Sequence[tuple[Any, ...]],
        answer: Callable[[Sequence[tuple[Any, ...]], Sequence[int]], Iterator[list[tuple[int, Any]]]],
    ) -> list[Any]:
        """Answers to all requests, in order: the journal's, and what `answer` gives for the others, kept as it comes.
        A request that is asked again is answered again only where that may be another answer: `answer` is told for the
        which time each is asked."""
        times: Counter[str] = Counter()
        places: dict[str, tuple[int, int]] = {}  # by key: the request's place and for the which time it is asked
        keys = []
        for i, request in enumerate(asked):
            drawn = kind == "generate" and normalize_gen_kwargs(dict(request[1]), MAX_NEW)["do_sample"]
            plain = self.journal.key(kind, [*request, self.seed] if drawn else list(request))
            key = self.journal.key(kind, [*request, self.seed], times[plain]) if drawn else plain
            places.setdefault(key, (i, times[plain]))
            times[plain] += 1
            keys.append(key)
        known = {key: self.journal.get(key) for key in places}
        missing = [key for key, value in known.items() if value is None]
        self.counts.requests += len(known)
        self.counts.reused += len(known) - len(missing)
        with Progress(console=Console(stderr=True, quiet=self.quiet), transient=True) as bar:
            task = bar.add_task(kind, total=len(known), completed=len(known) - len(missing))
            for found in answer([asked[places[key][0]] for key in missing], [places[key][1] for key in missing]):
                fresh = [(missing[i], value) for i, value in found]
                self.journal.put(fresh)
                known.update(fresh)
                bar.advance(task, len(fresh))
        for key, request in zip(keys, asked):
            self.cache_hook.add_partial(kind, request, known[key])
        return [known[key] for key in keys]

    def _cut(self, tokens: int) -> None:
        self.counts.truncated += tokens > 0
        self.counts.truncated_tokens += tokens


def weights_of(folder: str | Path) -> str:
    """What tells one checkpoint from another without reading it whole: its weight files' names, sizes and times."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return json.dumps([[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files])


def told(counts: Counts) -> dict[str, int]:
    """The counts by name."""
    return {field.name: getattr(counts, field.name) for field in fields(counts)}
