"""A model spread over many devices, from outside: nothing in `model/` knows of ranks.

`mesh` says how ranks are arranged, `spread` applies an arrangement to a model and runs a step over it. Each way of
spreading is one file: `shard` (FSDP2), `experts` (expert parallel), `tensor` (tensor and sequence parallel),
`context` (context parallel), `pipeline` (pipeline parallel). `cut` gives each rank its piece of a batch.

One rule makes their products simple. Every loss is a sum over tokens, divided by totals of the whole step; so the
gradient of a parameter is the sum over all ranks that hold a copy of it, whatever they hold it for. FSDP2 does that
sum, over exactly those ranks, and leaves each with one piece of the parameter: every number of the model then has one
owner in its pipeline stage, for the optimizer, the norm and the checkpoint.
"""

from abyssal.parallel.mesh import Mesh, MeshShape
from abyssal.parallel.spread import Spread

__all__ = ["Mesh", "MeshShape", "Spread"]
