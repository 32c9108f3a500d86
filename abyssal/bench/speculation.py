"""`abyssal bench speculation`: what drafting with the MTP modules gives on a trained model, at its own acceptance."""

import json
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from abyssal.checkpoint import load
from abyssal.data.tokenizer import Tokenizer
from abyssal.engine import LLM, Sampling

PASSES = 3  # alternating, of which the median counts


@dataclass(frozen=True)
class Speculated:
    """One batch size and number of drafts; ratios are to no drafts at the same batch."""

    batch: int
    drafts: int
    tokens_per_second: float
    ratio: float
    acceptance: list[float]  # by position
    tokens_per_step: float


def bench_speculation(
    folder: Path, device: str, batches: list[int], drafts: list[int], tokens: int, compiled: bool,
    json_path: Path | None = None,
) -> list[Speculated]:  # fmt: skip
    """Greedy texts that go on from the beginnings of the standard library's own files. Raises ValueError where the
    model has no MTP module."""
    model = load(folder, device=device)
    tokenizer = Tokenizer.load(folder)
    if not len(model.mtp):
        raise ValueError(f"{folder}: has no MTP module")
    found = []
    for batch in batches:
        prompts = _prompts(tokenizer, batch)
        engines = {
            k: LLM(model, tokenizer=tokenizer, max_batch=batch, drafts=k, adapt=False, compiled=compiled,
                   prefix_cache=False, max_context=512 + tokens, cache_bytes=64 << 20)
            for k in [0, *drafts]
        }  # fmt: skip
        rates: dict[int, list[float]] = {k: [] for k in engines}
        texts = set()
        for once in range(PASSES + 1):
            for k, llm in engines.items():
                outputs = llm.generate(prompts, Sampling(max_tokens=tokens, temperature=0, ignore_eos=True))
                if once:  # the first pass compiles
                    rates[k].append(llm.totals.tokens_per_second)
                texts.add(tuple(tuple(o.tokens) for o in outputs))
        for k, llm in engines.items():
            t, rate = llm.totals, median(rates[k])
            share = [a / max(d, 1) for a, d in zip(t.accepted_at, t.drafted_at)]
            a_step = 1 + sum(t.accepted_at) / max(t.drafted_at[0] if t.drafted_at else 1, 1)
            found.append(Speculated(batch, k, rate, rate / median(rates[0]), share, a_step))
        print(f"batch {batch}: {'the same text with and without drafts' if len(texts) == 1 else 'texts differ'}")
    Console().print(render(found))
    if json_path is not None:
        json_path.write_text(json.dumps([asdict(row) for row in found], indent=1))
    return found


def render(rows: list[Speculated]) -> Table:
    table = Table(title="Speculation with the MTP modules, greedy")
    for name in ("batch", "drafts", "tokens/s", "ratio", "accepted, by position", "tokens a step"):
        table.add_column(name, justify="right")
    for row in rows:
        shares = ", ".join(f"{share:.0%}" for share in row.acceptance)
        table.add_row(
            str(row.batch), str(row.drafts), f"{row.tokens_per_second:,.1f}", f"{row.ratio:.2f}", shares,
            f"{row.tokens_per_step:.2f}",
        )  # fmt: skip
    return table


def _prompts(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    long = [f for f in files if f.stat().st_size > 4000]
    step = max(len(long) // count, 1)
    return [tokenizer.encode(f.read_text("utf-8", "replace")[:2000])[:256] for f in long[::step][:count]]
