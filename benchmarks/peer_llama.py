"""llama.cpp's worker: one job of `cpu.py`, through the C API that llama-cpp-python binds.

Every sequence has a stream of the cache to itself (`kv_unified` off), which is llama.cpp's fastest way to decode a
batch; streams beyond the first are copies of it, made by llama.cpp itself.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp
import measure
import numpy as np
from measure import Job

# A sequence's share of the cache is rounded up by llama.cpp; the shares are asked for in this unit already.
ROUND = 256

CACHE_TYPES = {"f32": 0, "f16": 1, "bf16": 30}  # ggml's numbers; the binding does not name the last

_silent = llama_cpp.llama_log_callback(lambda level, text, data: None)


class Engine:
    """A loaded model and a context for `sequences` of up to `length` tokens each."""

    def __init__(self, job: Job, sequences: int, length: int) -> None:
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(job.model.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {job.model}")
        self.vocab = job.vocab
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = sequences * -(-length // ROUND) * ROUND
        params.n_seq_max = sequences
        params.n_ubatch = job.variant.get("ubatch", 512)
        params.n_batch = max(2048, params.n_ubatch)
        params.n_threads = params.n_threads_batch = job.threads
        flash = job.variant.get("flash", False)
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.type_k = params.type_v = CACHE_TYPES[job.variant.get("cache", "f16")]
        params.kv_unified = False
        params.no_perf = True
        self.largest = int(params.n_batch)
        self.context: Any = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp refuses {job.variant}")
        self.memory: Any = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(self.largest, 0, 1)

    def decode(self, tokens: Sequence[int], places: Sequence[int], sequences: Sequence[int], wanted: int) -> None:
        """Runs the tokens, each at its place in its sequence; logits of the last `wanted`."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, place, sequence) in enumerate(zip(tokens, places, sequences)):
            batch.token[i], batch.pos[i] = token, place
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = i >= len(tokens) - wanted
        status = llama_cpp.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode: {status}")

    def prefill(self, tokens: Sequence[int]) -> None:
        """A prompt into sequence 0, the logits of its last token."""
        llama_cpp.llama_memory_clear(self.memory, False)
        for start in range(0, len(tokens), self.largest):
            part = tokens[start : start + self.largest]
            last = start + len(part) == len(tokens)
            self.decode(part, range(start, start + len(part)), [0] * len(part), int(last))

    def fill(self, job: Job) -> None:
        """A prompt of `context` tokens in every sequence."""
        self.prefill(measure.prompt(job))
        for other in range(1, job.batch):
            llama_cpp.llama_memory_seq_cp(self.memory, 0, other, -1, -1)

    def logits(self, rows: int) -> np.ndarray:
        """`[rows, vocab]` of the last call, llama.cpp's own memory."""
        found = llama_cpp.llama_get_logits(self.context)
        return np.ctypeslib.as_array(found, shape=(rows, self.vocab))


def main() -> None:
    job = Job.received()
    if job.kind == "logits":
        engine = Engine(job, job.batch, job.context + job.steps)
        engine.fill(job)
        rows = [engine.logits(1).copy()]
        for i, tokens in enumerate(measure.step_tokens(job)):
            engine.decode(tokens, [job.context + i] * job.batch, range(job.batch), job.batch)
            rows.append(engine.logits(job.batch).copy())
        np.save(job.out, np.concatenate(rows))
        measure.report({"system": llama_cpp.llama_print_system_info().decode(), "version": llama_cpp.__version__})
    elif job.kind == "prefill":
        engine, prompt = Engine(job, 1, job.context), measure.prompt(job)

        def call() -> int:
            engine.prefill(prompt)
            return int(engine.logits(1).argmax())

        measure.report({"rates": measure.call_rates(call, job.context, job)})
    elif job.kind == "decode":
        engine = Engine(job, job.batch, job.context + job.steps)
        engine.fill(job)
        sequences = range(job.batch)

        def step(i: int, tokens: list[int]) -> object:
            engine.decode(tokens, [job.context + i] * job.batch, sequences, job.batch)
            return engine.logits(job.batch).argmax(-1).tolist()

        def rewind() -> None:
            for sequence in sequences:
                llama_cpp.llama_memory_seq_rm(engine.memory, sequence, job.context, -1)

        measure.report({"rates": measure.decode_rates(step, rewind, job)})
    else:
        raise ValueError(f"llama.cpp has no cell {job.kind!r}")


if __name__ == "__main__":
    main()
