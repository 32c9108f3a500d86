"""The model over the page pool: prompts in chunks, and decoding steps whose outcome the host asks for later.

Nothing here waits for the device (`pending.py` does). Where it runs decides how a step is run: captured as a CUDA
graph, compiled for a CPU (`compiled.py`), or operation by operation.
"""

from collections.abc import Callable
from collections.abc import Sequence as Several
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from abyssal.engine.compiled import Compiled
from abyssal.engine.decode import Decoded, Decoder, Kind
from abyssal.engine.graphs import Graphs, ladder
from abyssal.engine.options import most_rows
from abyssal.engine.pending import Lap, Pending
from abyssal.engine.prefill import Chunk, Prefill, PromptLogprobs
from abyssal.engine.slots import Slots, upload
from abyssal.model.cache import Cache
from abyssal.model.experts import MoE
from abyssal.model.packing import Packing
from abyssal.model.positions import rotary
from abyssal.model.transformer import Transformer
from abyssal.ops.latent_rows import row_bytes

PAGE = 64  # tokens


class Runner:
    """A model, its page pool, and the slots of up to `running` sequences of up to `context` tokens."""

    def __init__(
        self,
        model: Transformer,
        *,
        pages: int,
        running: int,
        context: int,
        drafts: int,
        cache_dtype: torch.dtype | None = None,
        allowed: int | None = None,
        workspace: int = 1 << 16,
        deterministic: bool = False,
        compiled: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        config, weight = model.config, model.embed.weight
        self.model, self.device, self.running, self.drafts = model, weight.device, running, drafts
        self.modules = min(len(model.mtp), drafts)
        self.cache = Cache.allocate(
            leaves(model, self.modules, cache_dtype), pages, PAGE, cache_dtype or weight.dtype, weight.device
        )
        self.layers = [i for i, block in enumerate(model.layers) if isinstance(block.ffn, MoE)]
        columns = -(-most_rows(context, drafts) // PAGE)
        load = (len(self.layers), config.n_routed_experts or 0)
        self.slots = Slots(
            running, columns, drafts, self.modules, config.hidden_size, config.vocab_size, load, weight.dtype,
            weight.device,
        )  # fmt: skip
        self.compiled, self._say = compiled, say
        self._parts: dict[tuple[int, int, int], Compiled] = {}
        self._steps: dict[Kind, Compiled] = {}
        about = (model.logits, self.modules, PAGE, allowed, deterministic)
        self.decoder = Decoder(self.slots, self._main, self._further, *about)
        self._inside = Decoder(self.slots, self._whole, self._module, *about)  # what is compiled as one
        self.prefill = Prefill(
            self.slots, self._module, model.logits, self.modules, PAGE, workspace, allowed,
            running * (1 + drafts) if deterministic else 0,
        )  # fmt: skip
        # What reads lengths on the host cannot be captured: the ladder's rungs, and coupled RoPE.
        captures = self.device.type == "cuda" and config.attention == "mla" and config.position != "rope"
        self.words = -(-config.vocab_size // 32)
        self.graphs = Graphs(self.decoder, running, self.words) if captures else None
        self.fixed = deterministic or compiled  # every step has as many sequences as there are slots

    # ---- what the model is asked for ----------------------------------------------------------------------

    def _run(self, tokens: Tensor, packing: Packing, path: str | None = None) -> tuple[Tensor, Tensor]:
        states, routings = self.model.hidden(tokens, packing, self.cache, path)
        picks = torch.stack([r.indices for r in routings]) if routings else tokens.new_zeros(0, tokens.shape[0], 1)
        return states, picks

    def _whole(self, tokens: Tensor, packing: Packing) -> tuple[Tensor, Tensor, Tensor]:
        states, picks = self._run(tokens, packing)
        return states, self.model.logits(states), picks

    def _main(self, tokens: Tensor, packing: Packing) -> tuple[Tensor, Tensor, Tensor]:
        if not self.compiled:
            return self._whole(tokens, packing)
        return self._part((0, packing.sequences, packing.max_len), self._whole)(tokens, packing)

    def _further(
        self, depth: int, states: Tensor, ahead: Tensor, packing: Packing, path: str | None = None
    ) -> Tensor:  # fmt: skip
        if not self.compiled:
            return self._module(depth, states, ahead, packing)
        return self._part((depth, packing.sequences, packing.max_len), self._module)(depth, states, ahead, packing)

    def _part(self, key: tuple[int, int, int], part: Callable[..., Any]) -> Compiled:
        if key not in self._parts:
            self._parts[key] = Compiled(part, self._say)
        return self._parts[key]

    def _step(self, order: Tensor, kind: Kind, masks: Tensor | None) -> Decoded:
        """A step without CUDA graphs. Where all are greedy and nothing further is asked for it is compiled as one; of
        any other the model's parts are."""
        if not self.compiled or kind != Kind(kind.sequences, kind.width, kind.drafts):
            return self.decoder.step(order, kind, masks)
        if kind not in self._steps:
            self._inside.prepare(kind)
            self._steps[kind] = Compiled(self._inside.step, self._say)
        return self._steps[kind](order, kind)

    def _module(
        self, depth: int, states: Tensor, ahead: Tensor, packing: Packing, path: str | None = None
    ) -> Tensor:  # fmt: skip
        layer = self.cache.layers[self.model.config.num_hidden_layers + depth - 1]
        embedded, angles = self.model.enter(ahead, packing), rotary(self.model.config, packing.positions)
        return self.model.mtp[depth - 1](states, embedded, angles, packing, layer, path)[0]

    # ---- what the engine asks for -------------------------------------------------------------------------

    @torch.inference_mode()
    def chunks(self, chunks: Several[Chunk], lap: Lap) -> dict[int, PromptLogprobs]:
        """A pass over prompts alone."""
        ids, packing, path = self.prefill.prepare(chunks)
        lap.begin()
        return self.prefill.finish(chunks, *self._run(ids, packing, path), path)

    @torch.inference_mode()
    def mixed(
        self, chunks: Several[Chunk], slots: Several[int], kind: Kind, lap: Lap, masks: NDArray[np.int32] | None = None
    ) -> tuple[Pending, dict[int, PromptLogprobs]]:
        """Prompts and a decoding step in one pass: every weight is read once for both. The prompts come first, so that
        the last token of one that ends here may be decoded with them: it attends to the rows that they have written."""
        ids, packing, path = self.prefill.prepare(chunks)
        said: dict[int, PromptLogprobs] = {}

        def main(tokens: Tensor, own: Packing) -> tuple[Tensor, Tensor, Tensor]:
            states, picks = self._run(torch.cat((ids, tokens)), Packing.joined([packing, own]), path)
            count = ids.shape[0]
            # Before anything is drafted: the modules attend to their rows of the prompts, too.
            said.update(self.prefill.finish(chunks, states[:count], picks[:, :count], path))
            return states[count:], self.model.logits(states[count:]), picks[:, count:]

        order, bits = self._order(slots, len(slots), masks)
        lap.begin()
        decoded = self.decoder.step(order, kind._replace(sequences=len(slots)), bits, main)
        return Pending(decoded, len(slots), kind, self.device.type == "cuda"), said

    @property
    def mixes(self) -> bool:
        """Whether `mixed` may be used: not where a step must have one shape."""
        return not self.fixed

    @torch.inference_mode()
    def step(self, slots: Several[int], kind: Kind, lap: Lap, masks: NDArray[np.int32] | None = None) -> Pending:
        """One decoding step of these slots; `kind.sequences` is filled in here. `masks [S, width, words]` int32."""
        size = len(slots)
        if self.graphs is not None:
            size = self.graphs.rung(size)
        if self.fixed:
            size = self.running
        kind = kind._replace(sequences=size)
        order, bits = self._order(slots, size, masks)
        run = self.graphs or self._step
        lap.begin()
        return Pending(run(order, kind, bits), len(slots), kind, self.device.type == "cuda")

    def _order(
        self, slots: Several[int], size: int, masks: NDArray[np.int32] | None
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Slots filled up to `size` with the idle one, and their masks, on the device."""
        order = upload([*slots, *[self.running] * (size - len(slots))], torch.int64, self.device)
        if masks is None:
            return order, None
        whole = np.full((size, *masks.shape[1:]), -1, dtype=np.int32)
        whole[: len(slots)] = masks
        return order, upload(whole, torch.int32, self.device)

    @torch.inference_mode()
    def copy_pages(self, pairs: Several[tuple[int, int]]) -> None:
        """All rows of each first page into its second."""
        if not pairs:
            return
        at = upload(pairs, torch.int64, self.device)
        row = torch.arange(PAGE, device=self.device)
        source, target = ((at[:, i : i + 1] * PAGE + row).flatten() for i in (0, 1))
        for layer in self.cache.layers:
            for rows in layer.values():
                rows.index_copy_(0, target, rows.index_select(0, source))

    @torch.inference_mode()
    def clear(self, pages: Several[int]) -> None:
        """Zeroes pages whose sequence failed: what is not a number there would reach the next sequence, since
        attention multiplies rows past a sequence's end by 0."""
        at = upload([page * PAGE + i for page in pages for i in range(PAGE)], torch.int64, self.device)
        for layer in self.cache.layers:
            for rows in layer.values():
                rows.index_fill_(0, at, 0)

    def loads(self, slot: int) -> list[list[int]]:
        """Tokens that each layer with experts sent to each, of the sequence in a slot. Waits for the device."""
        return self.slots.load[slot].tolist()

    def warm(self, kinds: Several[Kind], prompt: int) -> None:
        """A prompt of `prompt` tokens in the scratch page's place and every kind of step: what is compiled when it is
        first met should not be met within a request."""
        tokens = [0] * (min(prompt, PAGE) + self.modules + 1)
        last = len(tokens) - self.modules - 1
        for start in (0, last - 1):  # without and with a context
            self.chunks([Chunk(self.running, tokens, [0], start, last, 0)], Lap(self.device))
        with torch.inference_mode():
            if self.graphs is not None:
                self.graphs.warm(kinds)
        self.slots.load.zero_()
        self.clear([0])

    def kinds(self, width: int, drafts: int) -> list[Kind]:
        """The greedy and the sampled step of every number of sequences."""
        rungs = ladder(self.running) if not self.fixed else [self.running]
        return [Kind(rung, width, drafts, greedy) for rung in rungs for greedy in (True, False)]


def leaves(
    model: Transformer, modules: int, cache_dtype: torch.dtype | None
) -> list[dict[str, tuple[int, torch.dtype | None]]]:
    """What a token leaves behind in every layer that the engine runs; latents packed to bytes where uint8 is asked.

    Raises ValueError where this attention's rows can't be packed.
    """
    config = model.config
    kept = model.leaves()[: config.num_hidden_layers + modules]
    if cache_dtype != torch.uint8:
        return kept
    if config.attention != "mla":
        raise ValueError(f"cache_dtype: FP8 rows are of latents, and attention is {config.attention!r}")
    packed = row_bytes(config.kv_lora_rank, config.qk_rope_head_dim)
    return [{"latent": (packed, torch.uint8)} for _ in kept]
