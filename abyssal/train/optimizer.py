"""The optimizer's side of the parameters: float32 masters, AdamW or Muon, the gradient's norm.

Where the model computes in bfloat16, its parameters are rounded copies of float32 masters that are kept here, and
gradients are summed over the microbatches of a step in float32. Otherwise the parameters are their own masters. On a
GPU AdamW steps such masters, and makes the copies, in one pass over memory (`ops/adamw.py`); else it is torch's.

AdamW as in DeepSeek-V3, section 4.2. Weight decay falls on everything of two dimensions or more (embedding, head and
routers with the rest) and not on norms. With Muon, the matrices within the blocks, experts one by one, are
orthogonalised, at a step size that lets AdamW's learning rate serve (Liu et al. 2025); embedding, head, routers and
norms stay with AdamW.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from abyssal.ops.adamw import OnePass, Stepped, fits
from abyssal.parallel.mesh import MeshShape
from abyssal.parallel.spread import Piece
from abyssal.train.config import TrainConfig
from abyssal.train.gradients import Gradients
from abyssal.train.muon import StackedMuon
from abyssal.train.parts import PARTS, part_of

MASTER = "master"


class Kept(NamedTuple):
    """A parameter that the optimizer steps, of a model on one device; of one on many it is a `Piece`."""

    name: str
    param: nn.Parameter  # the model's, in the dtype it computes in; its gradient appears here
    master: Tensor  # what is stepped: the parameter itself, or its float32 original


class Optimizer:
    """Steps the masters, and copies them to parameters that are not their own masters."""

    def __init__(self, kept: Sequence[Kept | Piece], config: TrainConfig) -> None:
        self.config = config
        self.names = [k.name for k in kept]
        self.params = [k.param for k in kept]
        self.masters = [k.param if k.master is k.param else nn.Parameter(k.master, requires_grad=False) for k in kept]
        # A piece of a parameter shares its memory; a float32 original does not, and is copied back after a step.
        self._narrow = [
            i for i, (k, m) in enumerate(zip(kept, self.masters, strict=True))
            if m is not k.param and m.dtype != k.param.dtype
        ]  # fmt: skip
        params, masters = [self.params[i] for i in self._narrow], [self.masters[i] for i in self._narrow]
        adamw = config.optimizer == "adamw"
        one_pass = adamw and len(params) == len(kept) and fits(params, masters)
        several = config.accumulate > 1
        self._taken = Gradients(params, masters, one_pass and not several, several)
        # Pieces that FSDP2 made: their gradients are float32, and summed already.
        self._pieces = adamw and not params and all(isinstance(k, Piece) for k in kept) and _whole(self.masters)
        own = set(self._narrow)
        self._others = [p for i, p in enumerate(self.params) if i not in own]  # that are their own masters, or pieces
        # Passes add to these gradients themselves. What is captured adds where they lay then: of several microbatches a
        # step they stay there, and become zero after it. (Pipelines aren't captured.)
        shape = MeshShape.parse(config.mesh)
        self._lasting = shape.pp == 1 and config.accumulate > shape.batches
        self._parts = [part_of(name) for name in self.names]

        matrices = _matrices(self.names, self.masters) if config.optimizer == "muon" else set()
        pairs = list(zip(self.names, self.masters, strict=True))
        by_adam = [p for name, p in pairs if name not in matrices]
        groups = [
            {"params": [p for p in by_adam if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in by_adam if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        ]
        flat = [p for name, p in pairs if name in matrices and p.ndim == 2]
        stacked = [p for name, p in pairs if name in matrices and p.ndim == 3]
        if flat:
            decay = config.weight_decay
            self.optimizers.append(
                torch.optim.Muon(flat, lr=config.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
            )
        if stacked:
            self.optimizers.append(StackedMuon(stacked, config.lr, config.weight_decay))
        self._pass = self._one_pass() if one_pass or self._pieces else None

    def collect(self) -> None:
        """Takes in the gradients of one microbatch; call it after every `backward`."""
        self._taken.collect()
        if self._pass is None:
            for i, gradient in zip(self._narrow, self._taken.found, strict=True):
                self.masters[i].grad = gradient
        narrow = set(self._narrow)
        for i, (master, param) in enumerate(zip(self.masters, self.params, strict=True)):
            # A piece, which the ranks have added up, over the microbatches too.
            if i not in narrow and param.grad is not None and hasattr(param.grad, "to_local"):
                master.grad = param.grad.to_local()

    def snapshot(self) -> Callable[[], None]:
        """What makes the gradients that a pass has left by now be there again (see `abyssal.parallel.replay`)."""
        taken, at = self._taken.snapshot(), [p.grad for p in self._others]

        def again() -> None:
            taken()
            for p, gradient in zip(self._others, at, strict=True):
                p.grad = gradient

        return again

    def kept(self) -> list[Tensor]:
        """Everything made for the parameters so far, gradients of the step at hand apart: masters, moments, and sums
        that are kept from step to step."""
        moments = (t for o in self.optimizers for state in o.state.values() for t in state.values())
        return [*self.masters, *moments, *self._taken.kept()]

    def gradients(self) -> list[tuple[str, Tensor]]:
        """The step's gradients by the parameters' names, in the model's order."""
        found = self._found()
        return [(n, g) for n, g in zip(self.names, found, strict=True) if g is not None]

    def squares(self) -> Tensor:
        """The gradient's sum of squares by PARTS, in the masters' dtype."""
        if self._pass is not None:
            self._taken.alike()
            return self._pass.squares(self._found(), len(PARTS))
        wide = torch.promote_types(self.masters[0].dtype, torch.float32)
        sums = torch.zeros(len(PARTS), dtype=wide, device=self.masters[0].device)
        for part in sorted(set(self._parts)):
            gradients = [
                p.grad for i, p in zip(self._parts, self.masters) if i == part and p.grad is not None and p.numel()
            ]
            if gradients:
                sums[part] = torch.stack(torch._foreach_norm(gradients)).to(wide).square().sum()
        return sums

    @torch.no_grad()
    def update(self, lr: float, norm: Tensor, stopped: Tensor) -> None:
        """Clips the gradient, whose norm is `norm`, steps at the rate `lr`, and drops the gradient. Where `stopped`, a
        float32 scalar, is 1, it only drops it. Waits for the device only if Muon steps too."""
        adamw, *muon = self.optimizers
        clip = self.config.clip
        scale = None if clip is None else (norm / clip).clamp(min=1.0).float()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        if self._pass is not None:
            self._taken.alike()
            one = torch.ones_like(stopped) if scale is None else scale
            c = self.config
            self._pass.step(self._found(), lr, c.betas, c.eps, one, stopped)
            self.drop_gradients()
            return
        if muon and not bool(stopped):
            if scale is not None:
                gradients = [p.grad for o in muon for g in o.param_groups for p in g["params"] if p.grad is not None]
                torch._foreach_div_(gradients, scale.to(gradients[0].dtype))
            for optimizer in muon:
                optimizer.step()
        # As `torch.amp` does it: the kernel divides the gradient by one and does nothing where the other is 1.
        adamw.grad_scale, adamw.found_inf = scale, stopped  # type: ignore[attr-defined]
        adamw.step()
        self.drop_gradients()
        self._copy_back()

    def _found(self) -> Sequence[Tensor | None]:
        """The step's gradients."""
        if self._pass is None or self._pieces:
            return [p.grad for p in self.masters]
        return self._taken.found

    def _copy_back(self) -> None:
        if self._narrow:
            torch._foreach_copy_([self.params[i] for i in self._narrow], [self.masters[i] for i in self._narrow])

    def _one_pass(self) -> OnePass:
        """Makes AdamW's state at once: made in the first step it would lie where activations were before."""
        adamw, steps = self.optimizers[0], torch.zeros(len(self.masters), device=self.masters[0].device)
        decays = {p: group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
        stepped = []
        for step, param, master in zip(steps, self.masters if self._pieces else self.params, self.masters, strict=True):
            moments = torch.zeros_like(master), torch.zeros_like(master)
            adamw.state[master] = {"step": step, "exp_avg": moments[0], "exp_avg_sq": moments[1]}
            stepped.append(Stepped(param, master, *moments))
        return OnePass(stepped, steps, [decays[m] for m in self.masters], self._parts)

    @torch.no_grad()
    def drop_gradients(self) -> None:
        """Forgets the gradients, the masters' and the model's; those that last become zero."""
        self._taken.drop()
        kept = [p.grad for p in self._others] if self._lasting else [None] * len(self._others)
        for p in (*self.masters, *self.params):
            p.grad = None
        there = [g.to_local() if isinstance(g, DTensor) else g for g in kept if g is not None]
        if there:
            torch._foreach_zero_(there)
        for p, gradient in zip(self._others, kept, strict=True):
            p.grad = gradient

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by `kind/parameter`; not copies."""
        tensors: dict[str, Tensor] = {}
        copied = set(self._narrow)
        for i, (name, p) in enumerate(zip(self.names, self.masters, strict=True)):
            if i in copied:
                tensors[f"{MASTER}/{name}"] = p.detach()
            for optimizer in self.optimizers:
                for kind, value in optimizer.state.get(p, {}).items():
                    tensors[f"{kind}/{name}"] = value
        return tensors

    def expected(self) -> list[str]:
        """What `state` has after any step, masters apart: no parameter of a model is ever without a gradient."""
        kinds = {
            p: ("step", "exp_avg", "exp_avg_sq") if isinstance(o, torch.optim.AdamW) else ("momentum_buffer",)
            for o in self.optimizers for group in o.param_groups for p in group["params"]
        }  # fmt: skip
        return [f"{kind}/{name}" for name, p in zip(self.names, self.masters, strict=True) for kind in kinds[p]]

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what `state` gave; masters may be there already. Raises KeyError for a parameter that there is not."""
        masters = dict(zip(self.names, self.masters, strict=True))
        owners = {p: o for o in self.optimizers for group in o.param_groups for p in group["params"]}
        for key, value in tensors.items():
            kind, name = key.split("/", 1)
            p = masters[name]
            if kind == MASTER:
                p.copy_(value)
            else:
                state = owners[p].state[p]
                if self._pass is None:
                    state[kind] = value.to(p.device, copy=True)
                else:
                    state[kind].copy_(value)
        self._copy_back()


def _whole(masters: Sequence[Tensor]) -> bool:
    """Whether AdamW's kernels take all that these have, empty ones left alone."""
    return fits([m for m in masters if m.numel()], [m for m in masters if m.numel()])


def _matrices(names: Sequence[str], masters: Sequence[Tensor]) -> set[str]:
    """Names of the parameters that Muon steps."""
    kept = {"embedding", "head", "router"}
    return {n for n, p in zip(names, masters) if p.ndim >= 2 and not n.endswith("gate.weight")
            and PARTS[part_of(n)] not in kept}  # fmt: skip
