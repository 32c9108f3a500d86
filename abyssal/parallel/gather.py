"""Whole tensors out of the ranks' pieces of them: for tests, and for what is small."""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from abyssal.parallel.mesh import Mesh

if TYPE_CHECKING:
    from abyssal.parallel.spread import Piece


def whole(local: Tensor, piece: "Piece", mesh: Mesh) -> Tensor:
    """The whole tensor of which every rank of the stage gives its piece, divided as `piece` is."""
    p = piece.param
    assert isinstance(p, DTensor)
    full = DTensor.from_local(local, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()).full_tensor()
    if piece.split is None:
        return full
    name = piece.name.rpartition(".")[2]
    parts = [torch.empty_like(full) for _ in range(mesh.size(piece.split.axis))]
    dist.all_gather(parts, full.contiguous(), group=mesh.group(piece.split.axis))
    return torch.cat(parts, piece.split.dims[name])
