"""A study of positions as tables."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from abyssal.study.positions_encodings import Products
from abyssal.study.positions_measure import Band, Found, bands, bands_within, bits, penalty
from abyssal.study.result import Grid
from abyssal.study.spread import Spread
from abyssal.study.trained import Variant

Runs = Mapping[str, list[Found]]
Labels = Mapping[str, str]


def models(variants: Sequence[Variant], parameters: Mapping[str, int]) -> Grid:
    """What is equal, and what is not."""
    head = ("position", "parameters", "score width N + R", "rotated", "latent C", "cache", "absorbable")
    rows = []
    for v in variants:
        c = v.model
        width, kept = c.qk_nope_head_dim + c.qk_rope_head_dim, c.kv_lora_rank + c.qk_rope_head_dim
        sizes = (f"{parameters[v.name]:,}", str(width), str(c.rotary_width), str(c.kv_lora_rank), str(kept))
        rows.append((v.label, *sizes, "no" if c.position == "rope" else "yes"))
    note = (
        "All six have latent attention (MLA), dense layers, and queries and keys of one width. A rotary key adds D·R "
    )
    note += "weights to W_KR and takes C·H·R from W_UK: as many, since C = D/H. What a token leaves behind (cache, "
    note += (
        "elements a layer) is C, and R more where the key is decoupled. With coupled RoPE a rotation stands between "
    )
    note += "W_UQ and W_UK, which cannot be absorbed (DeepSeek-V2, section 2.1.3)."
    return Grid("The models", head, tuple(rows), note)


def within(found: Runs, sizes: list[float], labels: Labels, length: int) -> tuple[Grid, Grid]:
    """Loss by position, in nats a token and in bits a byte."""
    parts = (*bands_within(length), Band(1, length))
    head = ("position", *(f"at {b.text}" for b in parts))
    nats, per_byte = [], []
    for name, runs in found.items():
        nats.append((labels[name], *(Spread.of([b.of(x.whole) for x in runs]).text() for b in parts)))
        per_byte.append((labels[name], *(Spread.of([bits(x.whole, sizes, b) for x in runs]).text() for b in parts)))
    note = "Mean ± standard deviation over the seeds; position 1 is the second token, the first to be predicted. All "
    note += "columns of a row are of the same texts, but of other tokens: compare down, not across."
    return (
        Grid("Loss by position within the trained length, nats a token", head, tuple(nats), note),
        Grid("Loss by position within the trained length, bits a byte", head, tuple(per_byte)),
    )


def beyond(found: Runs, sizes: list[float], labels: Labels, length: int) -> Grid:
    """Loss past the trained length, and what of it a window of that length would have had."""
    _, *further = bands(length, len(found["none"][0].whole) + 1)
    head = ("position", *(f"{what} at {b.text}" for b in further for what in ("nats", "less window's", "bits a byte")))
    rows = []
    for name, runs in found.items():
        for factor in (None, *runs[0].yarn):
            cells = []
            for b in further:
                curves = [x.whole if factor is None else x.yarn[factor] for x in runs]
                if len(curves[0]) < b.stop - 1:  # the factor reaches less far
                    cells += ["–"] * 3
                    continue
                cells.append(Spread.of([b.of(curve) for curve in curves]).text())
                cells.append(Spread.of([penalty(x, b, factor) for x in runs]).text(sign=True))
                cells.append(Spread.of([bits(curve, sizes, b) for curve in curves]).text())
            rows.append((labels[name] + ("" if factor is None else f", YaRN ×{factor}"), *cells))
    note = f"Trained on sequences of {length}. The window's loss is the same model's on the same tokens, in windows of "
    note += f"{length} that begin every {length // 2}: above 0 a long context harms, below 0 it helps. YaRN with no "
    note += "further training, betas 32 and 1 and mscale 1 as in DeepSeek-V3."
    return Grid("Past the trained length", head, tuple(rows), note)


def norms(found: Runs, labels: Labels, length: int) -> Grid:
    """What the encoding does to an embedding."""
    longest = len(found["none"][0].embedded.after)
    places = (1, length // 2, length - 1, longest - 1)
    head = ("position", "norm before", *(f"after, at {p}" for p in places), *(f"cosine at {p}" for p in places))
    rows = []
    for name, runs in found.items():
        before = [sum(x.embedded.before) / longest for x in runs]
        after = [Spread.of([x.embedded.after[p] for x in runs]).text(1) for p in places]
        cosines = [Spread.of([x.embedded.cosine[p] for x in runs]).text(2) for p in places]
        rows.append((labels[name], Spread.of(before).text(1), *after, *cosines))
    note = "Norms of the tokens' embeddings in the trained models before and after their position is added, and the "
    note += "cosine between the two: what is left of the token in what the first norm hands on. Mean ± "
    note += "standard deviation over the seeds."
    return Grid("Norms before and after adding the position", head, tuple(rows), note)


def distances(encodings: Mapping[str, Tensor], alike: Mapping[str, Products], at: Sequence[int]) -> Grid:
    """What a product of two encodings tells."""
    last = len(next(iter(encodings.values()))) - 1
    head = ("encoding", "norm at 1", f"norm at {last}", *(f"cosine at {d}" for d in at), "most apart at one distance")
    rows = []
    for name, p in alike.items():
        sizes = (f"{float(encodings[name][place].norm()):.1f}" for place in (1, last))
        rows.append((name, *sizes, *(f"{p.mean[d]:.3f}" for d in at), f"{p.spread:.3f}"))
    note = "Norms at two positions; cosines of two encodings by their distance, means over all pairs of places without "
    note += "place 0. 0 in the last column: the place beside the distance does not matter; a cosine of 1 at every "
    note += (
        "distance: nor does that. A rotary encoding is what becomes of a key whose pairs are all (1, 0); beside the "
    )
    note += "decoupled key are dimensions that nothing turns."
    return Grid("Products of encodings against distance", head, tuple(rows), note)


def moved(found: Runs, labels: Labels, length: int) -> Grid:
    """All positions moved."""
    rows = []
    for name, runs in found.items():
        most = max(x.moved_most for x in runs)
        rows.append((labels[name], Spread.of([x.moved for x in runs]).text(sign=True), f"{most:.1e}"))
    note = "The same texts, the model in float64; angles are float32 numbers."
    head = ("position", "nats more, mean", "most of a token")
    return Grid(f"All positions {length} larger, texts of the trained length", head, tuple(rows), note)
