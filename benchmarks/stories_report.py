"""What became of a training run: held-out bits a byte, balance, MTP acceptance, samples, and transformers' logits.

    python benchmarks/stories_report.py RUN [--data TOKENS] [--device cuda] [--json F] [--markdown F] [--picture F]

RUN is the folder of a run that has ended. Its token set is read from where the run found it, or from --data. The
model is measured in bfloat16 on a GPU and as it is stored on a CPU. transformers (5.x; left out where it isn't
installed) reads the same folder in float32 on the CPU, ours beside it in float32, too.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from abyssal.bench.machine import device_name, versions
from abyssal.checkpoint import load
from abyssal.data import Tokenizer, TokenSet, validation_batches
from abyssal.engine import LLM, Sampling
from abyssal.model.objective import Measured, Microbatch
from abyssal.model.packing import shift
from abyssal.model.transformer import Transformer
from abyssal.train import TrainConfig, read_metrics
from abyssal.train.corpus import open_corpus
from abyssal.train.loop import METRICS, MODEL
from abyssal.train.picture import draw_curves
from abyssal.train.validation import Validator

PROMPTS = (
    "It is a truth universally acknowledged, that",
    "CHAPTER I\n\nMiss Bennet",
    "Anarchists argue that",
    "The kernel's scheduler",
    "CREATE TABLE weather (",
    ".. function:: sorted(iterable",
    "Whale \\Whale\\, n.",
    "database\n\n   <",
)
TEMPERATURES = (0.0, 0.8)
DRAFTS = 3  # the last module drafts from its own states where there are fewer modules
DRAFT_PROMPT = 64  # tokens of a held-out document, before those that are drafted
CHUNK = 4096  # rows of logits at a time


class Sizes(NamedTuple):
    """How much is looked at."""

    held_out: int = 1 << 40  # tokens, at most
    agreement: int = 262_144  # held-out tokens, at most
    texts: int = 32  # that are drafted
    tokens: int = 128  # of a text that is drafted
    sample: int = 96  # tokens
    compared: int = 8  # held-out sequences that transformers reads
    compared_length: int = 512  # their most tokens


QUICK = Sizes(4096, 2048, 4, 24, 16, 2, 64)


@dataclass(frozen=True)
class Balance:
    """How far each layer's busiest expert is above the mean; 0 is perfect."""

    held_out: list[float]  # a layer with experts, over all held-out text
    training: list[float]  # a gate, the MTP modules' last: the median over the last tenth of the steps told of


@dataclass(frozen=True)
class Acceptance:
    """How often what an MTP module predicts is what the model itself says; a list by place in the draft."""

    agreement: list[float]  # on held-out text, both greedy; a module
    accuracy: list[float]  # of the prediction against the text itself: the model's own first, then a module's
    greedy: list[float]  # of the engine's drafts, those accepted up to this place, at temperature 0
    sampled: list[float]  # temperature 0.8
    tokens_a_step: list[float]  # greedy, sampled: tokens that a pass of the engine decodes for a text


@dataclass(frozen=True)
class Sample:
    prompt: str
    temperature: float
    text: str


@dataclass(frozen=True)
class Parity:
    """Logits of ours and of transformers on the same folder, in float32."""

    transformers: str
    tokens: int
    largest_difference: float
    largest_logit: float
    same_token: float  # the share of places at which both have the same likeliest token


@dataclass(frozen=True)
class Report:
    model: str
    device: str
    dtype: str
    versions: dict[str, str | None]
    parameters: int  # with the MTP modules'
    steps: int
    tokens: int  # trained on
    epochs: float
    seconds: float  # of training
    tokens_per_second: float  # the median of those told
    held_out_tokens: int
    held_out_loss: float  # nats a token
    bits_per_byte: float
    balance: Balance
    acceptance: Acceptance | None  # None: no MTP modules
    samples: list[Sample]
    parity: Parity | None  # None: transformers isn't installed


def report(run: Path, data: Path | None, device: str, sizes: Sizes) -> Report:
    """Raises FileNotFoundError where the run has not ended."""
    config = TrainConfig.read(run, [] if data is None else [f"data={data.absolute()}"])
    if not (run / MODEL / "config.json").is_file():
        raise FileNotFoundError(f"{run / MODEL}: no model; expected a run that has ended")
    token_set = open_corpus(config, config.model_settings(), Console(stderr=True), made=True)
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else None
    model = load(run / MODEL, dtype=dtype, device=device).eval().requires_grad_(False)
    records = read_metrics(run / METRICS)
    split = token_set.split("validation")
    where = torch.device(device)
    most = min(split.tokens, sizes.held_out)
    found = Validator(token_set, most, config.batch_tokens, config.sequence).measure(
        lambda micro: Measured.of(model, micro.to(where))
    )
    late = records[-max(len(records) // 10, 1) :]
    return Report(
        model=config.model,
        device=device_name(device),
        dtype=str(model.embed.weight.dtype).removeprefix("torch."),
        versions=versions(torch.device(device).type == "cuda"),
        parameters=sum(p.numel() for p in model.parameters()),
        steps=records[-1]["step"],
        tokens=records[-1]["tokens"],
        epochs=records[-1]["tokens"] / token_set.split("train").tokens,
        seconds=records[-1]["seconds"],
        tokens_per_second=statistics.median(r["tokens_per_second"] for r in records),
        held_out_tokens=found.tokens,
        held_out_loss=found.loss,
        bits_per_byte=found.bits_per_byte,
        balance=Balance(
            [max(load) - 1 for load in found.expert_load],
            [statistics.median(column) for column in zip(*(r["max_violation"] for r in late))],
        ),
        # In this order: the engine makes the model its own.
        acceptance=acceptance(model, token_set, config, sizes) if len(model.mtp) else None,
        samples=samples(model, Tokenizer.load(token_set.tokenizer), sizes),
        parity=parity(run / MODEL, token_set, sizes),
    )


# ---- multi-token prediction ---------------------------------------------------------------------------------


def acceptance(model: Transformer, token_set: TokenSet, config: TrainConfig, sizes: Sizes) -> Acceptance:
    agreement, accuracy = agreements(model, token_set, config, sizes.agreement)
    (greedy, a), (sampled, b) = (drafted(model, token_set, t, sizes) for t in TEMPERATURES)
    return Acceptance(agreement, accuracy, greedy, sampled, [a, b])


@torch.no_grad()
def agreements(
    model: Transformer, token_set: TokenSet, config: TrainConfig, most: int
) -> tuple[list[float], list[float]]:
    """Teacher-forced, both in the dtype of the model: the modules against the model, and each against the text."""
    modules, device = len(model.mtp), model.embed.weight.device
    agreed, places = torch.zeros(modules), torch.zeros(modules)
    right, targets = torch.zeros(1 + modules), torch.zeros(1 + modules)
    batches = validation_batches(token_set.split("validation"), config.batch_tokens, config.sequence)
    for batch in islice(batches, max(most // config.batch_tokens, 1)):
        micro = Microbatch.of(batch, modules).to(device)
        hidden = model.hidden(micro.tokens, micro.packing)
        predictions = model.predict_states(hidden.states, micro.tokens, micro.packing)
        said = [likeliest(model, states) for states in (hidden.states, *(p.states for p in predictions))]
        for d, ids in enumerate(said):
            there = micro.weights[d] > 0
            right[d] += int((ids == micro.targets[d])[there].sum())
            targets[d] += int(there.sum())
        for d, ids in enumerate(said[1:], start=1):
            own, live = shift(said[0], micro.packing, d)  # what the model says of the token that module d predicts
            agreed[d - 1] += int((ids == own)[live].sum())
            places[d - 1] += int(live.sum())
    return (agreed / places.clamp(min=1)).tolist(), (right / targets.clamp(min=1)).tolist()


def likeliest(model: Transformer, states: Tensor) -> Tensor:
    """[T] ids."""
    return torch.cat([model.logits(rows).argmax(-1) for rows in states.split(CHUNK)])


def drafted(model: Transformer, token_set: TokenSet, temperature: float, sizes: Sizes) -> tuple[list[float], float]:
    """What the engine counts while held-out documents are gone on with."""
    prompts = [ids.tolist() for ids in held_out(token_set, DRAFT_PROMPT, sizes.texts)]
    llm = LLM(
        model, tokenizer=Tokenizer.load(token_set.tokenizer), max_batch=8, drafts=DRAFTS, adapt=False, compiled=False,
        max_context=DRAFT_PROMPT + sizes.tokens + DRAFTS,
    )  # fmt: skip
    # Asked for, since texts with a seed hang on nothing else unless told to.
    asked = Sampling(max_tokens=sizes.tokens, temperature=temperature, ignore_eos=True, speculate=True)
    llm.generate(prompts, [replace(asked, seed=i) for i in range(len(prompts))])
    totals = llm.totals
    shares = [a / max(d, 1) for a, d in zip(totals.accepted_at, totals.drafted_at)]
    return shares, 1 + sum(totals.accepted_at) / max(totals.drafted_at[0], 1)


def held_out(token_set: TokenSet, length: int, count: int) -> Iterator[Tensor]:
    """The first `length` tokens of so many held-out documents that have them, from all over the split."""
    split = token_set.split("validation")
    long = [i for i in range(split.documents) if split.lengths[i] > length]
    for i in long[:: max(len(long) // count, 1)][:count]:
        yield torch.from_numpy(split.document(i)[:length].astype("int64"))


# ---- samples, and transformers ------------------------------------------------------------------------------


def samples(model: Transformer, tokenizer: Tokenizer, sizes: Sizes) -> list[Sample]:
    llm = LLM(model, tokenizer=tokenizer, max_batch=len(PROMPTS), compiled=False, max_context=512)
    found = []
    for t in TEMPERATURES:
        asked = Sampling(max_tokens=sizes.sample, temperature=t)
        outputs = llm.generate(PROMPTS, [replace(asked, seed=i) for i in range(len(PROMPTS))])
        found += [Sample(prompt, t, output.text) for prompt, output in zip(PROMPTS, outputs)]
    return found


@torch.no_grad()
def parity(folder: Path, token_set: TokenSet, sizes: Sizes) -> Parity | None:
    try:
        import transformers
    except ImportError:
        return None
    transformers.logging.set_verbosity_error()  # it lists the tensors of the MTP modules, which it doesn't have
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load(folder, dtype=torch.float32).eval()
    length = min(sizes.compared_length, int(token_set.split("validation").lengths.max()) - 1)
    difference = largest = 0.0
    same = count = 0
    for tokens in held_out(token_set, length, sizes.compared):
        a, b = ours(tokens, [len(tokens)]), theirs(tokens[None]).logits[0].float()
        difference = max(difference, float((a - b).abs().max()))
        largest = max(largest, float(b.abs().max()))
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        count += len(tokens)
    return Parity(transformers.__version__, count, difference, largest, same / max(count, 1))


# ---- how it is told -----------------------------------------------------------------------------------------


def percent(shares: list[float]) -> str:
    return ", ".join(f"{share:.1%}" for share in shares)


def markdown(found: Report) -> str:
    r = found
    places = ", ".join(f"{k} {v}" for k, v in r.versions.items() if v)
    rows = [
        ("measured on", f"{r.device}, {r.dtype}; {places}"),
        ("parameters, MTP counted", f"{r.parameters:,}"),
        ("trained on", f"{r.tokens:,} tokens in {r.steps:,} steps, {r.epochs:.2f} epochs"),
        ("time of training", f"{r.seconds:,.0f} s, {r.tokens_per_second:,.0f} tokens/s (median)"),
        ("held-out text", f"{r.bits_per_byte:.4f} bits a byte, {r.held_out_loss:.4f} nats a token "
                          f"({r.held_out_tokens:,} tokens)"),
        ("MaxVio by layer, held-out text", ", ".join(f"{v:.2f}" for v in r.balance.held_out) or "no experts"),
        ("MaxVio by gate, last tenth of training", ", ".join(f"{v:.2f}" for v in r.balance.training) or "no experts"),
    ]  # fmt: skip
    if r.acceptance is not None:
        a = r.acceptance
        rows += [
            ("next token right, then each MTP module's", percent(a.accuracy)),
            ("MTP module agrees with the model, teacher-forced", percent(a.agreement)),
            ("drafts accepted by the engine, by position, greedy", f"{percent(a.greedy)}; "
                                                                   f"{a.tokens_a_step[0]:.2f} tokens a step"),
            ("the same at temperature 0.8", f"{percent(a.sampled)}; {a.tokens_a_step[1]:.2f} tokens a step"),
        ]  # fmt: skip
    p = r.parity
    if p is not None:
        rows.append((f"logits against transformers {p.transformers}, float32",
                     f"differ by {p.largest_difference:.1e} at most (largest {p.largest_logit:.1f}) over {p.tokens:,} "
                     f"tokens; same likeliest token at {p.same_token:.2%}"))  # fmt: skip
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    for sample in r.samples:
        shown = "".join(f"    {line}\n" for line in (sample.prompt + "┃" + sample.text).splitlines())
        lines += ["", f"Temperature {sample.temperature:g}:", "", shown.rstrip("\n")]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a run that has ended")
    parser.add_argument("--data", type=Path, help="the token set, where it has been moved")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write every number into this file")
    parser.add_argument("--markdown", type=Path, help="write the table and the samples into this file")
    parser.add_argument("--picture", type=Path, help="draw the curves into this PNG")
    parser.add_argument("--quick", action="store_true", help="look at little of everything")
    arguments = parser.parse_args()
    found = report(arguments.run, arguments.data, arguments.device, QUICK if arguments.quick else Sizes())
    told = markdown(found)
    print(told)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(asdict(found), indent=1, ensure_ascii=False) + "\n", "utf-8")
    if arguments.markdown is not None:
        arguments.markdown.write_text(told, "utf-8")
    if arguments.picture is not None:
        draw_curves(
            read_metrics(arguments.run / METRICS), arguments.picture, f"{found.model}, {found.epochs:.1f} epochs"
        )


if __name__ == "__main__":
    main()
