"""What a run of the training benchmark found, and what follows from it.

Tokens a second are a step's tokens over the median step. MFU counts the FLOPs of `train_rows.Flops` and no recomputed
ones, over the 989 TFLOP/s of dense bf16 products that an H100's maker names.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from abyssal.bench.train_rows import DENSE_BF16, Flops, Row, Shape

REFERENCE = "reference-961m"  # the shape that the project's targets are for
PEERS = ("transformers", "torchtitan")


class Claim(NamedTuple):
    """A figure that follows from the rows, and what the project asks of it, if it asks anything here."""

    what: str
    found: str
    asked: str
    met: bool | None


@dataclass
class TrainReport:
    """A run: what it ran on, and its rows."""

    device: str
    date: str
    versions: dict[str, str | None]
    shape: Shape
    flops: Flops
    parameters: int
    rows: list[Row] = field(default_factory=list)

    @property
    def gpu(self) -> bool:
        return self.shape.device.startswith("cuda")

    def row(self, name: str) -> Row | None:
        """One of ours, if it was timed."""
        return next((r for r in self.rows if r.who == "abyssal" and r.name == name and r.step_ms), None)

    def best(self, who: str) -> Row | None:
        """The fastest of a peer's modes."""
        timed = [r for r in self.rows if r.who == who and r.step_ms]
        return max(timed, key=lambda r: r.tokens_per_second or 0.0, default=None)

    def mfu(self, row: Row) -> float | None:
        """Of a row's arithmetic, on a GPU."""
        rate = row.tokens_per_second
        if not self.gpu or rate is None or row.name == "loader alone":
            return None
        return rate * self.arithmetic(row) / DENSE_BF16

    def arithmetic(self, row: Row) -> int:
        """FLOPs a token."""
        flops = Flops.at(self.shape, row.context) if row.context else self.flops
        return flops.mtp if row.name == "mtp" else flops.plain

    def claims(self) -> list[Claim]:
        return _claims(self)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [
            asdict(r)
            | {"tokens_per_second": r.tokens_per_second, "flops_a_token": self.arithmetic(r), "mfu": self.mfu(r)}
            for r in self.rows
        ]
        return {
            "device": self.device, "date": self.date, "versions": self.versions, "shape": asdict(self.shape),
            "parameters": self.parameters, "flops_a_token": self.flops._asdict(), "peak_flops": DENSE_BF16,
            "rows": rows, "claims": [claim._asdict() for claim in self.claims()],
        }  # fmt: skip


def _claims(report: TrainReport) -> list[Claim]:
    base = report.row("base")
    if base is None or not base.tokens_per_second or not base.step_ms:
        return []
    rate, per_token = base.tokens_per_second, base.step_ms / base.tokens
    full = report.shape.model == REFERENCE and any(name in report.device for name in ("H100", "H200"))
    claims = []
    if full:
        claims.append(Claim("tokens/s", f"{rate:,.0f}", "170,000", rate >= 170_000))
        memory = base.memory_gib or 0.0
        claims.append(Claim("peak memory, GiB", f"{memory:.1f}", "under 45", memory < 45))
    for who in PEERS:
        peer = report.best(who)
        if peer is not None and peer.tokens_per_second:
            times = rate / peer.tokens_per_second
            claims.append(Claim(f"times {who}, {peer.name}", f"{times:.2f}", "", None))

    def compare(name: str, what: str, most: float | None, by: float = 1.0) -> None:
        """How much longer a token takes there than `by` times what it takes in the base row."""
        row = report.row(name)
        if row is not None and row.step_ms:
            slower = row.step_ms / row.tokens / per_token / by - 1
            if most is None or not full:
                claims.append(Claim(what, f"{slower:+.1%}", "", None))
            else:
                claims.append(Claim(what, f"{slower:+.1%}", f"at most {most:.0%}", slower <= most))

    adds = report.flops.mtp / report.flops.plain
    compare("mtp", f"MTP's cost beyond the {adds - 1:.1%} of arithmetic it adds", 0.03, adds)
    packed = report.row("packed")
    if packed is not None:
        less = 1 - report.arithmetic(packed) / report.flops.plain
        compare("packed", f"a token in packed documents, {less:.1%} less arithmetic", 0.05)
    accumulated = report.row("accumulated")
    if accumulated is not None:
        compare("accumulated", f"a token in a step of {accumulated.tokens:,} (1%: what timing is good for)", 0.01)
    for row in report.rows:
        if row.name.startswith("recompute"):
            saved = (base.memory_gib or 0.0) - (row.memory_gib or 0.0)
            compare(row.name, f"a token with {row.name}, which saves {saved:.1f} GiB", None)
    fp8 = report.row("fp8")
    if fp8 is not None and fp8.tokens_per_second:
        claims.append(Claim("FP8's rate, times bf16's", f"{fp8.tokens_per_second / rate:.2f}", "", None))
    loader, memory_row, disk = map(report.row, ("loader alone", "documents in memory", "documents from disk"))
    if loader is not None and loader.tokens_per_second:
        times = loader.tokens_per_second / rate
        claims.append(Claim("the loader's rate, times what is eaten", f"{times:.1f}", "over 1", times > 1))
    if memory_row is not None and disk is not None and memory_row.step_ms and disk.step_ms:
        slower = disk.step_ms / memory_row.step_ms - 1
        claims.append(Claim("a step on documents from disk, against memory", f"{slower:+.1%}", "", None))
    return claims
