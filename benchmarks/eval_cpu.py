"""`abyssal eval` beside transformers through the same harness, on a CPU: the same checkpoint, sets and questions.

    python benchmarks/eval_cpu.py [MODEL] [--tasks ...] [--limit N] [--json FILE] [--quick]

MODEL is a folder in the public format with a tokenizer, of a run for instance; without it, the preset `small` with
random weights and a tokenizer of the standard library's sources is written for the time being. Each pass of each engine
is a process of its own, in turn: it loads, is warmed up with other text, and evaluates set after set, which is timed.
Both generate up to `--batch` texts at once and up to `--new` tokens each, in float32; transformers scores `--batch`
sequences at once, its own experts' code as `--experts` says.

Random weights rarely end a text: both then make all tokens that they may.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from measure import MARK, report

OURS, THEIRS = "abyssal", "transformers"
UNRELATED = "Seven grey geese flew north over the frozen lake, and nobody in the village saw them."


@dataclass(frozen=True)
class Work:
    """What a worker is to do."""

    engine: str
    model: str
    tasks: tuple[str, ...]
    limit: int
    batch: int  # texts, or sequences, at once
    new: int  # tokens of a text, at most
    threads: int
    experts: str


# ---- a worker -----------------------------------------------------------------------------------------------------


def worker(work: Work) -> None:
    """Reports, for each set, the seconds that it took and its figures."""
    import torch
    from lm_eval import evaluator
    from lm_eval.api.instance import Instance

    from abyssal.evaluate.sets import named
    from abyssal.evaluate.tasks import SetTask

    torch.set_num_threads(work.threads)
    lm = _ours(work) if work.engine == OURS else _theirs(work)
    lm.loglikelihood([Instance("loglikelihood", {}, (UNRELATED, " Or did they?"), 0)])
    short = {"until": [], "max_gen_toks": 4, "do_sample": False}
    lm.generate_until([Instance("generate_until", {}, (UNRELATED, short), 0)])
    found: dict[str, Any] = {}
    for name in work.tasks:
        own = named(name)
        if own is None:
            raise ValueError(f"{name}: expected a set of abyssal's own, or a file of JSON lines")
        task = SetTask(replace(own, max_tokens=min(work.new, own.max_tokens)))
        start = time.perf_counter()
        told: Any = evaluator.evaluate(
            lm, {"tasks": {task.task_name: task}, "groups": {}, "group_map": {}}, limit=work.limit, log_samples=False,
            bootstrap_iters=0,
        )  # fmt: skip
        figures = {
            key.partition(",")[0]: value
            for key, value in told["results"][task.task_name].items()
            if key.endswith(",none") and "stderr" not in key
        }
        seconds = time.perf_counter() - start
        found[name] = {"seconds": seconds, "questions": min(work.limit, len(task.questions)), "figures": figures}
    report(found)


def _ours(work: Work) -> Any:
    from abyssal import LLM
    from abyssal.evaluate.lm import EngineLM

    return EngineLM(LLM(work.model, max_batch=work.batch), quiet=True)


def _theirs(work: Work) -> Any:
    from lm_eval.models.huggingface import HFLM

    further = {"experts_implementation": work.experts} if work.experts else {}
    return HFLM(pretrained=work.model, device="cpu", dtype="float32", batch_size=work.batch, **further)


# ---- all of them --------------------------------------------------------------------------------------------------


def passed(work: Work) -> dict[str, Any]:
    """One pass in a process of its own, which reaches no network."""
    env = os.environ | {"OMP_NUM_THREADS": str(work.threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--worker", json.dumps(asdict(work))]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith(MARK))
    found: dict[str, Any] = json.loads(line.removeprefix(MARK))
    return found


def write_model(folder: Path, quick: bool) -> Path:
    """Random weights, and a tokenizer of the standard library's sources."""
    import torch

    from abyssal import ModelConfig, Transformer
    from abyssal.data import Tokenizer

    config = ModelConfig.load("tiny" if quick else "small").replace(max_position_embeddings=4096)
    sources = sorted(Path(os.__file__).parent.glob("*.py"))[:60]
    tokenizer = Tokenizer.train([path.read_text(errors="replace") for path in sources], config.vocab_size)
    Transformer(config).init_weights(torch.Generator().manual_seed(0)).save(folder)
    tokenizer.save(folder)
    return folder


def table(results: dict[str, Any]) -> str:
    lines = [
        "| set | questions | abyssal, s | transformers, s | times as fast | figures |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for name, row in results["sets"].items():
        figures = ", ".join(f"{key} {value:.4f}" for key, value in row["figures"][OURS].items())
        alike = "the same" if row["figures"][OURS] == row["figures"][THEIRS] else f"not alike: {row['figures'][THEIRS]}"
        lines.append(
            f"| `{name}` | {row['questions']} | {row['seconds'][OURS]:.1f} | {row['seconds'][THEIRS]:.1f} "
            f"| {row['ratio']:.2f} | {figures}; {alike} |"
        )
    s = results["settings"]
    lines += [
        "",
        f"{s['threads']} threads, float32, {s['batch']} at once, up to {s['new']} tokens a text; seconds without "
        f"loading, medians of {s['passes']} passes in turn; abyssal over torch {results['versions']['torch']}, "
        f"transformers {results['versions']['transformers']}, lm-eval {results['versions']['lm-eval']}.",
    ]
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        given = json.loads(sys.argv[2])
        return worker(Work(**{**given, "tasks": tuple(given["tasks"])}))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", help="a folder in the public format, or a run's")
    parser.add_argument("--tasks", default="gpqa_diamond,arc_challenge,gsm8k", help="abyssal's own sets, with commas")
    parser.add_argument("--limit", type=int, default=20, help="questions of each set")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--new", type=int, default=128, help="tokens of a text, at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--passes", type=int, default=1, help="of each engine, in turn")
    parser.add_argument("--experts", default="", help="transformers' experts_implementation; empty: its own choice")
    parser.add_argument("--json", type=Path, help="where the numbers are written")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few questions, to try this out")
    options = parser.parse_args()
    if options.quick:
        options.limit, options.new = min(options.limit, 2), min(options.new, 4)
    with tempfile.TemporaryDirectory() as folder:
        from abyssal.files import model_folder

        model = model_folder(options.model) if options.model else str(write_model(Path(folder), options.quick))
        work = Work(
            OURS, model, tuple(options.tasks.split(",")), options.limit, options.batch, options.new, options.threads,
            options.experts,
        )  # fmt: skip
        passes: dict[str, list[dict[str, Any]]] = {OURS: [], THEIRS: []}
        for turn in range(options.passes):
            for engine in (OURS, THEIRS) if turn % 2 == 0 else (THEIRS, OURS):
                passes[engine].append(passed(replace(work, engine=engine)))
                shown = ", ".join(f"{name} {found['seconds']:.1f} s" for name, found in passes[engine][-1].items())
                print(f"{engine}: {shown}", flush=True)
    results = {"settings": vars(options) | {"json": None}, "passes": passes, "sets": {}}
    results["versions"] = {name: version(name) for name in ("abyssal", "torch", "transformers", "lm-eval")}
    for name in work.tasks:
        seconds = {engine: median(p[name]["seconds"] for p in own) for engine, own in passes.items()}
        figures = {engine: own[0][name]["figures"] for engine, own in passes.items()}
        questions = passes[OURS][0][name]["questions"]
        ratio = seconds[THEIRS] / seconds[OURS]
        results["sets"][name] = {"questions": questions, "seconds": seconds, "ratio": ratio, "figures": figures}
    print("\n" + table(results))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
