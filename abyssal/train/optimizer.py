"""The optimizer's side of the parameters: float32 masters, AdamW or Muon, the gradient's norm.

Where the model computes in bfloat16, its parameters are rounded copies of float32 masters that are kept here, and
gradients are summed over the microbatches of a step in float32. Otherwise the parameters are their own masters.

AdamW as in DeepSeek-V3, section 4.2. Weight decay falls on everything of two dimensions or more (embedding, head and
routers with the rest) and not on norms. With Muon, the matrices within the blocks, experts one by one, are
orthogonalised, at a step size that lets AdamW's learning rate serve (Liu et al. 2025); embedding, head, routers and
norms stay with AdamW.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from abyssal.model.experts import Gate
from abyssal.model.transformer import Transformer
from abyssal.train.config import TrainConfig
from abyssal.train.muon import StackedMuon

MASTER = "master"


class Optimizer:
    """Steps the parameters of `model`, which it converts to `dtype`; router biases stay float32."""

    def __init__(self, model: Transformer, config: TrainConfig, dtype: torch.dtype) -> None:
        self.names = [name for name, _ in model.named_parameters()]
        wide = [p.detach().float().clone() for p in model.parameters()] if dtype == torch.bfloat16 else None
        model.to(dtype)
        self.params = list(model.parameters())
        self.masters = self.params if wide is None else [nn.Parameter(p, requires_grad=False) for p in wide]
        self.config = config

        matrices = _matrices(model) if config.optimizer == "muon" else set()
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

    def collect(self) -> None:
        """Takes in the gradients of one microbatch; call it after every `backward`."""
        if self.masters is self.params:
            return
        old, new = [], []
        for master, param in zip(self.masters, self.params, strict=True):
            if param.grad is None:
                continue
            if master.grad is None:
                master.grad = param.grad.float()
            else:
                old.append(master.grad)
                new.append(param.grad)
            param.grad = None
        if old:
            torch._foreach_add_(old, new)

    def gradients(self) -> list[tuple[str, Tensor]]:
        """The step's gradients by the parameters' names, in the model's order."""
        return [(n, p.grad) for n, p in zip(self.names, self.masters, strict=True) if p.grad is not None]

    def norm(self) -> Tensor:
        """The gradient's norm over all parameters, a scalar in the masters' dtype."""
        return torch.nn.utils.get_total_norm([gradient for _, gradient in self.gradients()])

    def update(self, lr: float, norm: float) -> None:
        """Clips the gradient, whose norm is `norm`, steps at the rate `lr`, and drops the gradient."""
        clip = self.config.clip
        if clip is not None and norm > clip:
            torch._foreach_mul_([gradient for _, gradient in self.gradients()], clip / norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        self.drop_gradients()
        if self.masters is not self.params:
            with torch.no_grad():
                torch._foreach_copy_([*self.params], [*self.masters])

    def drop_gradients(self) -> None:
        """Forgets the gradients, the masters' and the model's."""
        for p in (*self.masters, *self.params):
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by `kind/parameter`; not copies."""
        tensors: dict[str, Tensor] = {}
        for name, p in zip(self.names, self.masters, strict=True):
            if self.masters is not self.params:
                tensors[f"{MASTER}/{name}"] = p.detach()
            for optimizer in self.optimizers:
                for kind, value in optimizer.state.get(p, {}).items():
                    tensors[f"{kind}/{name}"] = value
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what `state` gave. Raises KeyError for a parameter that there is not."""
        masters = dict(zip(self.names, self.masters, strict=True))
        owners = {p: o for o in self.optimizers for group in o.param_groups for p in group["params"]}
        for key, value in tensors.items():
            kind, name = key.split("/", 1)
            p = masters[name]
            if kind == MASTER:
                p.copy_(value)
            else:
                owners[p].state[p][kind] = value.to(p.device, copy=True)


def _matrices(model: Transformer) -> set[str]:
    """Names of the parameters that Muon steps."""
    routers = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Gate)}
    ends = {"embed.weight", "head.weight"}
    return {name for name, p in model.named_parameters() if p.ndim >= 2} - routers - ends
