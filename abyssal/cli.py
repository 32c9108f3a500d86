"""`abyssal VERB`: one verb a stage. What a verb does lives in its own room; here are its words."""

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from abyssal.bench.verbs import bench
from abyssal.evaluate.verbs import Verb, evaluate
from abyssal.files import model_folder
from abyssal.study.verbs import study

if TYPE_CHECKING:
    from abyssal.engine import LLM, Piece, Totals
    from abyssal.train import TrainConfig

app = typer.Typer(
    help="DeepSeek-V3, whole: inspect, train, plan, export, generate, chat, serve, eval, study, bench.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")
app.command("eval", cls=Verb)(evaluate)
app.add_typer(study, name="study")

Model = Annotated[str, typer.Argument(help="A checkpoint's folder, a run's folder, or a hub id.", metavar="MODEL")]
MaxTokens = Annotated[int, typer.Option(help="Tokens to generate at most.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TopK = Annotated[int, typer.Option(help="Only the k likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Only the likeliest tokens that together reach p.")]
MinP = Annotated[float, typer.Option(help="Only tokens of at least this share of the likeliest's probability.")]
Seed = Annotated[int | None, typer.Option(help="The same seed, the same text.")]
Speculation = Annotated[bool, typer.Option(help="Draft with the MTP modules, where the model has them.")]
Drafts = Annotated[int | None, typer.Option(help="Tokens to draft a step. [default: one a module]")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float64. [default: as stored]")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
Compile = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="Compile the decoding step. [default: where it pays]"),
]


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A preset's name, or a folder with a config.json.")],
    context: Annotated[int, typer.Option(help="Tokens of context that FLOPs are counted at.")] = 4096,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw parameters and cache into this PNG, too.")] = None,
) -> None:
    """Parameters, FLOPs, weight bytes and cache bytes of a model, allocating nothing."""
    from abyssal.config import ModelConfig
    from abyssal.costs import inspect

    costs = inspect(ModelConfig.load(model_folder(model)), context)
    if as_json:
        print(json.dumps(costs.to_dict(), indent=2))
    else:
        Console().print(costs.render())
    if picture is not None:
        from abyssal.costs_picture import draw

        draw(costs, model, picture)
        Console(stderr=True).print(f"picture: {picture}", highlight=False, soft_wrap=True)


@app.command()
def train(
    run: Annotated[str, typer.Argument(help="A packaged run (small, tiny), a TOML or JSON file, or a run's folder.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="KEY=VALUE or model.KEY=VALUE, as many as wanted.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run's newest state; begin where there is none.")
    ] = False,
    mesh: Annotated[
        str | None, typer.Option(help="Ranks by axis: dp=2,ep=2 of pp, dp, ep, cp and tp; under torchrun.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Profile a few early steps: a Chrome trace and a table in OUT/profile.")
    ] = False,
) -> None:
    """Train a model, with progress, states to resume from, metrics and a picture at the end.

    On many devices: torchrun --nproc-per-node 4 -m abyssal train RUN --mesh dp=2,ep=2. A run may be resumed on another
    mesh, or without one. With torchrun's --max-restarts give --resume: a run that lost a rank then goes on by itself.
    """
    from abyssal.parallel.mesh import leave
    from abyssal.train import TrainConfig
    from abyssal.train import train as run_training

    named = [] if mesh is None else [f"mesh={json.dumps(mesh)}"]
    named += ["profile=true"] if profile else []
    config = TrainConfig.read(run, [*(settings or ()), *named])
    _tell_memory(config)
    result = run_training(config, resume=resume)
    leave()
    if result.interrupted is not None:
        raise typer.Exit(128 + result.interrupted)


def _tell_memory(config: "TrainConfig") -> None:
    """Says what a GPU will hold, before anything is built on it."""
    import torch

    on_gpu = torch.cuda.is_available() and (config.device or "cuda").startswith("cuda")
    if not on_gpu or os.environ.get("RANK", "0") != "0":  # of several processes, the first
        return
    from abyssal.plan import plan as make_plan
    from abyssal.plan.report import memory_line

    console = Console()
    try:
        with console.status("planning memory"):
            made = make_plan(config)
    except Exception as error:  # a plan is a help; what is wrong with the run itself is told by the run
        console.print(f"no plan of the memory: {error}", highlight=False, soft_wrap=True)
        return
    capacity = torch.cuda.get_device_properties(0).total_memory
    console.print(memory_line(made, capacity), highlight=False, soft_wrap=True)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A preset's name, or a folder with a config.json.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="KEY=VALUE of `abyssal train`, as many as wanted.")
    ] = None,
    gpus: Annotated[int, typer.Option(help="How many GPUs.")] = 1,
    mesh: Annotated[
        str | None, typer.Option(help="Ranks by axis: pp=16,dp=2,ep=64. [default: dp over all GPUs]")
    ] = None,
    stage: Annotated[
        list[int] | None, typer.Option(help="Pipeline stages to walk. [default: the first, middle and last]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw where the memory goes into this PNG, too.")] = None,
) -> None:
    """What training would take, on GPUs that aren't there: memory, traffic, speed, by walking its code on nothing.

    abyssal plan deepseek-v3 --gpus 2048 --mesh pp=16,dp=2,ep=64 schedule=dualpipev batch_tokens=4096 sequence=4096
    accumulate=15360 recompute=up reshard=false
    """
    from abyssal.plan import plan as make_plan
    from abyssal.plan.setup import settings_of

    err = Console(stderr=True)
    made = make_plan(settings_of(model, settings or (), gpus, mesh), stage, lambda text: err.print(text, style="dim"))
    if as_json:
        print(json.dumps(made.to_dict(), indent=2))
    else:
        Console().print(made.render())
    if picture is not None:
        from abyssal.plan.picture import draw

        draw(made, picture)
        err.print(f"picture: {picture}", highlight=False, soft_wrap=True)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A run's folder, for its newest state, or a state's folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to write, in the public format.")],
) -> None:
    """Write a state as a model in the public format, a tensor at a time, however many ranks wrote it."""
    from abyssal.train.export import export as export_state
    from abyssal.train.export import tokenizer_of

    console = Console()
    with Console(stderr=True).status(f"exporting {source}"):
        state = export_state(source, out)
    tokenizer = tokenizer_of(state)
    if tokenizer is not None:
        tokenizer.save(out)
    told = "" if tokenizer is not None else "; without its tokenizer, whose tokens are gone"
    console.print(f"model: {out}, of {state}{told}", highlight=False, soft_wrap=True)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to go on from; give several for a batch.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="One prompt a line instead.")] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens seen before are less likely.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Text at which to stop; may be given several times.")] = None,
    seed: Seed = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end of text.")] = False,
    speculation: Speculation = True,
    drafts: Drafts = None,
    batch: Annotated[int, typer.Option(help="Sequences decoded at once.")] = 8,
    dtype: Dtype = None,
    device: Device = "cpu",
    compiled: Compile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object a prompt, instead of text.")] = False,
) -> None:
    """Go on from prompts, with MTP speculation where the model has the layer, and say what it cost."""
    from abyssal.engine import Sampling

    if prompt_file is not None:
        prompts = [line for line in prompt_file.read_text("utf-8").split("\n") if line]
    else:
        prompts = prompt or []
    if not prompts:
        raise ValueError("prompt: expected --prompt TEXT or --prompt-file FILE")
    sampling = Sampling(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
        repetition_penalty=repetition_penalty, stop=tuple(stop or ()), ignore_eos=ignore_eos,
    )  # fmt: skip
    llm = _llm(model, dtype, device, batch, speculation, drafts, compiled, quiet=as_json)
    pieces, failed = llm.stream(prompts, sampling), list[str]()
    if as_json:
        outputs = sorted((p for p in pieces if p.output is not None), key=lambda p: p.index)
        for piece in outputs:
            print(json.dumps(_report(piece, llm.totals), ensure_ascii=False))
        return
    if len(prompts) == 1:
        sys.stdout.write(prompts[0])
        _show(pieces)
    else:
        for piece in sorted((p for p in pieces if p.output is not None), key=lambda p: p.index):
            assert piece.output is not None
            print(f"--- {piece.index}: {prompts[piece.index]}{piece.output.text}")
            if piece.output.error:
                failed.append(f"prompt {piece.index}: {piece.output.error}")
    if failed:
        raise ValueError("; ".join(failed))
    Console(stderr=True).print(_costs(llm.totals))


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.6,
    top_p: TopP = 0.95,
    seed: Seed = None,
    speculation: Speculation = True,
    dtype: Dtype = None,
    device: Device = "cpu",
    compiled: Compile = None,
) -> None:
    """Talk with a model by its own chat template. An empty line or Ctrl-D ends it; Ctrl-C stops an answer."""
    from abyssal.engine import Sampling

    llm = _llm(model, dtype, device, 1, speculation, None, compiled, quiet=False)
    messages = [{"role": "system", "content": system}] if system else []
    room = llm.model.config.max_position_embeddings
    sampling = Sampling(max_tokens=min(max_tokens, room // 2), temperature=temperature, top_p=top_p, seed=seed)
    while line := _ask("> "):
        messages.append({"role": "user", "content": line})
        answer = _show(llm.chat(messages, sampling))
        messages.append({"role": "assistant", "content": answer})
        rate = llm.totals.acceptance
        said = f"{llm.totals.tokens_per_second:.1f} tokens/s" + (f", {rate:.0%} of drafts accepted" if rate else "")
        Console(stderr=True).print(f"[dim]{said}[/dim]")


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Where to listen; beyond this machine only with an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model. [default: its folder's name]")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="API keys, one a line. [default: the one in ABYSSAL_API_KEY, or none]")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen anywhere without an API key.")] = False,
    drain: Annotated[float, typer.Option(help="Seconds that running requests have after SIGTERM.", min=0)] = 30.0,
    limit: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE of a limit in docs/serving.md; may be given several times.")
    ] = None,
    cache_dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or fp8. [default: as the weights]")] = None,
    cache_bytes: Annotated[int | None, typer.Option(help="Of the latent cache. [default: of what is free]")] = None,
    max_running: Annotated[int, typer.Option(help="Sequences decoded at once.")] = 64,
    max_context: Annotated[int | None, typer.Option(help="Tokens of a sequence. [default: the model's]")] = None,
    step_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a step, prompts too. [default: 2048 on a CPU, 8192 on a GPU]", min=1),
    ] = None,
    prefix_cache: Annotated[bool, typer.Option(help="Keep the latents of prompts for others that begin alike.")] = True,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="The same text whatever else runs, on a GPU too.")
    ] = False,
    speculation: Speculation = True,
    drafts: Drafts = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    compiled: Compile = False,
) -> None:
    """Answer OpenAI's API and show a page, until SIGTERM. Exits with 1 if the engine ends by itself."""
    try:
        from abyssal.serve.run import Address, serve
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; pip install 'abyssal[serve]'") from error
    from abyssal.engine.client import EngineSettings
    from abyssal.serve.auth import Keys
    from abyssal.serve.limits import Limits

    settings = EngineSettings(
        model=model_folder(model),
        device=device,
        dtype=_one_of("dtype", dtype, "float32", "bfloat16", "float64"),
        cache_dtype=_one_of("cache-dtype", cache_dtype, "float32", "bfloat16", "fp8"),
        cache_bytes=cache_bytes,
        max_running=max_running,
        max_context=max_context,
        step_tokens=step_tokens,
        drafts=drafts if speculation else 0,
        prefix_cache=prefix_cache,
        deterministic=deterministic,
        compiled=bool(compiled),
    )
    limits = Limits().changed(limit or ())
    code = serve(settings, name, Address(host, port, Keys.find(api_key_file), insecure), limits, drain)
    if code:  # at once: a supervisor waits to start another, and tearing an interpreter down takes its time
        sys.stderr.flush()
        os._exit(code)


def _ask(mark: str) -> str:
    try:
        return input(mark).strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def _show(pieces: Any) -> str:
    """Prints text as it comes; Ctrl-C ends it."""
    text = ""
    try:
        for piece in pieces:
            text += piece.text
            sys.stdout.write(piece.text)
            sys.stdout.flush()
            if piece.output is not None and piece.output.error:
                raise ValueError(piece.output.error)
    except KeyboardInterrupt:
        pass
    print()
    return text


def _one_of(name: str, value: str | None, *allowed: str) -> Any:
    if value is not None and value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    return value


def _llm(
    model: str,
    dtype: str | None,
    device: str,
    batch: int,
    speculation: bool,
    drafts: int | None,
    compiled: bool | None,
    quiet: bool,
) -> "LLM":
    import torch

    from abyssal.engine import LLM

    if dtype not in (None, "float32", "bfloat16", "float64"):
        raise ValueError(f"dtype: expected float32, bfloat16 or float64, got {dtype!r}")
    folder = model_folder(model)
    with Console(stderr=True, quiet=quiet).status(f"loading {folder}"):
        return LLM(
            folder,
            dtype=getattr(torch, dtype) if dtype else None,
            device=device,
            max_batch=batch,
            drafts=drafts if speculation else 0,
            compiled=compiled,
            say=(lambda text: None) if quiet else None,
        )


def _report(piece: "Piece", totals: "Totals") -> dict[str, Any]:
    output = piece.output
    assert output is not None
    return {
        "text": output.text,
        "tokens": output.tokens,
        "finish": output.finish,
        "error": output.error,
        "tokens_per_second": totals.tokens_per_second,
        "acceptance": totals.acceptance,
        "cache_bytes": totals.cache_bytes,
        "mha_cache_bytes": totals.mha_cache_bytes,
    }


def _costs(totals: "Totals") -> Table:
    table = Table(title="What it cost", title_justify="left", title_style="bold", show_header=False, show_edge=False)
    speed = totals.tokens_per_second
    table.add_row("generated", f"{totals.tokens} tokens, {speed:.1f} tokens/s")
    table.add_row("prompt", f"{totals.prompt_tokens} tokens in {totals.prefill_seconds:.2f} s")
    if totals.acceptance is not None:
        per_step = totals.tokens / max(totals.steps, 1)
        table.add_row("drafts accepted", f"{totals.acceptance:.0%}, {per_step:.2f} tokens a step")
    table.add_row("latent cache", f"{totals.cache_bytes:,} bytes allocated")
    ratio = totals.mha_cache_bytes / max(totals.cache_bytes, 1)
    table.add_row("MHA would take", f"{totals.mha_cache_bytes:,} bytes, {ratio:.1f} times as much")
    return table


def _diverged(error: Exception) -> bool:
    """Whether a run met a number that is not finite. Only then has its room, and PyTorch, been imported."""
    room = sys.modules.get("abyssal.train.diagnose")
    return room is not None and isinstance(error, room.NotFinite)


def main() -> None:
    """The command line. An error that names its cause is one line and exit code 2; others are tracebacks."""
    from abyssal.config import ConfigError

    try:
        app()
    except (ValueError, TypeError, FileNotFoundError, FileExistsError, ArithmeticError) as error:
        diverged = _diverged(error)
        if os.environ.get("ABYSSAL_TRACEBACK") or (isinstance(error, ArithmeticError) and not diverged):
            raise
        if (diverged or isinstance(error, ConfigError | FileExistsError)) and os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # when one rank ends torchrun ends the others, and the first has yet to tell
            sys.exit(2)  # what every rank found is told once
        Console(stderr=True).print(f"abyssal: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
