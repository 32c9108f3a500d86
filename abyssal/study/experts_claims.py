"""What DeepSeekMoE claims of its experts, claim by claim, and whether a study's runs bear it out."""

from collections.abc import Mapping, Sequence

from abyssal.study.claim import Claim, paired
from abyssal.study.experts_measure import Found
from abyssal.study.spread import Difference

TABLE, ABLATION, ANALYSIS = (f"DeepSeekMoE, section {n}" for n in ("4.2", "4.4", "4.5"))
CONTROL = "a control; not the paper's"

# Where, what was compared, Pile loss.
PAPERS = (
    (f"{TABLE}, table 1", "dense, 0.2B activated", "2.060"),
    (f"{TABLE}, table 1", "Switch: 1 of 16, 0.2B activated", "1.881"),
    (f"{TABLE}, table 1", "GShard: 2 of 16, 0.3B activated", "1.867"),
    (f"{TABLE}, table 1", "DeepSeekMoE: 1 shared + 7 of 63, 0.3B activated", "1.808"),
    ("DeepSeekMoE, section 4.3", "GShard with experts 1.5 times as large", "1.808"),
    (ABLATION, "of 64 experts 1, 2 or 4 are shared", "1.808, 1.806, 1.811"),
    (ANALYSIS, "the shared expert disabled, a routed one more", "1.808 → 2.414"),
)

BITS, RISE = "bits a byte", "bits a byte that disabling costs"


def claims(
    bits: Mapping[str, Sequence[float]], found: Mapping[str, Sequence[Found]], labels: Mapping[str, str]
) -> list[Claim]:
    """Each, judged by all shapes' bits a byte and by what was found of those with experts, in the same order of
    seeds."""

    def better(where: str, says: str, left: str, right: str) -> Claim:
        compared = f"{BITS}: {labels[left]} less {labels[right]}"
        return paired(where, says, compared, -1, Difference.of(bits[left], bits[right]))

    def sensitive(where: str, says: str, left: str, right: str) -> Claim:
        compared = f"{RISE}: {labels[left]} less {labels[right]}"
        rises = [[run.rise for run in found[name]] for name in (left, right)]
        return paired(where, says, compared, 1, Difference.of(*rises))

    shared = found["fine_shared"]
    replaced = [run.replaced for run in shared if run.replaced is not None]
    own = labels["fine_shared"]
    return [
        better(TABLE, "Experts predict better than a dense MLP that activates as much", "few", "dense"),
        better(TABLE, "Many small experts and a shared one predict better than few large", "fine_shared", "few"),
        better(ABLATION, "Of few large experts, sharing one helps", "few_shared", "few"),
        better(ABLATION, "Beside a shared expert, cutting finer helps", "fine_shared", "few_shared"),
        better("DeepSeekMoE, section 3.1", "Without a shared expert, cutting finer helps", "fine", "few"),
        better("DeepSeekMoE, section 3.2", "Of many small experts, sharing one helps", "fine_shared", "fine"),
        sensitive(ANALYSIS, "Disabling the first experts costs small ones more", "fine_shared", "few"),
        sensitive(CONTROL, "And so it does without a shared expert", "fine", "few"),
        paired(
            ANALYSIS, "A routed expert more does not replace the shared one",
            f"{BITS} of {own}: the shared one replaced, less as trained", 1,
            Difference.of(replaced, [run.disabled[0] for run in shared]),
        ),
        paired(
            CONTROL, "Losing the shared expert costs more than losing the routed one picked first",
            f"{BITS} of {own}: the shared one replaced, less the first routed one replaced", 1,
            Difference.of(replaced, [run.without_first for run in shared]),
        ),
    ]  # fmt: skip
