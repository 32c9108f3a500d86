"""`abyssal bench engine`: the whole engine on a model's shape, with transformers on the same shape in the same run.

Weights are drawn from N(0, 0.02), router included, so that routing spreads. They are saved first and loaded as any
checkpoint is: the start-up that is timed, in a process of its own, is from there to the first token.
"""

import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from abyssal.bench import engine_peer
from abyssal.bench.machine import device_name, versions
from abyssal.bench.serving import EngineReport, gpu_loads, small_loads, timed
from abyssal.checkpoint import load
from abyssal.config import ModelConfig
from abyssal.engine import LLM
from abyssal.model.transformer import Transformer


def bench_engine(
    model: str,
    device: str | None = None,
    folder: Path | None = None,
    batch: int = 256,
    only: str | None = None,
    startup: bool = True,
    peer: bool = True,
    json_path: Path | None = None,
    picture: Path | None = None,
    console: Console | None = None,
) -> EngineReport:
    """`model` is a preset or a folder. Random weights of a preset are saved in `folder` (None: kept in memory, and
    start-up isn't timed), or found there. Raises ValueError as `LLM` does."""
    console = console or Console(stderr=True)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = versions(device.startswith("cuda")) | {"transformers": engine_peer.version()}
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    report = EngineReport(device_name(device), today, found, model, {"batch": batch})

    def say(text: str) -> None:
        console.print(text, style="dim", highlight=False)

    made = _model(model, device, folder, say)
    config = made.config
    if folder is not None and startup:
        del made
        _free(device)
        report.startup = _startup(folder, device, say)
        made = load(folder, device=device)
    loads = [l for l in (gpu_loads() if device.startswith("cuda") else small_loads()) if not only or only in l.name]
    longest = max((p + o for l in loads for p, o in zip(l.prompts, l.outputs)), default=1)
    llm = LLM(made, max_batch=batch, max_context=min(longest, config.max_position_embeddings), say=say)
    began = time.perf_counter()
    llm.start()
    report.settings |= {"warm_seconds": time.perf_counter() - began, "step_tokens": llm.options.step_tokens}
    for seed, one in enumerate(loads):
        if len(one.prompts) <= 256:
            timed(llm, one, 1000 + seed)  # once to warm up
        row = timed(llm, one, seed, say)
        report.rows.append(row)
        say(f"  {row.tokens_per_second:,.0f} tokens/s")
        _keep(report, json_path)
    del llm, made
    _free(device)
    if peer:
        report.peer = engine_peer.rates(config, device, [l for l in loads if l.figure != "output"], say)
    _keep(report, json_path)
    Console().print(render(report))
    if picture is not None:
        from abyssal.bench.engine_picture import draw

        draw(report, picture)
        console.print(f"picture: {picture}", highlight=False)
    if json_path is not None:
        console.print(f"numbers: {json_path}", highlight=False)
    return report


def render(report: EngineReport) -> Table:
    table = Table(title=f"{report.model} on {report.device}, {report.date}: tokens a second", title_justify="left")
    for name in ("", "abyssal", "transformers", "ratio", "asked", "first token s", "device idle"):
        table.add_column(name, justify="left" if not name else "right")
    for row in report.rows:
        peer = report.peer.get(row.name)
        asked = (
            "" if row.asked is None else f"{'' if row.tokens_per_second >= row.asked else 'missed '}{row.asked:,.0f}"
        )
        table.add_row(
            row.name, f"{row.tokens_per_second:,.0f}", "" if peer is None else f"{peer:,.0f}",
            "" if peer is None else f"{row.tokens_per_second / peer:.1f}", asked, f"{row.first_token:.2f}",
            "" if row.device_idle is None else f"{row.device_idle:.1%}",
        )  # fmt: skip
    for what, seconds in report.startup.items():
        table.add_row(f"start-up: {what}", f"{seconds:.1f} s")
    return table


def _model(model: str, device: str, folder: Path | None, say: Any) -> Transformer:
    if folder is not None and (folder / "config.json").is_file():
        say(f"loading {folder}")
        return load(folder, device=device)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    config = ModelConfig.load(model).replace(initializer_range=0.02)
    say(f"drawing {model}'s weights")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            made = Transformer(config)
    finally:
        torch.set_default_dtype(before)
    made.init_weights(torch.Generator(device).manual_seed(0))
    if folder is not None:
        say(f"saving {folder}")
        made.save(folder)
    return made


def _startup(folder: Path, device: str, say: Any) -> dict[str, float]:
    """Of a process that loads the checkpoint and generates: seconds until its model is loaded, and its first token."""
    say("start-up, in a process of its own")
    command = [sys.executable, "-m", "abyssal.bench.startup", str(folder), device]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(f"start-up failed: {found.stderr[-2000:]}")
    return dict(json.loads(found.stdout.splitlines()[-1]))


def _keep(report: EngineReport, path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(report.to_dict(), indent=1))


def _free(device: str) -> None:
    if device.startswith("cuda"):
        import gc

        gc.collect()
        torch.cuda.empty_cache()
