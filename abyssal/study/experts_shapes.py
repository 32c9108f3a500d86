"""The shapes that a study of experts compares: equal in all parameters and in those that a token meets."""

from collections.abc import Sequence
from dataclasses import dataclass

from abyssal.config import ModelConfig
from abyssal.costs import Parameters, inspect


@dataclass(frozen=True)
class Shape:
    """What the layers have in place of their MLPs. `routed` None: a dense MLP of `width`."""

    name: str
    label: str
    routed: int | None
    chosen: int
    shared: int
    width: int  # of an expert

    def of(self, model: ModelConfig) -> ModelConfig:
        """`model` with this in every layer."""
        if self.routed is None:
            return model.replace(
                n_routed_experts=None, n_shared_experts=None, num_experts_per_tok=1, moe_intermediate_size=0,
                first_k_dense_replace=0, intermediate_size=self.width,
            )  # fmt: skip
        return model.replace(
            n_routed_experts=self.routed, n_shared_experts=self.shared or None, num_experts_per_tok=self.chosen,
            moe_intermediate_size=self.width, first_k_dense_replace=0,
        )  # fmt: skip


def shapes(experts: int, chosen: int, width: int, parts: int) -> list[Shape]:
    """Few large experts, each cut into `parts`, and of either as many with one shared in exchange for a routed one; and
    one MLP as wide as what a token meets."""
    many, picked, narrow = experts * parts, chosen * parts, width // parts
    return [
        Shape("few", f"{chosen} of {experts}", experts, chosen, 0, width),
        Shape("few_shared", f"1 shared + {chosen - 1} of {experts - 1}", experts - 1, chosen - 1, 1, width),
        Shape("fine", f"{picked} of {many}", many, picked, 0, narrow),
        Shape("fine_shared", f"1 shared + {picked - 1} of {many - 1}", many - 1, picked - 1, 1, narrow),
        Shape("dense", "dense", None, 0, 0, chosen * width),
    ]


def counted(shape: Shape, model: ModelConfig) -> Parameters:
    """The parameters of the real model with this shape."""
    return inspect(shape.of(model)).parameters


def check_equal(sizes: Sequence[Parameters]) -> None:
    """Raises ValueError where models that are said to be equal are not, but for their routers. The last is dense: it
    is held against what the others activate."""
    totals = {size.total - size.routers for size in sizes[:-1]}
    activated = {size.activated - size.routers for size in sizes}
    if len(totals) != 1 or len(activated) != 1:
        raise ValueError(f"shapes: expected equal parameters, got {sorted(totals)}, activated {sorted(activated)}")
