"""FP8 training, applied to a model from outside: which maps it takes, and the modules that take them.

As in DeepSeek-V3, section 3.3.1: the linear maps of attention, of dense MLPs and of shared experts. Embedding, head,
routers, norms and attention itself stay as they are; so do the routed experts, whose grouped products are not in FP8.
Parameters, their names and what is saved do not change: only the class of a module does.
"""

from torch import Tensor, nn

from abyssal.model.layers import MLP, Linear
from abyssal.model.transformer import Transformer
from abyssal.ops.fp8 import BLOCK
from abyssal.ops.fp8_train import fp8_train_linear, fp8_train_mlp

# What rounding costs grows with in + out, what FP8 gains with in · out. Below this quotient of the two it does not pay
# on an H100 (docs/kernels.md).
LEAST = 1000


class Fp8Linear(Linear):
    """A `Linear` whose products, forward and backward, are in FP8."""

    def forward(self, x: Tensor) -> Tensor:
        return fp8_train_linear(x, self.weight)


class Fp8MLP(MLP):
    """An `MLP` likewise."""

    def forward(self, x: Tensor) -> Tensor:
        return fp8_train_mlp(x, self.w1.weight, self.w2.weight, self.w3.weight)


def apply_fp8(model: Transformer, least: int = LEAST) -> list[str]:
    """Lets the maps within the blocks compute in FP8 where both their sizes are multiples of 128 and in · out / (in +
    out) is at least `least`; returns the names of the modules that do. Before `fully_shard`, which makes classes of
    its own, and before a compiled block's first step: what is compiled does not look at a module's class again.

    Raises ValueError where a weight is FP8 already (it cannot be trained), or where no map is eligible.
    """
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module.scale is not None:
            raise ValueError(f"{name}.weight: expected a weight to train, got FP8 with scales")
    taken = _take("layers", model.layers, least) + _take("mtp", model.mtp, least)
    if not taken:
        sizes = f"multiples of {BLOCK} with in · out / (in + out) of {least} or more"
        raise ValueError(f"fp8: no map of the model has sizes that are {sizes}")
    return taken


def remove_fp8(model: nn.Module) -> None:
    """The maps as `model/` made them."""
    plain: dict[type[nn.Module], type[nn.Module]] = {Fp8Linear: Linear, Fp8MLP: MLP}
    for module in model.modules():
        if type(module) in plain:
            module.__class__ = plain[type(module)]


def _take(name: str, module: nn.Module, least: int) -> list[str]:
    if type(module) is MLP and all(_fits(m, least) for m in (module.w1, module.w2, module.w3)):
        module.__class__ = Fp8MLP
        return [name]
    if type(module) is Linear and _fits(module, least):
        module.__class__ = Fp8Linear
        return [name]
    return [found for child, inner in module.named_children() for found in _take(f"{name}.{child}", inner, least)]


def _fits(module: Linear, least: int) -> bool:
    outputs, inputs = module.weight.shape
    return not (outputs % BLOCK or inputs % BLOCK) and outputs * inputs >= least * (outputs + inputs)
