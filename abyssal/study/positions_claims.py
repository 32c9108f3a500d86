"""What the papers claim of positions, claim by claim, and whether a run's numbers bear it out."""

from collections.abc import Mapping, Sequence

from abyssal.study.claim import Claim, paired
from abyssal.study.positions_measure import Band, Found, bands, of_all
from abyssal.study.spread import Difference

VASWANI, SU = "Vaswani et al. 2017, section 3.5", "Su et al. 2021, section 4"
KAZEMNEJAD, PENG = "Kazemnejad et al. 2023", "Peng et al. 2023"
FOLLOWING = f"{PENG}, of a factor that follows the length"
V2 = "DeepSeek-V2, section 2.1.3"
NUMBERS = "the textbooks' ladder"

ALIKE = 0.01  # of a loss
NOTE = (
    f"No worse is what is above by {ALIKE:.0%} of the loss at most. The spread is over seeds, not over texts: all have "
    "the same."
)

Runs = Mapping[str, list[Found]]


def claims(found: Runs, length: int) -> list[Claim]:
    """Each, judged by runs of the six kinds, in the same order of seeds."""
    longest = len(found["none"][0].whole) + 1
    trained, *further = bands(length, longest)
    return [*_trained(found, trained, length), *_extrapolated(found, further), *_stretched(found, trained, further)]


def _of(found: Runs, name: str, band: Band) -> list[float]:
    return [band.of(x.whole) for x in found[name]]


def _tolerated(found: Runs, name: str, band: Band) -> float:
    """A hundredth of a loss from windows of the trained length."""
    losses = [band.of(x.sliding) for x in found[name]]
    return ALIKE * sum(losses) / len(losses)


def _nats(where: str, says: str, compared: str, expected: int, apart: Difference, alike: float = 0.0) -> Claim:
    """In nats a token; (0) is no further above 0 than `alike`."""
    return paired(where, says, compared, expected, apart, alike=alike, unit=" nats")


def _trained(found: Runs, band: Band, length: int) -> list[Claim]:
    def says(where: str, what: str, left: str, expected: int, right: str, alike: float = 0.0) -> Claim:
        told = f"Positions {band.text}: {left} less {right}"
        difference = Difference.of(_of(found, left, band), _of(found, right, band))
        return _nats(where, what, told, expected, difference, alike)

    early, late = Band(1, length // 4), Band(length // 2, length)

    def gap(part: Band) -> list[float]:
        return [a - b for a, b in zip(_of(found, "integer", part), _of(found, "none", part))]

    told = f"integer less none: at positions {late.text} less at {early.text}"
    return [
        says(VASWANI, "A model must be told of order: sinusoids predict better than nothing", "sinusoidal", -1, "none"),
        says(NUMBERS, "Integers predict worse than nothing", "integer", 1, "none"),
        _nats(NUMBERS, "And the worse the larger they are", told, 1, Difference.of(gap(late), gap(early))),
        says(NUMBERS, "Binary digits, which stay small, predict better than integers", "binary", -1, "integer"),
        says(NUMBERS, "Sinusoids, which are smooth, predict better than binary digits", "sinusoidal", -1, "binary"),
        says(SU, "RoPE predicts better than sinusoids", "rope", -1, "sinusoidal"),
        says(V2, "A few rotary dimensions, shared by all heads, tell places: decoupled is better than none",
             "decoupled", -1, "none"),
        says(f"{V2}, has no figure", "Decoupled RoPE is no worse than coupled RoPE", "decoupled", 0, "rope",
             _tolerated(found, "rope", band)),
    ]  # fmt: skip


def _extrapolated(found: Runs, further: Sequence[Band]) -> list[Claim]:
    """By the penalty at the longest texts: of all that comes before, over a window of the trained length."""
    last = further[-1]
    told = f"Positions {last.text}, from all before less from a window of the trained length"

    def says(where: str, what: str, name: str, expected: int, alike: float = 0.0) -> Claim:
        difference = Difference.of([last.of(x.whole) for x in found[name]], [last.of(x.sliding) for x in found[name]])
        return _nats(where, what, f"{told}: {name}", expected, difference, alike)

    def better(what: str, right: str) -> Claim:
        difference = Difference.of(of_all(found, "none", last), of_all(found, right, last))
        return _nats(KAZEMNEJAD, what, f"{told}: none less {right}", -1, difference)

    sinusoidal = _tolerated(found, "sinusoidal", last)
    return [
        says(VASWANI, "Sinusoids may extrapolate past the trained length", "sinusoidal", 0, sinusoidal),
        says(PENG, "RoPE does not go past the trained length", "rope", 1),
        says(PENG, "Nor does decoupled RoPE", "decoupled", 1),
        better("Without encodings a decoder extrapolates better than with RoPE", "rope"),
        better("And better than with sinusoids", "sinusoidal"),
    ]


def _stretched(found: Runs, trained: Band, further: Sequence[Band]) -> list[Claim]:
    most = 2 ** len(further)
    said = []
    for name in ("rope", "decoupled"):
        left, last = [further[-1].of(x.yarn[most]) for x in found[name]], _of(found, name, further[-1])
        told = f"Positions {further[-1].text}: {name} with YaRN ×{most} less {name}"
        what = f"YaRN, without training further, lowers the loss of {name} past the trained length"
        said.append(_nats(PENG, what, told, -1, Difference.of(left, last)))

        twice = Difference.of(of_all(found, name, further[0], 2), [0.0] * len(found[name]))
        told = f"Positions {further[0].text}, from all before less from a window of the trained length: {name}, YaRN ×2"
        what = f"YaRN ×2, without training further, serves twice the length: {name} is no worse than in a window"
        said.append(_nats(FOLLOWING, what, told, 0, twice, _tolerated(found, name, further[0])))

        left = [trained.of(x.yarn[most]) for x in found[name]]
        told = f"Positions {trained.text}: {name} with YaRN ×{most} less {name}"
        what = f"YaRN costs {name} next to nothing within the trained length"
        cost = Difference.of(left, _of(found, name, trained))
        said.append(_nats(PENG, what, told, 0, cost, _tolerated(found, name, trained)))
    return said
