"""The engine on a CPU: many requests with long contexts beside the plain loop that came before it, and a prefix hit.

    python benchmarks/engine_cpu.py FOLDER [--old PATH] [--json FILE] [--quick]

measures the model of `reference_model.py`, which is written to FOLDER where it isn't there. PATH is a work tree of an
earlier commit, whose `abyssal.LLM` decodes the same prompts in turn with ours: `git worktree add PATH e02bc0e` is the
last one without pages. Each engine is a process that lives through all passes, so that passes alternate.

Greedy text of random weights soon repeats itself and meets fewer experts than other text would: alike for both.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import measure
import reference_model
import torch
from measure import MARK

from abyssal import LLM, Sampling, load
from abyssal.model.transformer import Transformer

NEW, OLD = "paged engine", "plain loop"


@dataclass(frozen=True)
class Work:
    """What a worker is to do, pass by pass."""

    model: str
    vocab: int
    threads: int
    compiled: bool
    requests: int
    context: int
    tokens: int  # generated a request
    old: bool

    def prompts(self, turn: int, count: int) -> list[list[int]]:
        return [measure.random_tokens(self.context, self.vocab, seed=1000 * turn + i) for i in range(count)]


# ---- a worker -----------------------------------------------------------------------------------------------------


def decoded(llm: LLM, work: Work, turn: int) -> dict[str, Any]:
    """All requests at once. Of ours the second call counts, which finds the prompts known: so that, as in the plain
    loop, all begin to decode together and every timed step is one of all."""
    prompts, sampling = work.prompts(turn, work.requests), Sampling(max_tokens=work.tokens, temperature=0)
    start = time.perf_counter()
    outputs = llm.generate(prompts, sampling)
    whole = time.perf_counter() - start
    texts = [o.tokens for o in outputs]
    if not work.old:
        again = [o.tokens for o in llm.generate(prompts, sampling)]
        if again != texts:
            raise RuntimeError("known prompts gave other texts than new ones")
    # The plain loop makes each text's first token of its prompt, before its first step.
    made = llm.totals.tokens - work.requests
    return {"rate": made / llm.totals.decode_seconds, "whole_seconds": whole, "texts": texts}


def first_token(llm: LLM, work: Work, turn: int) -> dict[str, float]:
    """Seconds from a prompt to its first token, of one that is new and of the same again."""
    prompt = work.prompts(turn + 500, 1)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        llm.generate(prompt, Sampling(max_tokens=1, temperature=0))
        seconds.append(time.perf_counter() - start)
    return {"cold": seconds[0], "hit": seconds[1]}


def worker(work: Work) -> None:
    """A pass for each number on the standard input."""
    torch.set_num_threads(work.threads)
    model: Transformer = load(work.model)
    llm = LLM(model, max_batch=work.requests, compiled=work.compiled)
    # A compiled engine is made for one number of requests.
    single = LLM(model, max_batch=work.requests, compiled=False)
    for line in sys.stdin:
        turn = int(line)
        found: dict[str, Any] = decoded(llm, work, turn)
        if not work.old:
            found |= first_token(single, work, turn)
        measure.report(found)


# ---- all of them --------------------------------------------------------------------------------------------------


class Worker:
    """The process of one engine."""

    def __init__(self, work: Work, root: Path | None, cache: Path) -> None:
        env = os.environ | {"OMP_NUM_THREADS": str(work.threads), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
        if root is not None:
            env["PYTHONPATH"] = str(root)
        command = [sys.executable, __file__, "--worker", json.dumps(vars(work))]
        self._process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def run(self, turn: int) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(turn, file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith(MARK):
                found: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return found
        raise RuntimeError(f"a worker ended with status {self._process.wait()}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def run(options: argparse.Namespace, compiled: bool) -> dict[str, Any]:
    """Passes of both engines in turn; the first of each compiles, and doesn't count."""
    quick, config = options.quick, reference_model.config(options.quick)
    model = options.folder / f"model-{options.dtype}"
    if not (model / "config.json").is_file():
        reference_model.write(options.folder, quick)
    requests, context, tokens = (8, 200, 8) if quick else (options.requests, options.context, options.tokens)
    engines = {NEW: None} | ({OLD: options.old.resolve()} if options.old else {})
    workers = {
        name: Worker(
            Work(str(model), config.vocab_size, options.threads, compiled, requests, context, tokens, name == OLD),
            root, options.folder / "compiled" / name.split()[0],
        )
        for name, root in engines.items()
    }  # fmt: skip
    passes: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for turn in range(options.passes + 1):
        texts = []
        for name, own in workers.items():
            found = own.run(turn)
            texts.append(found.pop("texts"))
            if turn:
                passes[name].append(found)
                print(f"{name}: {', '.join(f'{key} {value:.4g}' for key, value in found.items())}", flush=True)
        if any(other != texts[0] for other in texts):
            print("the engines' texts differ", flush=True)
    for own in workers.values():
        own.close()
    ours, theirs = passes[NEW], passes.get(OLD, [])
    cold, hit = (median(p[key] for p in ours) for key in ("cold", "hit"))
    return {
        "compiled": compiled,
        "dtype": options.dtype,
        "threads": options.threads,
        "requests": requests,
        "context": context,
        "tokens": tokens,
        "decode_tokens_per_second": {name: median(p["rate"] for p in own) for name, own in passes.items()},
        "whole_seconds": {name: median(p["whole_seconds"] for p in own) for name, own in passes.items()},
        "decode_ratio": median(a["rate"] / b["rate"] for a, b in zip(ours, theirs)) if theirs else None,
        "first_token_cold_seconds": cold,
        "first_token_hit_seconds": hit,
        "hit_over_cold": hit / cold,
        "passes": passes,
    }


def table(results: list[dict[str, Any]]) -> str:
    lines = ["| step | engine | decoding, tokens/s | prompts and all, s |", "|---|---|---|---|"]
    for r in results:
        for name, rate in r["decode_tokens_per_second"].items():
            step = "compiled" if r["compiled"] else "eager"
            lines.append(f"| {step} | {name} | {rate:.1f} | {r['whole_seconds'][name]:.2f} |")
        if r["decode_ratio"] is not None:
            lines.append(f"| {step} | ratio of passes, median | {r['decode_ratio']:.3f} | |")
    r = results[0]
    lines += [
        "",
        f"Time to first token of {r['context']} tokens: {r['first_token_cold_seconds']:.3f} s, and "
        f"{r['first_token_hit_seconds']:.3f} s of a known prompt: {r['hit_over_cold']:.1%}.",
    ]
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return worker(Work(**json.loads(sys.argv[2])))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the model is, or is written")
    parser.add_argument("--old", type=Path, help="a work tree of an earlier commit")
    parser.add_argument("--json", type=Path, help="where the numbers are written")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--passes", type=int, default=3, help="of each engine, in turn")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--context", type=int, default=4096, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="generated a request")
    parser.add_argument("--dtype", default="float32", choices=reference_model.DTYPES)
    parser.add_argument("--step", default="both", choices=("compiled", "eager", "both"))
    parser.add_argument("--quick", action="store_true", help="a model of two layers, to try this out")
    options = parser.parse_args()
    modes = {"compiled": [True], "eager": [False], "both": [True, False]}[options.step]
    results = [run(options, compiled) for compiled in modes]
    print(table(results))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
