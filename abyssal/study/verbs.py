"""`abyssal study VERB`: the words of the studies. What a verb does lives in the file beside this of its name."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from abyssal.study.output import Places
    from abyssal.study.result import Result

study = typer.Typer(help="The papers' claims as tables and pictures that you make yourself.", no_args_is_help=True)

# What every study takes.
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Write JSON, pictures and an HTML page into this folder, named as the verb."),
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write every number into this file.")]
PictureFile = Annotated[Path | None, typer.Option("--picture", help="Draw into this PNG; further ones beside it.")]
Quick = Annotated[bool, typer.Option("--quick", help="The smallest run that goes all the way.")]


@study.command("cache")
def study_caches(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Presets, or folders with a config.json. [default: deepseek-v3 deepseek-v2-lite]"),
    ] = None,
    groups: Annotated[
        str | None, typer.Option(help="Groups of GQA, with commas. [default: 8, or the most that divide the heads]")
    ] = None,
    memory: Annotated[str, typer.Option(help="To fill: 80GB, 141GiB ...")] = "80GB",
    context: Annotated[str, typer.Option(help="Contexts whose largest batch is wanted.")] = "4096,32768,131072",
    batch: Annotated[str, typer.Option(help="Batches whose longest context is wanted.")] = "1,32",
    weights: Annotated[
        str | None, typer.Option(help="That lie in the memory, too: bf16 or fp8. [default: as the configuration says]")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Of each cache that is allocated. [default: 64]")] = None,
    out: Out = None,
    json_file: JsonFile = None,
    picture: PictureFile = None,
    quick: Quick = False,
) -> None:
    """What a token leaves behind under MHA, GQA, MQA and MLA: counted, held against the papers, and measured."""
    from abyssal.study.cache import MODELS, QUICK_MODELS, QUICK_TOKENS, TOKENS, Settings, study_cache
    from abyssal.study.output import Places, ints

    places = Places(out, json_file, picture)
    settings = Settings(
        models=tuple(models or (QUICK_MODELS if quick else MODELS)),
        groups=ints("--groups", groups) if groups is not None else None,
        memory=memory,
        contexts=ints("--context", context),
        batches=ints("--batch", batch),
        tokens=tokens if tokens is not None else QUICK_TOKENS if quick else TOKENS,
        weights=weights,
    )
    with Console(stderr=True).status("counting") as status:
        result = study_cache(settings, command(), status.update)
    show(result, places)


def command() -> str:
    """The line that this process was started with."""
    return shlex.join(["abyssal", *sys.argv[1:]])


def show(result: "Result", places: "Places") -> None:
    """Prints a result, writes what is wanted of it, and says where."""
    console = Console() if sys.stdout.isatty() else Console(width=132)  # 80 columns would fold every cell
    console.print(result.render())
    for path in places.write(result):
        Console(stderr=True).print(f"written: {path}", highlight=False, soft_wrap=True)
