"""Speed and memory on a CPU: abyssal, transformers and llama.cpp on the same weights, in one run.

    python benchmarks/cpu.py --llama-python /path/to/venv/bin/python --write docs/benchmarks.md

makes the 177.7M-parameter model of `reference_model.py`, checks that all engines compute the same logits from it, and
measures them in turn, each cell in a process of its own. Of a peer's modes (`cells.py`) the best is taken for each
cell. `--quick` runs everything on a model of two layers, to try the benchmark itself; `--table RESULTS.json` writes
the table of an earlier run again.
"""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import reference_model
import report
from cells import ENGINES, LLAMA, OURS, TRANSFORMERS, Cell, Variant, cells, told, variants
from measure import MARK, Job

from abyssal.costs import inspect

HERE = Path(__file__).resolve().parent
WORKERS = {OURS: "ours.py", TRANSFORMERS: "peer_transformers.py", LLAMA: "peer_llama.py"}
TOLERANCE = 1e-3  # of float32 logits between engines; they are about 2 at their largest
TUNING_SECONDS = 4.0  # of a decoding pass in which a peer's modes are compared


class Failed(RuntimeError):
    """A worker ended without a result."""


def say(text: str) -> None:
    print(text, flush=True)


class Bench:
    """One run: the model on disk, the engines' interpreters, and what has been measured so far."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        self.config = reference_model.config(options.quick)
        self.pythons = {OURS: sys.executable, TRANSFORMERS: sys.executable}
        if importlib.util.find_spec("transformers") is None:
            say("transformers: not installed here; its columns stay empty")
            del self.pythons[TRANSFORMERS]
        if (llama := llama_python(options.llama_python)) is not None:
            self.pythons[LLAMA] = llama
        self.results: dict[str, Any] = {"machine": machine(options), "quick": options.quick, "cells": [], "memory": []}
        self.results["sizes"] = sizes_of(options.quick)

    def wanted(self, *words: str) -> bool:
        """Whether `--only` asks for what is called so: any of its words, or all where there are none."""
        text = " ".join(words)
        return not self.options.only or all(any(o in text for o in only.split("|")) for only in self.options.only)

    def worker(
        self, engine: str, kind: str, dtype: str, compiled: str | None = None, **settings: Any
    ) -> dict[str, Any]:
        """One job in a process of its own; `compiled` is where torch keeps what it compiles."""
        path = self.work / f"model-{dtype}"
        model = f"{path}.gguf" if engine == LLAMA else str(path)
        job = Job(engine, kind, model, dtype, self.config.vocab_size, threads=self.options.threads, **settings)
        env = os.environ | {
            "OMP_NUM_THREADS": str(self.options.threads),
            "MKL_NUM_THREADS": str(self.options.threads),
            "TORCHINDUCTOR_CACHE_DIR": compiled or str(self.work / "compiled"),
            "HF_HUB_OFFLINE": "1",
        }
        command = [self.pythons[engine], str(HERE / WORKERS[engine]), job.text()]
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=self.options.timeout)
        except subprocess.TimeoutExpired:
            raise Failed(f"took more than {self.options.timeout} s") from None
        found = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
        if done.returncode or not found:
            tail = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise Failed(f"exit status {done.returncode}: {' '.join(tail)}")
        result: dict[str, Any] = json.loads(found[-1].removeprefix(MARK))
        return result

    # ---- before anything is timed ---------------------------------------------------------------------------

    def prepare(self) -> None:
        """The model in the public format and, where llama.cpp is, as GGUF; then everybody's logits."""
        # What an earlier run compiled may be of other code; and the first start is to be a cold one.
        shutil.rmtree(self.work / "compiled", ignore_errors=True)
        if not (self.work / "model-bfloat16" / "config.json").is_file():
            say(f"writing the model into {self.work}")
            reference_model.write(self.work, self.options.quick)
        for dtype in reference_model.DTYPES if LLAMA in self.pythons else ():
            folder, file = self.work / f"model-{dtype}", self.work / f"model-{dtype}.gguf"
            if not file.is_file():
                subprocess.run([self.pythons[LLAMA], str(HERE / "gguf_export.py"), str(folder), str(file)], check=True)
        self.results["costs"] = inspect(self.config).to_dict()
        routing = self.worker(OURS, "routing", "float32", context=2048)
        say(
            f"routing over 2048 tokens: {routing['used']:.0%} of a layer's experts used at the least, the busiest "
            f"{routing['busiest']:.2f} times an even share; 8 tokens meet {routing['used_by_8_tokens']:.0%}"
        )
        read = self.worker(OURS, "bandwidth", "float32")["bytes_per_second"]
        say(f"read bandwidth, {self.options.threads} threads: {read / 1e9:.1f} GB/s")
        self.results |= {"routing": routing, "read_bytes_per_second": read}
        self.results["agreement"] = [self.agree(d, batch) for d in reference_model.DTYPES for batch in (1, 8)]

    def agree(self, dtype: str, batch: int) -> dict[str, Any]:
        """The largest difference of any logit from ours: a prompt, then 8 cached steps, as they are timed."""
        rows = {}
        for engine in self.pythons:
            out = self.work / f"logits-{engine}.npy"
            # As exact as the engine can be: a cache of the weights' dtype, no approximate attention.
            own: Variant = {"cache": "f32" if dtype == "float32" else "bf16"} if engine == LLAMA else {}
            if engine == OURS:  # compiled once: the tests compare both steps, and a compilation takes a minute
                own = {"compiled": dtype == "float32" and batch == 1}
            settings: dict[str, Any] = {"batch": batch, "context": 56, "steps": 8, "out": str(out), "variant": own}
            found = self.worker(engine, "logits", dtype, None, **settings)
            rows[engine] = np.load(out)
            self.results["machine"]["versions"] |= {engine: found["version"]} if "version" in found else {}
            self.results["machine"] |= {"llama_system": found["system"]} if "system" in found else {}
        ours, peers = rows[OURS], {engine: row for engine, row in rows.items() if engine != OURS}
        difference = {peer: float(np.abs(row - ours).max()) for peer, row in peers.items()}
        same = {peer: float((row.argmax(-1) == ours.argmax(-1)).mean()) for peer, row in peers.items()}
        largest = float(np.abs(ours).max())
        for peer in peers:
            say(
                f"{dtype}, batch {batch}: {peer}'s logits are within {difference[peer]:.2g} of ours (the largest is "
                f"{largest:.2f}), {same[peer]:.0%} of the greedy choices are equal"
            )
            if dtype == "float32" and not difference[peer] <= TOLERANCE:
                raise SystemExit(f"{peer} computes something else: its logits should be within {TOLERANCE:g}")
        return {"dtype": dtype, "batch": batch, "difference": difference, "greedy_equal": same, "largest": largest}

    # ---- cells ----------------------------------------------------------------------------------------------

    def best_variant(self, engine: str, cell: Cell) -> tuple[Variant, dict[str, Any]]:
        """An engine's fastest mode for the cell, and what each came to."""
        modes = variants(engine, cell, self.options.every_mode)
        modes = modes[-1:] if self.options.quick else modes
        if len(modes) == 1:
            return modes[0], {}
        tried: dict[str, Any] = {}
        fastest: tuple[float, Variant] = (0.0, {})
        for variant in modes:
            try:
                rates = self.measure(engine, cell, variant, passes=1, seconds=TUNING_SECONDS)["rates"]
            except Failed as error:
                tried[told(variant)] = str(error)
                continue
            tried[told(variant)] = max(rates)
            fastest = max(fastest, (max(rates), variant), key=lambda pair: pair[0])
        if not fastest[0]:
            raise Failed(f"none of its modes works: {tried}")
        return fastest[1], tried

    def measure(self, engine: str, cell: Cell, variant: Variant, **settings: Any) -> dict[str, Any]:
        settings = {"steps": self.options.steps, "passes": 3 if cell.kind == "decode" else 2} | settings
        return self.worker(
            engine, cell.kind, cell.dtype, batch=cell.batch, context=cell.context, variant=variant, **settings
        )

    def run_cell(self, cell: Cell) -> None:
        """Every engine's modes once, then the engines in turn."""
        say(f"{cell.title}, {cell.dtype}")
        entry: dict[str, Any] = {"name": cell.name, "engines": {}}
        engines = [e for e in cell.engines if e in self.pythons and self.wanted(cell.title, cell.dtype, e)]
        for engine in engines:
            entry["engines"][engine] = {"rates": [], "details": []}
            try:
                variant, tried = self.best_variant(engine, cell)
                entry["engines"][engine] |= {"variant": variant, "tried": tried}
            except Failed as error:
                entry["engines"][engine]["failed"] = str(error)
        for _ in range(self.options.repeat):
            for engine in engines:
                mine = entry["engines"][engine]
                if "failed" in mine:
                    continue
                try:
                    found = self.measure(engine, cell, mine["variant"])
                except Failed as error:
                    mine["failed"] = str(error)
                    continue
                mine["rates"] += found.pop("rates")
                mine["details"].append(found)
        for engine, mine in entry["engines"].items():
            rate = f"{max(mine['rates']):8.1f} tokens/s" if mine["rates"] else ""
            say(f"  {engine:13}{rate} {told(mine.get('variant', {}))}{mine.get('failed', '')}")
        self.results["cells"].append(entry)

    def run_memory(self, dtype: str, context: int) -> None:
        entry: dict[str, Any] = {"dtype": dtype, "batch": 8, "context": context, "engines": {}}
        if self.wanted("memory", dtype, OURS):
            # Of an empty folder first, where the step must be compiled; then it is found there.
            with tempfile.TemporaryDirectory() as compiled:
                steps = ("compiled here", "from the disk")
                entry["engines"][OURS] = {step: self.memory(OURS, dtype, context, compiled) for step in steps}
        if TRANSFORMERS in self.pythons and self.wanted("memory", dtype, TRANSFORMERS):
            entry["engines"][TRANSFORMERS] = self.memory(TRANSFORMERS, dtype, context)
        self.results["memory"].append(entry)

    def memory(self, engine: str, dtype: str, context: int, compiled: str | None = None) -> dict[str, Any]:
        mode: Variant = {} if engine == OURS else {"experts": "grouped_mm"}
        settings = {"batch": 8, "context": context, "steps": self.options.steps, "variant": mode}
        try:
            found = self.worker(engine, "memory", dtype, compiled, **settings)
        except Failed as error:
            found = {"failed": str(error)}
        say(f"memory, batch 8 × {context}, {dtype}, {engine}: {report.memory_told(found)}")
        return found

    def save(self) -> None:
        (self.work / "results.json").write_text(json.dumps(self.results, indent=1))

    def run(self) -> None:
        started, sizes = time.perf_counter(), self.results["sizes"]
        self.prepare()
        for cell in cells(*sizes):
            if any(self.wanted(cell.title, cell.dtype, engine) for engine in cell.engines):
                self.run_cell(cell)
                self.save()
        for dtype in reference_model.DTYPES:
            if any(self.wanted("memory", dtype, engine) for engine in ENGINES[:2]):
                self.run_memory(dtype, sizes[1])
        self.results["minutes"] = (time.perf_counter() - started) / 60
        self.save()


def sizes_of(quick: bool) -> tuple[int, int, int]:
    """The short and the long context, and the length of a trained sequence."""
    return (64, 256, 32) if quick else (512, 4096, 256)


def llama_python(path: str | None) -> str | None:
    """An interpreter that has llama-cpp-python and gguf, or None, said aloud."""
    python = path or sys.executable
    found = subprocess.run([python, "-c", "import llama_cpp, gguf"], capture_output=True, text=True)
    if found.returncode == 0:
        return python
    say(f"llama.cpp: {python} cannot import llama_cpp and gguf; its columns stay empty (see --llama-python)")
    return None


def machine(options: argparse.Namespace) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    notable = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "features": notable,
        "threads": options.threads,
        "versions": {"abyssal": version("abyssal"), "torch": version("torch"), "python": platform.python_version()},
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/cpu.py", *sys.argv[1:]]),
    }


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed and memory on a CPU, beside transformers and llama.cpp.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, help="rounds in which the engines alternate")
    parser.add_argument("--steps", type=int, default=64, help="decoding steps of a pass")
    parser.add_argument("--timeout", type=int, default=900, help="seconds for one process")
    parser.add_argument(
        "--only", action="append", help="words of a cell, dtype or engine; A|B is either; repeat for and"
    )
    parser.add_argument("--quick", action="store_true", help="a model of two layers, to try the benchmark itself")
    parser.add_argument("--every-mode", action="store_true", help="try more of the peers' modes (hours)")
    parser.add_argument("--llama-python", help="an interpreter with llama-cpp-python and gguf (default: this one)")
    parser.add_argument("--work", type=Path, help="keeps the models and results here (default: a temporary folder)")
    parser.add_argument("--write", type=Path, help="a Markdown file whose section between the markers is replaced")
    parser.add_argument("--table", type=Path, help="measures nothing: the table of these results")
    return parser.parse_args(argv)


def main() -> None:
    options = arguments()
    if options.table:
        report.publish(json.loads(options.table.read_text()), options.table.parent, options.write)
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)) / ("quick" if options.quick else "full")
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(options, work)
        bench.run()
        report.publish(bench.results, options.work and work, options.write)


if __name__ == "__main__":
    main()
