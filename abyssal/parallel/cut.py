"""Each rank's piece of a microbatch."""

from abyssal.model.objective import Microbatch
from abyssal.parallel.mesh import Mesh


def cut(micro: Microbatch, mesh: Mesh) -> Microbatch:
    """The tokens that this rank has of a batch that its `cp` and `tp` share."""
    return micro
