"""An evaluation from names to a table and JSON."""

import json
import platform
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from abyssal.evaluate import sets
from abyssal.evaluate.lm import EngineLM, told
from abyssal.evaluate.tasks import SetTask
from abyssal.files import write_file

PACKAGES = ("abyssal", "torch", "lm-eval", "math-verify", "datasets", "tokenizers", "numpy")


@dataclass(frozen=True)
class Asked:
    """What is to be evaluated, and how. `shots` None: each set's own."""

    tasks: tuple[str, ...]
    limit: int | None = None  # questions of each set, the first
    shots: int | None = None
    chat: bool = False
    system: str | None = None
    seed: int = 0
    run_code: bool = False


@dataclass(frozen=True)
class Figure:
    """One metric of one set. `stderr` None: there is none for it."""

    task: str
    metric: str
    value: float
    stderr: float | None
    shots: int | None
    questions: int | None  # that were asked
    of: int | None  # that there are
    higher_is_better: bool | None
    version: str | None
    source: str


@dataclass(frozen=True)
class Report:
    """What came out."""

    model: str
    asked: Asked
    figures: list[Figure]
    settings: dict[str, Any]  # of the engine: dtype, device, max_length
    counts: dict[str, int]
    seconds: float
    versions: dict[str, str] = field(default_factory=lambda: versions())

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def write(self, path: Path) -> None:
        """As JSON, all of it or nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, self.text().encode())

    def table(self) -> Table:
        """A row a figure."""
        table = Table(title=self.model, title_justify="left", title_style="bold", show_edge=False)
        for name, side in (("set", "left"), ("shots", "right"), ("questions", "right"), ("metric", "left")):
            table.add_column(name, justify=side)  # type: ignore[arg-type]
        table.add_column("value", justify="right")
        table.add_column("± stderr", justify="right")
        before = None
        for f in self.figures:
            front = (f.task, _or_nothing(f.shots), _or_nothing(f.questions)) if f.task != before else ("", "", "")
            table.add_row(*front, f.metric, f"{f.value:.4f}", "" if f.stderr is None else f"{f.stderr:.4f}")
            before = f.task
        return table


def _or_nothing(value: int | None) -> str:
    return "" if value is None else str(value)


def tasks_of(asked: Asked) -> dict[str, Any]:
    """The harness's own form of tasks, with all questions read. Raises ValueError naming a set that is unknown, has no
    questions to be had, or needs what was not given."""
    if asked.limit is not None and asked.limit < 1:
        raise ValueError(f"limit: expected 1 or more, got {asked.limit}")
    ours: list[Any] = []
    theirs: dict[str, int | None] = {}
    for name in asked.tasks:
        own = sets.named(name)
        if own is not None:
            ours.append(SetTask(own, asked.shots, asked.seed, asked.run_code))
        else:
            known, shots = sets.HUB_SETS.get(name, (name, None))
            theirs[known] = shots if asked.shots is None else asked.shots
    loaded = _harness(theirs, asked) if theirs else {"tasks": {}, "groups": {}, "group_map": {}}
    for task in ours:
        if task.task_name in loaded["tasks"]:
            raise ValueError(f"tasks: {task.task_name} is named twice")
        loaded["tasks"][task.task_name] = task
    if not loaded["tasks"]:
        raise ValueError("tasks: expected at least one set")
    return loaded


def _harness(wanted: dict[str, int | None], asked: Asked) -> dict[str, Any]:
    """The harness's own tasks, whose questions `datasets` reads."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    unknown = [name for name in wanted if name not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"tasks: {', '.join(unknown)}: neither a set of ours ({', '.join(sets.names())}), nor a file of JSON "
            "lines, nor a task of lm-eval"
        )
    whole: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name, shots in wanted.items():
        try:
            loaded = manager.load([name])
        except ImportError as error:
            raise ValueError(f"{name}: the harness's task needs a package that is not installed: {error}") from error
        except Exception as error:  # whatever the hub, its client or a task's own module raises
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise ValueError(f"{name}: its questions are on the hub, which gave none: {reason}") from error
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None or (shots is not None and task.get_config("num_fewshot") != 0):
                task.set_config("num_fewshot", shots or 0)
            task.set_fewshot_seed(asked.seed)
        for part, found in loaded.items():
            whole[part].update(found)
    return whole


def evaluate(lm: EngineLM, model: str, tasks: dict[str, Any], asked: Asked) -> Report:
    """Asks the model everything. `tasks` are those of `tasks_of(asked)`."""
    from lm_eval import evaluator

    random.seed(asked.seed)
    np.random.seed(asked.seed)  # noqa: NPY002  the harness's own tasks draw from it
    torch.manual_seed(asked.seed)
    started = time.monotonic()
    found: Any = evaluator.evaluate(
        lm, tasks, limit=asked.limit, log_samples=False, bootstrap_iters=1000, system_instruction=asked.system,
        apply_chat_template=asked.chat, fewshot_as_multiturn=asked.chat,
    )  # fmt: skip
    llm = lm.llm
    settings = {
        "dtype": str(llm.model.embed.weight.dtype).removeprefix("torch."), "device": str(lm.device),
        "max_length": lm.max_length, "batch_tokens": lm.batch_tokens, "max_batch": llm.max_batch, "drafts": llm.drafts,
    }  # fmt: skip
    return Report(model, asked, _figures(found, tasks), settings, told(lm.counts), time.monotonic() - started)


def _figures(found: Any, tasks: dict[str, Any]) -> list[Figure]:
    """A figure for each metric of each set, groups too; a metric's filter is named where it is one of several."""
    figures = []
    for name, results in found["results"].items():
        task = tasks["tasks"].get(name)
        count = found.get("n-samples", {}).get(name, {})
        for key, value in results.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = results.get(f"{metric}_stderr,{chosen}")
            direction = found.get("higher_is_better", {}).get(name, {}).get(metric)
            stated = found.get("versions", {}).get(name)
            figures.append(
                Figure(
                    name, metric if chosen == "none" else f"{metric}, {chosen}", float(value),
                    float(stderr) if isinstance(stderr, int | float) else None, found.get("n-shot", {}).get(name),
                    count.get("effective"), count.get("original"), direction,
                    None if stated is None else str(stated),
                    task.own.source if isinstance(task, SetTask) else "lm-eval",
                )
            )  # fmt: skip
    return figures


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of what the figures depend on, and of Python."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
