"""`abyssal eval`: its words. What it does lies in the files beside this."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from abyssal.files import cache_folder, model_folder
from abyssal.source import short_digest

if TYPE_CHECKING:
    from abyssal.engine import LLM

OUTPUT = "-"  # names the standard output, where a file is expected


class Verb(TyperCommand):
    """`eval`, whose `--json` may come without a file: last, or before another option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The words, each `--json` with what it names."""
        whole: list[str] = []
        for word, following in zip(args, [*args[1:], "--"]):
            whole += [word, OUTPUT] if word == "--json" and following.startswith("--") else [word]
        return super().parse_args(ctx, whole)


def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder, a run's folder, or a hub id.", metavar="MODEL")],
    tasks: Annotated[
        str | None, typer.Option(help="Sets by name, files of JSON lines, and lm-eval's own tasks, with commas.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Measure bits a byte of this file's or folder's text, and MTP acceptance.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first questions of each set.")] = None,
    shots: Annotated[int | None, typer.Option(help="Examples before a question. [default: each set's own]")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask by the checkpoint's chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="What a system says first.")] = None,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Run the code that the model writes, in a sandbox: for HumanEval, MBPP.")
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="[FILE]",
            help="Write figures, settings and versions there; without a file, on the standard output.",
        ),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            help="Keep every answer in this file, and take those that are there. [default: beside the file of --json; "
            "without one, among what is cached, until all are there]"
        ),
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of context. [default: the model's]")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a scoring pass. [default: 4096; GPU 32768]")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Texts generated at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Of drawn examples and sampled texts.")] = 0,
    speculation: Annotated[bool, typer.Option(help="Draft with the MTP modules, where the model has them.")] = True,
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Compile the decoding step. [default: where it pays]"),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float64. [default: as stored]")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
) -> None:
    """Evaluate a model on benchmark sets, or on any text. Cut short, the same command goes on where it was."""
    if (tasks is None) == (text is None):
        raise ValueError("eval: expected --tasks or --text, and one of them")
    if dtype not in (None, "float32", "bfloat16", "float64"):
        raise ValueError(f"dtype: expected float32, bfloat16 or float64, got {dtype!r}")
    folder = model_folder(model)
    if text is not None:
        given = {"--limit": limit, "--shots": shots, "--system": system, "--answers": answers}
        given |= {"--chat": chat or None, "--run-code": run_code or None}
        for option, value in given.items():
            if value is not None:
                raise ValueError(f"eval: {option}: is of --tasks, not of --text")
        llm = _llm(folder, dtype, device, max_batch, speculation, compiled)
        return _text(llm, model, text, max_length, batch_tokens, json_file)
    try:
        from abyssal.evaluate.lm import EngineLM, weights_of
        from abyssal.evaluate.run import Asked, tasks_of
        from abyssal.evaluate.run import evaluate as run
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; pip install 'abyssal[eval]'") from error
    names = tuple(name for name in (tasks or "").split(",") if name)
    asked = Asked(names, limit, shots, chat, system, seed, run_code)
    loaded = tasks_of(asked)  # all that can be refused is, before a weight is read
    to_output = str(json_file) == OUTPUT
    if answers is None and json_file is not None and not to_output:
        answers = json_file.with_suffix(".answers.jsonl")
    from abyssal.checkpoint import local_folder

    folder = str(local_folder(folder))
    unfinished = None
    if answers is None:
        answers = unfinished = _unfinished([folder, names, limit, shots, chat, system, seed, max_length, dtype, device])
    lm = EngineLM(
        _llm(folder, dtype, device, max_batch, speculation, compiled), max_length=max_length, batch_tokens=batch_tokens,
        answers=answers, name=weights_of(folder), seed=seed,
    )  # fmt: skip
    with lm.journal:
        report = run(lm, model, loaded, asked)
    counts, said = lm.counts, Console(stderr=True)
    (said if to_output else Console()).print(report.table())
    if unfinished is not None:
        unfinished.unlink()
    if counts.reused:
        said.print(f"{counts.reused:,} of {counts.requests:,} answers were there already", soft_wrap=True)
    if counts.truncated:
        said.print(
            f"{counts.truncated:,} inputs were longer than {lm.max_length:,} tokens and lost their first "
            f"{counts.truncated_tokens:,} together", style="yellow", soft_wrap=True,
        )  # fmt: skip
    if counts.shortened:
        said.print(f"{counts.shortened:,} texts could not be as long as their task allows", style="yellow")
    if to_output:
        print(report.text(), end="")
    elif json_file is not None:
        report.write(json_file)
        said.print(f"figures: {json_file}; answers: {answers}", highlight=False, soft_wrap=True)


def _llm(folder: str, dtype: str | None, device: str, batch: int, speculation: bool, compiled: bool | None) -> "LLM":
    import torch

    from abyssal.engine import LLM

    with Console(stderr=True).status(f"loading {folder}"):
        kind = getattr(torch, dtype) if dtype else None
        drafts = None if speculation else 0
        return LLM(folder, dtype=kind, device=device, max_batch=batch, drafts=drafts, compiled=compiled)


def _unfinished(asked: list[Any]) -> Path | None:
    """Where the answers of a command that names no file are kept until it ends; None where nothing can be written."""
    folder = cache_folder() / "answers"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder / f"{short_digest(asked)}.jsonl" if os.access(folder, os.W_OK) else None


def _text(
    llm: "LLM", model: str, path: Path, sequence: int | None, batch_tokens: int | None, json_file: Path | None
) -> None:
    from rich.progress import Progress

    from abyssal.evaluate.score import pass_tokens
    from abyssal.evaluate.text import measure_text
    from abyssal.files import write_file

    if llm.tokenizer is None:
        raise ValueError("tokenizer: an evaluation needs one")
    length = sequence or llm.options.context
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("text", total=None)
        found = measure_text(
            llm.model, llm.tokenizer, path, length, batch_tokens or pass_tokens(llm.model.embed.weight.device),
            lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    settings = {"dtype": str(llm.model.embed.weight.dtype).removeprefix("torch."), "sequence": length}
    told: dict[str, Any] = {"model": model, "text": str(path), **settings, **asdict(found)}
    written = json.dumps(told, indent=2) + "\n"
    if str(json_file) == OUTPUT:
        print(written, end="")
        return
    print(f"bits a byte   {found.bits_per_byte:.4f}")
    print(f"nats a token  {found.loss:.4f}, {found.tokens:,} tokens of {found.bytes:,} bytes")
    for d, (accuracy, accepted) in enumerate(zip(found.mtp_accuracy, found.mtp_accepted), 1):
        print(f"MTP module {d}  {accuracy:.1%} of tokens guessed, {accepted:.1%} of drafts accepted")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_file(json_file, written.encode())
