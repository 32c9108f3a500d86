"""`LLM`: the engine's offline face. Prompts of any lengths in, text out as it becomes certain."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from abyssal.costs import mha_cache_bytes
from abyssal.data.tokenizer import Tokenizer
from abyssal.engine.compiled import can_compile
from abyssal.engine.engine import Engine
from abyssal.engine.metrics import Metrics
from abyssal.engine.options import Options, check, most_rows
from abyssal.engine.request import Output, Piece, Request, Totals
from abyssal.engine.room import free_bytes, page_bytes, workspace_bytes
from abyssal.engine.runner import PAGE
from abyssal.engine.sampling import Sampling
from abyssal.model.transformer import Transformer
from abyssal.ops.startup import announced

WORTH_COMPILING = 2048  # generated tokens from which compiling the decoding step pays for itself

Prompt = str | Sequence[int]


class LLM:
    """A model, its tokenizer and a page pool of latents.

    `model` is a public-format folder, a hub id, or a Transformer. `max_batch` sequences are decoded at once; each may
    hold `max_context` tokens (None: the model's). `drafts` is how many tokens the MTP modules draft a step (None: one
    for each module); with `adapt`, only where that is faster. `cache_dtype` is that of the latents: None for the
    weights', torch.uint8 for 656 bytes of FP8. The pool has `cache_bytes` (None: what a call needs on a CPU, and on a
    GPU what is free). A step takes `step_tokens` at most, of prompts and of decoding. `deterministic`: greedy output is
    the same to the bit whatever else is decoded, at a cost. `compiled` None compiles the decoding step on a CPU with a
    C++ compiler where a call may generate WORTH_COMPILING tokens or more. `say` is told of that (None: the standard
    error).
    """

    def __init__(
        self,
        model: str | Path | Transformer,
        *,
        tokenizer: Tokenizer | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        max_batch: int = 8,
        max_context: int | None = None,
        drafts: int | None = None,
        adapt: bool = True,
        cache_dtype: torch.dtype | None = None,
        cache_bytes: int | None = None,
        step_tokens: int | None = None,
        prefix_cache: bool = True,
        deterministic: bool = False,
        compiled: bool | None = None,
        grammar_bytes: int = 65536,
        grammar_seconds: float = 2.0,
        say: Callable[[str], None] | None = None,
    ) -> None:
        if isinstance(model, Transformer):
            self.model, self.tokenizer = model, tokenizer
        else:
            from abyssal.checkpoint import load, local_folder

            folder = local_folder(model)
            self.model = load(folder, dtype=dtype, device=device)
            self.tokenizer = tokenizer or Tokenizer.load(folder)
        self.model.eval().requires_grad_(False).join()
        longest = self.model.config.max_position_embeddings
        if max_batch < 1:
            raise ValueError(f"max_batch: expected 1 or more, got {max_batch}")
        if max_context is not None and not 1 <= max_context <= longest:
            raise ValueError(f"max_context: expected 1 to the model's {longest}, got {max_context}")
        modules = len(self.model.mtp)
        self.drafts = modules if drafts is None else drafts
        if self.drafts < 0 or (self.drafts and not modules):
            raise ValueError(
                f"drafts: expected 0{' or more' if modules else ', as there is no MTP module'}, got {drafts}"
            )
        self.max_batch, self.max_context, self.compiled = max_batch, max_context, compiled
        self.cache_bytes = cache_bytes
        cuda = self.model.embed.weight.device.type == "cuda"
        self.options = Options(
            pages=2, running=max_batch, context=max_context or longest, drafts=self.drafts, adapt=adapt,
            step_tokens=step_tokens or (16384 if cuda else 2048), cache_dtype=cache_dtype, prefix_cache=prefix_cache,
            deterministic=deterministic, grammar_bytes=grammar_bytes, grammar_seconds=grammar_seconds,
        )  # fmt: skip
        self.totals = Totals()  # of the last call
        self.engine: Engine | None = None
        self._say = say or (lambda text: print(text, file=sys.stderr))

    # ---- the face -----------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        progress: bool = False,
    ) -> list[Output]:
        """One Output a prompt and sample, in order. A prompt is text, or token ids. `progress` shows a bar on the
        standard error. Raises ValueError naming a prompt that is empty, too long, or holds an id that the model lacks,
        before any work is done."""
        requests = self._requests(prompts, sampling)
        pieces = self._run(requests)
        if progress:
            from abyssal.engine.progress import shown

            pieces = shown(pieces, sum(r.sampling.n for r in requests), lambda: self.totals)
        done = {(p.index, p.sample): p.output for p in pieces if p.output is not None}
        return [done[key] for key in sorted(done)]

    def stream(
        self, prompts: Prompt | Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None = None
    ) -> Iterator[Piece]:
        """Text as it becomes certain, of all requests in turn; a sample's last Piece carries its Output."""
        return self._run(self._requests(prompts, sampling))

    def chat(self, messages: list[dict[str, str]], sampling: Sampling | None = None) -> Iterator[Piece]:
        """The answer to a conversation, by the model's own chat template."""
        if self.tokenizer is None:
            raise ValueError("tokenizer: a chat needs one")
        prompt = self.tokenizer.encode(self.tokenizer.chat(messages), special=True)
        return self.stream([prompt], sampling)

    # ---- a call -------------------------------------------------------------------------------------------

    def _run(self, requests: list[Request]) -> Iterator[Piece]:
        if self.engine is not None and self.engine.busy:  # requests of two calls would be taken for each other
            raise RuntimeError("LLM: a stream of this model is not over; read it to its end, or close it, first")
        engine = self._prepare(requests)
        before = replace(engine.metrics, drafted=list(engine.metrics.drafted), accepted=list(engine.metrics.accepted))
        self.totals = totals = Totals(cache_bytes=engine.runner.cache.bytes)
        totals.mha_cache_bytes = mha_cache_bytes(
            self.model.config, engine.options.pages * PAGE, self.model.embed.weight.element_size(),
            mtp=engine.runner.modules > 0,
        )  # fmt: skip
        try:
            for request in requests:
                engine.add(request)
            while engine.busy:
                pieces = engine.step()
                _count(totals, engine.metrics, before)
                yield from pieces
        finally:  # also where a request was refused, or nobody wants the rest
            for request in requests:
                engine.abort(request.id)
            while engine.busy:
                engine.step()

    def _requests(
        self, prompts: Prompt | Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None
    ) -> list[Request]:
        several: Sequence[Prompt]
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            several = [prompts]  # type: ignore[list-item]
        else:
            several = prompts  # type: ignore[assignment]
        settings = [sampling or Sampling()] * len(several) if not isinstance(sampling, Sequence) else list(sampling)
        if len(settings) != len(several):
            raise ValueError(f"sampling: expected one or {len(several)}, got {len(settings)}")
        now = time.monotonic()
        requests = []
        for i, (prompt, own) in enumerate(zip(several, settings)):
            ids = self.encode(prompt) if isinstance(prompt, str) else [int(id) for id in prompt]
            requests.append(Request(i, tuple(ids), own, arrived=now + i * 1e-9))
            try:
                check(requests[-1], self.model, self.options, self.tokenizer)
            except ValueError as error:
                field, _, rest = str(error).partition(":")
                where = f"prompt {i}" if field == "prompt" else f"sampling {i}: {field}"
                raise ValueError(f"{where}:{rest}") from None
        return requests

    def encode(self, text: str) -> list[int]:
        """A text prompt's ids, with the id that begins a text where the checkpoint asks for it."""
        if self.tokenizer is None:
            raise ValueError("tokenizer: text prompts need one; give token ids instead")
        ids = self.tokenizer.encode(text)
        starts = self.tokenizer.bos_id if self.tokenizer.adds_bos else None
        return ids if starts is None else [starts, *ids]

    def ends(self) -> frozenset[int]:
        """The ids that end a text: the tokenizer's, and the configuration's `eos_token_id`."""
        stated = json.loads(self.model.config.source).get("eos_token_id")
        ends = stated if isinstance(stated, list) else [stated]
        own = self.tokenizer.eos_id if self.tokenizer else None
        return frozenset(id for id in [*ends, own] if id is not None)

    def _prepare(self, requests: list[Request]) -> Engine:
        """The engine, with a pool that these requests fit in: the one of the call before where it will do."""
        texts = sum(r.sampling.n for r in requests)
        most = sum(r.sampling.max_tokens * r.sampling.n for r in requests)
        compiled = self.compiled
        if compiled is None:
            compiled = most >= WORTH_COMPILING and can_compile(self.model.embed.weight.device)
        pages = self._pages(requests)
        old = self.engine
        if old is not None:
            large = old.options.pages >= pages or self.cache_bytes is not None
            alike = old.options.compiled == compiled and old.ends == self.ends()
            # A compiled step is for one number of sequences.
            if alike and large and (not compiled or old.options.running == min(self.max_batch, max(texts, 1))):
                return old
            pages = max(pages, old.options.pages)
        self.engine = old = None  # frees the old pool before the new one is made
        return self.start(pages, min(self.max_batch, max(texts, 1)) if compiled else self.max_batch, compiled)

    def start(self, pages: int | None = None, running: int | None = None, compiled: bool = False) -> Engine:
        """Makes the engine, before a first request does: with a pool of `pages` (None: of `cache_bytes`, or what is
        free) for up to `running` sequences at once (None: `max_batch`)."""
        if pages is None:
            pages = self._free_pages()
        options = replace(self.options, pages=pages, running=running or self.max_batch, compiled=compiled)
        self.engine = Engine(self.model, self.tokenizer, options, self.ends(), self._say)
        if self.engine.runner.device.type == "cuda":
            with announced(self._say):
                self.engine.warm()
        return self.engine

    def _pages(self, requests: list[Request]) -> int:
        if self.cache_bytes is not None or self.model.embed.weight.device.type == "cuda":
            return self.engine.options.pages if self.engine is not None else self._free_pages()
        need = max((len(r.prompt) + r.sampling.max_tokens for r in requests), default=1)
        each = -(-most_rows(max(need, self.max_context or 0), self.drafts) // PAGE)
        return 1 + each * min(self.max_batch, max(sum(r.sampling.n for r in requests), 1))

    def _free_pages(self) -> int:
        """A pool of `cache_bytes`, or of what is free beside what a step needs."""
        room = self.cache_bytes
        if room is None:
            room = free_bytes(self.model.embed.weight.device) - workspace_bytes(self.model, self.options)
        pages = room // page_bytes(self.model, min(len(self.model.mtp), self.drafts), self.options.cache_dtype, PAGE)
        if pages < 2:
            raise ValueError(f"cache_bytes: {room:,} bytes are less than two pages")
        # No sequence needs more, however many run.
        most = 1 + self.max_batch * -(-most_rows(self.options.context, self.drafts) // PAGE)
        return min(pages, 4 * most)


def _count(totals: Totals, now: Metrics, before: Metrics) -> None:
    """What a call has done, from what the engine had counted before it and has now."""
    totals.tokens = now.generated_tokens - before.generated_tokens
    totals.prompt_tokens = now.prompt_tokens - before.prompt_tokens
    totals.cached_tokens = now.cached_tokens - before.cached_tokens
    totals.decode_seconds = now.decode_seconds - before.decode_seconds
    totals.decoded_tokens = now.decoded_tokens - before.decoded_tokens
    totals.prefill_seconds = now.step_seconds - before.step_seconds - totals.decode_seconds
    totals.steps = now.steps - before.steps
    past = [*before.drafted, *[0] * len(now.drafted)], [*before.accepted, *[0] * len(now.accepted)]
    totals.drafted_at = [n - b for n, b in zip(now.drafted, past[0])]
    totals.accepted_at = [n - b for n, b in zip(now.accepted, past[1])]
    totals.drafted, totals.accepted = sum(totals.drafted_at), sum(totals.accepted_at)
