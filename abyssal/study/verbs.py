"""`abyssal study VERB`: the words of the studies. What a verb does lives in the file beside this of its name."""

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

if TYPE_CHECKING:
    from abyssal.study.output import Places
    from abyssal.study.result import Result

S = TypeVar("S", bound=Any)

study = typer.Typer(help="The papers' claims as tables and pictures that you make yourself.", no_args_is_help=True)

# What every study takes.
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Write JSON, pictures and an HTML page into this folder, named as the verb."),
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write every number into this file.")]
PictureFile = Annotated[Path | None, typer.Option("--picture", help="Draw into this PNG; further ones beside it.")]
Data = Annotated[
    Path | None, typer.Option("--data", help="A folder, each entry a kind. Default: the standard library's sources.")
]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda ... Default: a GPU if there is one.")]
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


@study.command("balance")
def study_balancing(
    seeds: Annotated[int | None, typer.Option(help="Runs of each variant, with seeds 0, 1 ... Default: 3.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of each run. Default: 100.")] = None,
    batch: Annotated[int | None, typer.Option(help="Tokens of a step. Default: 2048.")] = None,
    sequence: Annotated[int | None, typer.Option(help="Tokens of the longest sequence. Default: 256.")] = None,
    text: Annotated[int | None, typer.Option(help="Bytes of each kind of text. Default: 200000.")] = None,
    width: Annotated[int | None, typer.Option(help="Of the model. Default: 128.")] = None,
    layers: Annotated[int | None, typer.Option(help="The first is dense. Default: 4.")] = None,
    experts: Annotated[int | None, typer.Option(help="Of a layer. Default: 16.")] = None,
    chosen: Annotated[int | None, typer.Option(help="Experts that a token picks. Default: 4.")] = None,
    vocab: Annotated[int | None, typer.Option(help="Tokens of the vocabulary. Default: 2048.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Weight of the auxiliary losses. Default: 0.01.")] = None,
    speed: Annotated[float | None, typer.Option(help="Of the biases, a step. Default: 0.01.")] = None,
    lr: Annotated[float | None, typer.Option(help="The highest learning rate. Default: 0.003.")] = None,
    data: Data = None,
    device: Device = None,
    work: Annotated[Path, typer.Option(help="Keeps the runs; begun again, the study trains the others.")] = Path(
        "runs/study-balance"
    ),
    out: Out = None,
    json_file: JsonFile = None,
    picture: PictureFile = None,
    quick: Quick = False,
) -> None:
    """No balance, an auxiliary loss, a sequence-wise one, auxiliary-loss-free: MaxVio, loss, specialisation.

    Five variants of a small model are trained one after the other, each with every seed.
    """
    from abyssal.study.balance import Settings, study_balance
    from abyssal.study.output import Places

    places = Places(out, json_file, picture)
    given: dict[str, Any] = {
        "seeds": seeds, "steps": steps, "batch": batch, "sequence": sequence, "text": text, "width": width,
        "layers": layers, "experts": experts, "chosen": chosen, "vocab": vocab, "alpha": alpha, "speed": speed,
        "lr": lr, "data": data, "device": device,
    }  # fmt: skip
    settings = changed(Settings.quick() if quick else Settings(), given)
    result = study_balance(settings, work, command(), Console(stderr=True))
    show(result, places)


@study.command("attention")
def study_attentions(
    seeds: Annotated[int | None, typer.Option(help="Runs of each rung, with seeds 0, 1 ... Default: 3.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of each run. Default: 140.")] = None,
    batch: Annotated[int | None, typer.Option(help="Tokens of a step. Default: 1024.")] = None,
    sequence: Annotated[int | None, typer.Option(help="Tokens of the longest sequence. Default: 256.")] = None,
    text: Annotated[int | None, typer.Option(help="Bytes of each kind of text. Default: 200000.")] = None,
    width: Annotated[int | None, typer.Option(help="Of the model. Default: 128.")] = None,
    layers: Annotated[int | None, typer.Option(help="All dense. Default: 4.")] = None,
    heads: Annotated[int | None, typer.Option(help="Of a layer; MLA's widths follow from theirs. Default: 8.")] = None,
    groups: Annotated[int | None, typer.Option(help="Of GQA. Default: 2.")] = None,
    vocab: Annotated[int | None, typer.Option(help="Tokens of the vocabulary. Default: 2048.")] = None,
    lr: Annotated[float | None, typer.Option(help="The highest learning rate. Default: 0.003.")] = None,
    context: Annotated[
        str | None, typer.Option(help="At which a token is decoded. Default: 256,1024,4096,16384.")
    ] = None,
    data: Data = None,
    device: Annotated[
        str | None, typer.Option(help="That trains: cpu, cuda ... Default: a GPU if there is one. Times are a CPU's.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Keeps the runs; begun again, the study trains the others.")] = Path(
        "runs/study-attention"
    ),
    out: Out = None,
    json_file: JsonFile = None,
    picture: PictureFile = None,
    quick: Quick = False,
) -> None:
    """MHA, GQA, MQA and three of MLA at equal parameters: prediction, cache, decoding speed, heads, the algebra.

    Six variants of a small model are trained one after the other, each with every seed; then they decode.
    """
    from abyssal.study.attention import Settings, study_attention
    from abyssal.study.output import Places, ints

    places = Places(out, json_file, picture)
    given: dict[str, Any] = {
        "seeds": seeds, "steps": steps, "batch": batch, "sequence": sequence, "text": text, "width": width,
        "layers": layers, "heads": heads, "groups": groups, "vocab": vocab, "lr": lr, "data": data, "device": device,
        "contexts": ints("--context", context) if context is not None else None,
    }  # fmt: skip
    settings = changed(Settings.quick() if quick else Settings(), given)
    result = study_attention(settings, work, command(), Console(stderr=True))
    show(result, places)


@study.command("experts")
def study_experts_shapes(
    seeds: Annotated[int | None, typer.Option(help="Runs of each shape, with seeds 0, 1 ... Default: 3.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of each run. Default: 80.")] = None,
    batch: Annotated[int | None, typer.Option(help="Tokens of a step. Default: 2048.")] = None,
    sequence: Annotated[int | None, typer.Option(help="Tokens of the longest sequence. Default: 128.")] = None,
    text: Annotated[int | None, typer.Option(help="Bytes of each kind of text. Default: 600000.")] = None,
    width: Annotated[int | None, typer.Option(help="Of the model. Default: 128.")] = None,
    layers: Annotated[int | None, typer.Option(help="All have experts. Default: 3.")] = None,
    experts: Annotated[int | None, typer.Option(help="Large ones of a layer. Default: 16.")] = None,
    chosen: Annotated[int | None, typer.Option(help="Large ones that a token picks. Default: 2.")] = None,
    expert_width: Annotated[int | None, typer.Option(help="Of a large one. Default: 128.")] = None,
    parts: Annotated[int | None, typer.Option(help="Small ones that a large one is cut into. Default: 4.")] = None,
    vocab: Annotated[int | None, typer.Option(help="Tokens of the vocabulary. Default: 1024.")] = None,
    speed: Annotated[float | None, typer.Option(help="Of the balancing biases, a step. Default: 0.01.")] = None,
    lr: Annotated[float | None, typer.Option(help="The highest learning rate. Default: 0.003.")] = None,
    data: Data = None,
    device: Device = None,
    work: Annotated[Path, typer.Option(help="Keeps the runs; begun again, the study trains the others.")] = Path(
        "runs/study-experts"
    ),
    out: Out = None,
    json_file: JsonFile = None,
    picture: PictureFile = None,
    quick: Quick = False,
) -> None:
    """Few large experts or many small ones, with and without a shared one, at equal parameters.

    Bits a byte over seeds, what each expert takes, and what it costs to take experts out of the trained models.
    """
    from abyssal.study.experts import Settings, study_experts
    from abyssal.study.output import Places

    places = Places(out, json_file, picture)
    given: dict[str, Any] = {
        "seeds": seeds, "steps": steps, "batch": batch, "sequence": sequence, "text": text, "width": width,
        "layers": layers, "experts": experts, "chosen": chosen, "expert_width": expert_width, "parts": parts,
        "vocab": vocab, "speed": speed, "lr": lr, "data": data, "device": device,
    }  # fmt: skip
    settings = changed(Settings.quick() if quick else Settings(), given)
    result = study_experts(settings, work, command(), Console(stderr=True))
    show(result, places)


@study.command("positions")
def study_places(
    seeds: Annotated[int | None, typer.Option(help="Runs of each kind, with seeds 0, 1 ... Default: 3.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of each run. Default: 350.")] = None,
    batch: Annotated[int | None, typer.Option(help="Tokens of a step. Default: 1024.")] = None,
    sequence: Annotated[int | None, typer.Option(help="The trained length, in tokens. Default: 64.")] = None,
    reach: Annotated[
        int | None, typer.Option(help="Trained lengths of the texts that are measured: 2, 4, 8 ... Default: 4.")
    ] = None,
    text: Annotated[int | None, typer.Option(help="Bytes of each kind of text. Default: 500000.")] = None,
    width: Annotated[int | None, typer.Option(help="Of the model, a multiple of 32. Default: 128.")] = None,
    layers: Annotated[int | None, typer.Option(help="Of the model. Default: 2.")] = None,
    rotary: Annotated[int | None, typer.Option(help="Of a head's 32 dimensions, decoupled ones. Default: 12.")] = None,
    vocab: Annotated[int | None, typer.Option(help="Tokens of the vocabulary. Default: 1024.")] = None,
    lr: Annotated[float | None, typer.Option(help="The highest learning rate. Default: 0.006.")] = None,
    data: Data = None,
    device: Device = None,
    work: Annotated[Path, typer.Option(help="Keeps the runs; begun again, the study trains the others.")] = Path(
        "runs/study-positions"
    ),
    out: Out = None,
    json_file: JsonFile = None,
    picture: PictureFile = None,
    quick: Quick = False,
) -> None:
    """None, integer, binary, sinusoidal, RoPE, decoupled RoPE: loss by position, longer texts, YaRN, the encodings.

    Six kinds of a small model are trained one after the other, each with every seed.
    """
    from abyssal.study.output import Places
    from abyssal.study.positions import Settings, study_positions

    places = Places(out, json_file, picture)
    given: dict[str, Any] = {
        "seeds": seeds, "steps": steps, "batch": batch, "sequence": sequence, "reach": reach, "text": text,
        "width": width, "layers": layers, "rotary": rotary, "vocab": vocab, "lr": lr, "data": data, "device": device,
    }  # fmt: skip
    settings = changed(Settings.quick() if quick else Settings(), given)
    result = study_positions(settings, work, command(), Console(stderr=True))
    show(result, places)


@study.command("prediction")
def study_predictions(
    seeds: Annotated[int | None, typer.Option(help="Runs of each variant, with seeds 0, 1 ... Default: 3.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of each run. Default: 120.")] = None,
    batch: Annotated[int | None, typer.Option(help="Tokens of a step. Default: 1024.")] = None,
    sequence: Annotated[int | None, typer.Option(help="Tokens of the longest sequence. Default: 256.")] = None,
    text: Annotated[int | None, typer.Option(help="Bytes of each kind of text. Default: 200000.")] = None,
    width: Annotated[int | None, typer.Option(help="Of the model. Default: 128.")] = None,
    layers: Annotated[int | None, typer.Option(help="The first is dense. Default: 4.")] = None,
    vocab: Annotated[int | None, typer.Option(help="Tokens of the vocabulary. Default: 2048.")] = None,
    weight: Annotated[float | None, typer.Option(help="Of the MTP loss. Default: 0.3.")] = None,
    lr: Annotated[float | None, typer.Option(help="The highest learning rate. Default: 0.003.")] = None,
    texts: Annotated[int | None, typer.Option(help="Of each kind, that the engine goes on from. Default: 8.")] = None,
    generate: Annotated[int | None, typer.Option(help="Tokens of each. Default: 64.")] = None,
    batches: Annotated[str | None, typer.Option(help="Texts at once, where speed is measured. Default: 1,8.")] = None,
    data: Data = None,
    device: Device = None,
    work: Annotated[Path, typer.Option(help="Keeps the runs; begun again, the study trains the others.")] = Path(
        "runs/study-prediction"
    ),
    out: Out = None,
    json_file: JsonFile = None,
    picture: PictureFile = None,
    quick: Quick = False,
) -> None:
    """With and without MTP: the main model, the drafts accepted by kind and position, the speed gained or lost.

    Three variants of a small model are trained one after the other, each with every seed; then the engine drafts.
    """
    from abyssal.study.output import Places, ints
    from abyssal.study.prediction import Settings, study_prediction

    places = Places(out, json_file, picture)
    given: dict[str, Any] = {
        "seeds": seeds, "steps": steps, "batch": batch, "sequence": sequence, "text": text, "width": width,
        "layers": layers, "vocab": vocab, "weight": weight, "lr": lr, "texts": texts, "generate": generate,
        "batches": None if batches is None else ints("--batches", batches), "data": data, "device": device,
    }  # fmt: skip
    settings = changed(Settings.quick() if quick else Settings(), given)
    result = study_prediction(settings, work, command(), Console(stderr=True))
    show(result, places)


@study.command("all")
def study_everything(
    out: Annotated[Path, typer.Option("--out", help="Gets every study's files, and index.html: a page of them all.")],
    only: Annotated[str | None, typer.Option(help="Studies to run, with commas: cache,balance. Default: all.")] = None,
    work: Annotated[Path, typer.Option(help="Keeps what is trained, as the studies' own commands do.")] = Path("runs"),
    quick: Quick = False,
) -> None:
    """Every study in order, at its default size, and one page of all of them to show.

    Begun again, it takes what is there with the same settings and makes the rest. A study that fails does not stop the
    others; the exit code is then 1.
    """
    from abyssal.study.everything import INDEX, chosen, run_all, studies
    from abyssal.study.output import Places

    Places(out)
    console = Console(stderr=True)
    every = studies(quick)
    failed = run_all(every, chosen(every, only), out, work, quick, console)
    console.print(f"written: {out / INDEX}", highlight=False, soft_wrap=True)
    if failed:
        told = ", ".join(failed)
        console.print(f"abyssal: failed: {told}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1)


def changed(settings: S, given: dict[str, Any]) -> S:
    """A study's settings, with those of the options that were given."""
    return replace(settings, **{name: value for name, value in given.items() if value is not None})


def command() -> str:
    """The line that this process was started with."""
    return shlex.join(["abyssal", *sys.argv[1:]])


def show(result: "Result", places: "Places") -> None:
    """Prints a result, writes what is wanted of it, and says where."""
    console = Console() if sys.stdout.isatty() else Console(width=132)  # 80 columns would fold every cell
    console.print(result.render())
    for path in places.write(result):
        Console(stderr=True).print(f"written: {path}", highlight=False, soft_wrap=True)
