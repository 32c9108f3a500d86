"""`abyssal bench VERB`: the words of the benchmarks. What a verb does lives in the file beside this of its name."""

import signal
from pathlib import Path
from typing import Annotated

import typer

from abyssal.files import model_folder

bench = typer.Typer(help="Time what abyssal is made of, beside its peers.", no_args_is_help=True)


@bench.command("ops")
def bench_operations(
    only: Annotated[str | None, typer.Option(help="Some of the operations, with commas: decode,loss ...")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every number into this file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the roofline into this PNG.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu. [default: cuda where there is one]")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few shapes of each, timed briefly.")] = False,
) -> None:
    """Time every operation beside the peers that are installed; 1 if one of ours fails."""
    from abyssal.bench.run import bench_ops

    names = [name for name in (only or "").split(",") if name]
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # cut short, it prints what it has
    try:
        report = bench_ops(names, device, quick, json_file, picture)
    finally:
        signal.signal(signal.SIGTERM, before)
    if report.failed:
        raise typer.Exit(1)


@bench.command("engine")
def bench_whole_engine(
    model: Annotated[
        str | None, typer.Argument(help="A preset or a folder. [default: deepseek-v2-lite on a GPU, tiny elsewhere]")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Where the random weights are saved, or lie already.")] = None,
    only: Annotated[str | None, typer.Option(help="Only loads with this in their names.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences decoded at once.")] = 256,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every number into this file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the rates into this PNG.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu. [default: cuda where there is one]")] = None,
    startup: Annotated[bool, typer.Option(help="Time a start from the saved checkpoint; needs --folder.")] = True,
    peer: Annotated[bool, typer.Option(help="Time transformers, too.")] = True,
) -> None:
    """Time the engine on a model's shape: decoding, prompts, crowds of requests; beside transformers."""
    import torch

    from abyssal.bench.engine import bench_engine

    gpu = (device or "cuda").startswith("cuda") and torch.cuda.is_available()
    name = model or ("deepseek-v2-lite" if gpu else "tiny")
    bench_engine(name, device, folder, batch, only, startup, peer, json_file, picture)


@bench.command("train")
def bench_training(
    model: Annotated[
        str | None, typer.Argument(help="A preset or a folder. [default: reference-961m on a GPU, tiny elsewhere]")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences of a microbatch. [default: 16, or 4 on a CPU]")] = None,
    sequence: Annotated[int | None, typer.Option(help="Tokens of one. [default: 2048, or 128 on a CPU]")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps timed. [default: 20, or 10 on a CPU]", min=1)] = None,
    only: Annotated[str | None, typer.Option(help="Only rows with one of these in their names, with commas.")] = None,
    peer: Annotated[bool, typer.Option(help="Time transformers and torchtitan, too.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="One row of ours, one of transformers.")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of a run's settings, for all of our rows.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every number into this file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw rates and memory into this PNG.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu. [default: cuda where there is one]")] = None,
) -> None:
    """Time steps of training beside transformers and torchtitan at the same shape; 1 if one of ours fails."""
    from abyssal.bench.train import bench_train

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # cut short, it prints what it has
    try:
        report = bench_train(
            model, device, batch, sequence, steps, only, peer, quick, tuple(settings or ()), json_file, picture
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    if any(row.failure for row in report.rows if row.who == "abyssal"):
        raise typer.Exit(1)


@bench.command("speculation")
def bench_drafts(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder, a run's folder, or a hub id.", metavar="MODEL")],
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas.")] = "1",
    drafts: Annotated[str, typer.Option(help="Tokens to draft a step, with commas.")] = "1,2",
    tokens: Annotated[int, typer.Option(help="Tokens of each text.")] = 256,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the decoding step.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every number into this file.")] = None,
) -> None:
    """Time decoding with and without drafts of the MTP modules, on a trained model."""
    from abyssal.bench.speculation import bench_speculation

    sizes, counts = ([int(n) for n in text.split(",")] for text in (batch, drafts))
    bench_speculation(Path(model_folder(model)), device, sizes, counts, tokens, compiled, json_file)
