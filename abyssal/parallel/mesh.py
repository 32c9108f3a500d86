"""How the ranks of a run are arranged: `MeshShape` says it, `Mesh` is it.

Five axes, of which each rank has a place on every one: `pp` (pipeline stages), `dp` and `ep` (both: other batches; ep
also: other experts), `cp` (other tokens of the same sequences), `tp` (other heads, and other tokens between them).
"""

import difflib
import math
import os
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Self

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from abyssal.parallel.accord import fresh

AXES = ("pp", "dp", "ep", "cp", "tp")
STAGE = ("dp", "ep", "cp", "tp")  # the ranks of one pipeline stage
DATA = ("dp", "ep")  # the ranks that read different batches
PIECES = ("cp", "tp")  # the ranks that have different tokens of the same batch
# What ranks do something together. All of them must make each group at the same point, but for instance a stage without
# experts has no use for the group of those that hold the same experts; so all are made at the beginning.
PARAMETERS = (STAGE, ("dp", "cp", "tp"), ("dp", "ep", "cp"))  # that hold the same ones (see `shard.py`)
TOGETHER = (AXES, DATA, PIECES, *PARAMETERS)
PATIENCE = timedelta(minutes=10)  # with a rank that doesn't come to a collective
# Multiprocessors that gathers and sums of parameters may take from what is computed beside them. NCCL would take 24 of
# an H100's 132 for more speed than it needs: a kernel made of one program a multiprocessor then runs twice as long.
BESIDE = 8


@dataclass(frozen=True)
class MeshShape:
    """The size of each axis."""

    pp: int = 1
    dp: int = 1
    ep: int = 1
    cp: int = 1
    tp: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads "dp=2,ep=2"; axes that aren't named have one rank. Raises ValueError naming what cannot be read."""
        sizes: dict[str, int] = {}
        for piece in filter(None, (p.strip() for p in text.split(","))):
            axis, equals, size = piece.partition("=")
            if axis not in AXES:
                near = difflib.get_close_matches(axis, AXES, 1, 0.1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"mesh {text!r}: unknown axis {axis!r}, expected {', '.join(AXES)}{hint}")
            if not equals or not size.isdecimal() or int(size) < 1:
                raise ValueError(f"mesh {text!r}: {piece!r}: expected {axis}=N with N of 1 or more")
            if axis in sizes:
                raise ValueError(f"mesh {text!r}: {axis} is named twice")
            sizes[axis] = int(size)
        return cls(**sizes)

    def __str__(self) -> str:
        named = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) > 1]
        return ",".join(named) or "dp=1"

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def ranks(self) -> int:
        return math.prod(self.sizes)

    @property
    def launcher(self) -> str:
        """How a process for every rank is started, on one host."""
        return f"torchrun --nproc-per-node {self.ranks} -m abyssal"

    @property
    def batches(self) -> int:
        """Ranks that read different batches."""
        return self.dp * self.ep


class Mesh:
    """The ranks of this run, arranged; every rank makes it at the same point. Needs a process group (`start`)."""

    def __init__(self, shape: MeshShape, device_type: str) -> None:
        """Raises ValueError if there are not exactly so many ranks."""
        world = dist.get_world_size()
        if shape.ranks != world:
            raise ValueError(f"mesh {shape}: {shape.ranks} ranks, and there are {world}")
        self.shape = shape
        self.whole = init_device_mesh(device_type, shape.sizes, mesh_dim_names=AXES)
        self._parts: dict[tuple[str, ...], DeviceMesh] = {}
        self._drawn: dict[tuple[str, str], DeviceMesh] = {}
        for axes in TOGETHER:
            self.over(*axes)
        # Rows on their way to experts, and parameters on theirs, don't queue up behind each other in one group.
        rows = self.whole.mesh.movedim(AXES.index("ep"), -1).flatten(0, -2).tolist()
        self.exchange = dist.new_subgroups_by_enumeration(rows)[0] if shape.ep > 1 else self.group("ep")
        if device_type == "cuda":
            for group in {self.group(*axes) for axes in PARAMETERS}:
                _hurry(group, BESIDE)
            _hurry(self.exchange)
            torch._C._set_sm_carveout_experimental(BESIDE if self.size(*STAGE) > 1 else None)

    def over(self, *axes: str) -> DeviceMesh:
        """The one-dimensional mesh of the ranks that differ from this one on these axes alone, in AXES' order."""
        key = tuple(axis for axis in AXES if axis in axes)
        if key not in self._parts:
            # Of axes with one rank each any one will do.
            wide = tuple(axis for axis in key if getattr(self.shape, axis) > 1) or key[:1]
            if wide != key:
                self._parts[key] = self.over(*wide)
            elif len(key) == 1:
                self._parts[key] = self.whole[key[0]]
            else:
                self._parts[key] = self.whole[key]._flatten("_".join(key))
        return self._parts[key]

    def drawn(self, axis: str | None, device_type: str) -> DeviceMesh:
        """The ranks of this stage, `[axis, the others]`, or all in a row; without process groups: it only says who has
        what. `device_type`: of the tensors that are said to lie on it, which would be moved to another's."""
        key = (axis or "", device_type)
        if key not in self._drawn:
            stage = self.whole.mesh[self.place("pp")]  # [dp, ep, cp, tp]
            ranks = stage.movedim(STAGE.index(axis), 0).flatten(1) if axis else stage.flatten()
            self._drawn[key] = DeviceMesh(device_type, ranks, _init_backend=False)
        return self._drawn[key]

    def group(self, *axes: str) -> dist.ProcessGroup:
        """The process group of `over(*axes)`."""
        return self.over(*axes).get_group()

    def place(self, *axes: str) -> int:
        """This rank's place among `over(*axes)`."""
        place = 0
        for axis in AXES:
            if axis in axes:
                place = place * getattr(self.shape, axis) + self.whole.get_local_rank(axis)
        return place

    def size(self, *axes: str) -> int:
        return math.prod(getattr(self.shape, axis) for axis in axes)


def _hurry(group: dist.ProcessGroup, most: int | None = None) -> None:
    """Before a group is first used: lets its NCCL kernels, of `most` programs, begin before what else is waiting for
    the GPU."""
    backend = group._get_backend(torch.device("cuda"))
    if dist.is_nccl_available() and isinstance(backend, dist.ProcessGroupNCCL):
        backend.options.is_high_priority_stream = True
        if most is not None:
            backend.options.config.max_ctas = most


def launched() -> bool:
    """Whether torchrun, or something like it, started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start(device: torch.device) -> torch.device:
    """Joins the ranks that torchrun started. Returns this rank's own device."""
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store, rank, world = next(rendezvous("env://", timeout=PATIENCE))
        dist.init_process_group(backend, store=fresh(store, rank, world), rank=rank, world_size=world, timeout=PATIENCE)
    return device


def leave() -> None:
    """Parts from the other ranks, if there are any."""
    torch._C._set_sm_carveout_experimental(None)
    if dist.is_initialized():
        dist.destroy_process_group()
