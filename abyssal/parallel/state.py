"""A rank's piece as a part of the whole tensor, for checkpoints: what lies where, and no communication."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from abyssal.parallel.mesh import Mesh

if TYPE_CHECKING:
    from abyssal.parallel.spread import Piece


def described(local: Tensor, piece: "Piece", mesh: Mesh) -> DTensor:
    """`local`, which is divided as `piece` is, as a DTensor of the whole shape: divided first along the axis of its
    `split`, then over the ranks that hold the same values. It can be read and written, and not computed with."""
    p = piece.param
    assert isinstance(p, DTensor)
    shape, placements = list(p.shape), list(p.placements)
    if piece.split is not None:
        dim = piece.split.dims[piece.name.rpartition(".")[2]]
        shape[dim] *= mesh.size(piece.split.axis)
        placements.insert(0, Shard(dim))
    stride = torch.empty(shape, device="meta").stride()
    ranks = mesh.drawn(piece.split.axis if piece.split else None, local.device.type)
    return DTensor.from_local(local, ranks, placements, run_check=False, shape=torch.Size(shape), stride=stride)
