"""FSDP2: every parameter in pieces over the ranks that hold it, gathered when a block runs.

Pieces are float32 (the masters); what is gathered is rounded to the dtype that the model computes in, and gradients are
summed in float32. A block is one unit for each set of ranks: most of its parameters are held by every rank of the
stage; those that are split between heads (`tp`) or experts (`ep`) by fewer.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Shard

from abyssal.parallel.mesh import STAGE, Mesh


class Split(NamedTuple):
    """How a module's own parameters are divided before FSDP2 sees them: each rank along `axis` has other values."""

    axis: str
    dims: dict[str, int]  # by the parameter's name in the module: the dimension that is divided


Splits = dict[nn.Module, Split]


def holders(split: Split | None) -> tuple[str, ...]:
    """The axes of the ranks that hold the same values."""
    return tuple(a for a in STAGE if split is None or a != split.axis)


def shard(
    root: nn.Module, blocks: list[nn.Module], mesh: Mesh, dtype: torch.dtype, reshard: bool, splits: Splits
) -> None:
    """Shards `blocks`, then what else `root` has, whose passes are `forward` and `measure`. With `reshard` a block's
    parameters are dropped after its forward and gathered again for its backward (ZeRO-3), otherwise kept in between
    (ZeRO-2)."""
    narrow = dtype in (torch.bfloat16, torch.float16)
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if narrow else None, reduce_dtype=torch.float32 if narrow else None, cast_forward_inputs=False
    )
    options: dict[str, Any] = {"mp_policy": policy, "reshard_after_forward": reshard}
    for block in blocks:
        for axes, modules in _units(block, splits).items():
            over = mesh.over(*axes)
            fully_shard(modules, mesh=over, shard_placement_fn=_placement(over.size()), **options)
        fully_shard(block, mesh=mesh.over(*STAGE), shard_placement_fn=_placement(mesh.size(*STAGE)), **options)
    fully_shard(root, mesh=mesh.over(*STAGE), mp_policy=policy, reshard_after_forward=False)
    register_fsdp_forward_method(root, "measure")
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # Losses are already divided by the step's totals: gradients are summed, not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def drop_gathered(root: nn.Module) -> None:
    """After a forward pass that no backward pass follows."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def widen(root: nn.Module) -> None:
    """Adds gradients that are computed, and not yet summed over the ranks, to those of other microbatches in float32.
    FSDP2 does it by itself, at the end of a backward pass that it sees as one."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # torch 2.11: one
            for p in (p for group in groups if group is not None for p in group.fsdp_params):
                p.accumulate_unsharded_grad_if_needed()
                p.to_accumulated_grad_if_needed()


def _units(block: nn.Module, splits: Mapping[nn.Module, Split]) -> dict[tuple[str, ...], list[nn.Module]]:
    """The modules of a block that not every rank of the stage holds, by the axes of those that do."""
    units: dict[tuple[str, ...], list[nn.Module]] = {}
    for module in block.modules():
        if module in splits:
            units.setdefault(holders(splits[module]), []).append(module)
    return units


def placed(p: torch.Tensor, ranks: int) -> int:
    """The dimension along which a parameter is cut into pieces: stacks of experts along their expert where that is
    even, else along their rows; everything else along its first."""
    return 1 if p.ndim == 3 and p.shape[0] % ranks and p.shape[1] % ranks == 0 else 0


def _placement(ranks: int) -> Any:
    return lambda p: Shard(placed(p, ranks))
