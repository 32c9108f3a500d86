"""`LLM`: the engine's face. Prompts of any lengths in, text out as it becomes certain."""

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from abyssal.costs import mha_cache_bytes
from abyssal.data.tokenizer import Tokenizer
from abyssal.engine.compiled import can_compile
from abyssal.engine.request import Output, Piece, Request, Totals
from abyssal.engine.runner import Runner
from abyssal.engine.sampling import Sampling, verify
from abyssal.engine.speculation import Drafter, Speculated
from abyssal.model.transformer import Transformer
from abyssal.ops.startup import announced

ROUND_CONTEXT = 256  # a cache's pages are a multiple of this long, so that few lengths are ever compiled for
WORTH_COMPILING = 2048  # generated tokens from which compiling the decoding step pays for itself

Prompt = str | Sequence[int]


class LLM:
    """A model, its tokenizer and a latent cache.

    `model` is a public-format folder, a hub id, or a Transformer. `max_batch` sequences are decoded at once; each may
    hold `max_context` tokens (None: as many as a call needs, at most the model's). `drafts` is how many tokens the
    MTP modules draft a step (None: one for each module). `compiled` None compiles the decoding step on a CPU with a
    C++ compiler where a call may generate WORTH_COMPILING tokens or more. `say` is told when that happens (None: the
    standard error).
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
        compiled: bool | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        if isinstance(model, Transformer):
            self.model, self.tokenizer = model, tokenizer
        else:
            from abyssal.checkpoint import load, local_folder

            folder = local_folder(model)
            self.model = load(folder, dtype=dtype, device=device)
            self.tokenizer = tokenizer or Tokenizer.load(folder)
        self.model.eval().requires_grad_(False)
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
        self.totals = Totals()  # of the last call
        self._say = say or (lambda text: print(text, file=sys.stderr))
        self._runner: Runner | None = None

    # ---- the face -----------------------------------------------------------------------------------------

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None = None
    ) -> list[Output]:
        """One Output a prompt, in order. A prompt is text, or token ids. Raises ValueError naming a prompt that is
        empty, too long, or holds an id that the model lacks, before any work is done."""
        done = {p.index: p.output for p in self.stream(prompts, sampling) if p.output is not None}
        return [done[i] for i in range(len(done))]

    def stream(
        self, prompts: Prompt | Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None = None
    ) -> Iterator[Piece]:
        """Text as it becomes certain, of all requests in turn; a request's last Piece carries its Output."""
        requests = self._requests(prompts, sampling)
        return self._run(requests)

    def chat(self, messages: list[dict[str, str]], sampling: Sampling | None = None) -> Iterator[Piece]:
        """The answer to a conversation, by the model's own chat template."""
        if self.tokenizer is None:
            raise ValueError("tokenizer: a chat needs one")
        prompt = self.tokenizer.encode(self.tokenizer.chat(messages), special=True)
        return self.stream([prompt], sampling)

    # ---- the loop -----------------------------------------------------------------------------------------

    def _run(self, requests: list[Request]) -> Iterator[Piece]:
        runner = self._prepare(requests)
        drafter = Drafter(runner, self.drafts)
        waiting, free = deque(requests), list(range(self._pages(requests)))
        active: list[Speculated] = []
        while waiting or active:
            while waiting and free:
                s = Speculated(waiting.popleft(), free.pop(0))
                yield from self._admit(runner, drafter, s)
                active.append(s)
            running = [s for s in active if s.request.finish is None]
            if running:
                yield from self._step(runner, drafter, running)
            for s in active:
                if s.request.finish is not None:
                    if s.request.finish == "error":
                        runner.clear(s.page)
                    free.append(s.page)
                    yield Piece(s.request.index, "", s.request.output())
            active = [s for s in active if s.request.finish is None]

    def _admit(self, runner: Runner, drafter: Drafter, s: Speculated) -> Iterator[Piece]:
        """Takes in a prompt; its first token comes of it."""
        started = time.perf_counter()
        request = s.request
        states, logits = runner.prefill(s.page, request.prompt)
        self.totals.prompt_tokens += len(request.prompt)
        text = self._take(request, logits[None])
        if self._speculates(request) and request.finish is None:
            drafter.draft([s], [states], [0])
        self.totals.prefill_seconds += time.perf_counter() - started
        if text:
            yield Piece(request.index, text)

    def _step(self, runner: Runner, drafter: Drafter, running: list[Speculated]) -> Iterator[Piece]:
        """One step of the main model for all: verifies each request's drafts and drafts anew."""
        started = time.perf_counter()
        before = [len(s.request.tokens) - 1 for s in running]
        rows = [[s.request.tokens[-1], *s.request.drafts] for s in running]
        pages = [s.page for s in running]
        states, logits = runner.decode(pages, rows, before)
        texts = []
        for s, row_logits, row in zip(running, logits, rows):
            texts.append(self._take(s.request, row_logits[: len(row)]))
        self.totals.steps += 1
        further = [i for i, s in enumerate(running) if s.request.finish is None and self._speculates(s.request)]
        if further:
            drafter.draft([running[i] for i in further], [states[i] for i in further], [before[i] for i in further])
        self.totals.decode_seconds += time.perf_counter() - started
        for s, text in zip(running, texts):
            if text:
                yield Piece(s.request.index, text)

    def _take(self, request: Request, logits: Tensor) -> str:
        """Accepts what holds of a request's drafts and one token more; returns the text that is now certain.

        A failure here, such as logits that are not finite, ends this request and no other.
        """
        drafts = request.drafts
        try:
            accepted, token = self._verify(request, logits.cpu())
        except (ValueError, RuntimeError) as error:
            request.fail(str(error))
            return ""
        self._count(len(drafts), accepted)
        text, request.drafts = "", []
        for row, id in enumerate([*drafts[:accepted], token]):
            text += request.push(id, logits[row])
            self.totals.tokens += 1
            if request.finish is not None:
                break
        return text

    def _verify(self, request: Request, logits: Tensor) -> tuple[int, int]:
        drafts = request.drafts
        if request.sampling.greedy and not request.sampling.penalised:
            if not bool(logits[:, : request.allowed].isfinite().all()):
                raise ValueError("the model's logits are not finite")
            best = logits[:, : request.allowed].argmax(-1).tolist()
            accepted = 0
            while accepted < len(drafts) and drafts[accepted] == best[accepted]:
                accepted += 1
            return accepted, best[accepted]
        probs = request.probabilities(logits, drafts)
        draft_probs = torch.stack(request.draft_probs) if drafts else probs[:0]
        return verify(torch.tensor(drafts, dtype=torch.int64), draft_probs, probs, request.generator)

    def _count(self, drafted: int, accepted: int) -> None:
        t = self.totals
        for counts, upto in ((t.drafted_at, drafted), (t.accepted_at, accepted)):
            counts.extend([0] * (drafted - len(counts)))
            for i in range(upto):
                counts[i] += 1
        t.drafted += drafted
        t.accepted += accepted

    def _speculates(self, request: Request) -> bool:
        return self.drafts > 0 and request.sampling.speculate is not False

    # ---- before it ----------------------------------------------------------------------------------------

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
        config = self.model.config
        room = self.max_context or config.max_position_embeddings
        requests = []
        for i, (prompt, own) in enumerate(zip(several, settings)):
            ids = self._encode(prompt) if isinstance(prompt, str) else [int(id) for id in prompt]
            if not ids:
                raise ValueError(f"prompt {i}: is empty; expected text or token ids")
            if min(ids) < 0 or max(ids) >= config.vocab_size:
                raise ValueError(f"prompt {i}: expected token ids from 0 to {config.vocab_size - 1}")
            if len(ids) + own.max_tokens > room:
                raise ValueError(
                    f"prompt {i}: {len(ids)} tokens and max_tokens {own.max_tokens} exceed the context of {room}"
                )
            if own.speculate and not self.drafts:
                raise ValueError(f"sampling {i}: speculate is True, but the model has no MTP module to draft with")
            requests.append(Request(i, ids, own, self.tokenizer, self._ends()))
        return requests

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise ValueError("tokenizer: text prompts need one; give token ids instead")
        ids = self.tokenizer.encode(text)
        starts = self.tokenizer.bos_id if self.tokenizer.adds_bos else None
        return ids if starts is None else [starts, *ids]

    def _ends(self) -> frozenset[int]:
        """The ids that end a text: the tokenizer's, and the configuration's `eos_token_id`."""
        stated = json.loads(self.model.config.source).get("eos_token_id")
        ends = stated if isinstance(stated, list) else [stated]
        own = self.tokenizer.eos_id if self.tokenizer else None
        return frozenset(id for id in [*ends, own] if id is not None)

    def _pages(self, requests: list[Request]) -> int:
        return min(self.max_batch, max(len(requests), 1))

    def _prepare(self, requests: list[Request]) -> Runner:
        """The cache that these requests need: kept from the call before where it is large enough."""
        # The last step may write as many rows past a request's end as it verifies drafts.
        need = max((len(r.prompt) + r.sampling.max_tokens for r in requests), default=1) + self.drafts + 1
        size = -(-max(need, self.max_context or 0) // ROUND_CONTEXT) * ROUND_CONTEXT
        pages = self._pages(requests)
        compiled = self.compiled
        if compiled is None:
            most = sum(r.sampling.max_tokens for r in requests)
            compiled = most >= WORTH_COMPILING and can_compile(self.model.embed.weight.device)
        old = self._runner
        if old is None or old.pages != pages or old.cache.page_size < size or old.compiled != compiled:
            self._runner = None  # frees the old cache before the new one is made
            self._runner = Runner(self.model, pages, size, 1 + self.drafts, compiled, self._say)
            if self._runner.device.type == "cuda":
                with announced(self._say):
                    self._runner.warm()
        runner = self._runner
        assert runner is not None
        self.totals = Totals(cache_bytes=runner.cache.bytes)
        itemsize = self.model.embed.weight.element_size()
        mtp = bool(self.model.mtp)
        self.totals.mha_cache_bytes = mha_cache_bytes(
            self.model.config, runner.pages * runner.cache.page_size, itemsize, mtp=mtp
        )
        return runner
