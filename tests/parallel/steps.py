"""A run's first steps, on one process or as one of several ranks, and what they came to."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from abyssal.data import TokenSet
from abyssal.parallel import Mesh
from abyssal.parallel.spread import Piece
from abyssal.train import TrainConfig
from abyssal.train.trainer import Trainer

MODEL = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 8,
    "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "num_nextn_predict_layers": 1, "n_shared_experts": 1,
}  # fmt: skip
STEPS = 20


class Steps(NamedTuple):
    gradients: dict[str, Tensor]  # of the first step, whole
    losses: list[tuple[float, ...]]  # a step: all, main, balance, the MTP modules', the gradient's norm
    violations: list[list[float]]
    biases: dict[str, Tensor]


def settings(tokens: Path, out: Path, mesh: str, model: dict[str, Any], **changes: Any) -> TrainConfig:
    base: dict[str, Any] = {
        "model": "tiny", "model_overrides": MODEL | model, "data": str(tokens), "out": str(out), "steps": STEPS,
        "batch_tokens": 128, "sequence": 64, "accumulate": 4, "lr": 3e-3, "device": "cpu", "mesh": mesh,
        "sequence_balance": 0.1, "bias_speed": 0.05,
    }  # fmt: skip
    return TrainConfig.of(base | changes)


def take(config: TrainConfig, steps: int = STEPS, made: list[Trainer] | None = None) -> Steps:
    """The first `steps` of a run; every rank returns the same but for gradients and biases of stages that it isn't of.
    Its trainer is left in `made`."""
    trainer = Trainer(config, config.model_settings(), TokenSet.open(config.data))
    if made is not None:
        made.append(trainer)
    gradients: dict[str, Tensor] = {}
    losses, violations = [], []
    update = trainer.optimizer.update

    def spy(lr: float, norm: Tensor, stopped: Tensor) -> None:
        if not gradients:
            gradients.update(whole_gradients(trainer))
        update(lr, norm, stopped)

    trainer.optimizer.update = spy  # type: ignore[method-assign]
    with trainer.stream() as stream:
        for _ in range(steps):
            step = trainer.step(next(stream))
            losses.append((step.loss, step.main_loss, step.balance_loss, *step.mtp_losses, step.grad_norm))
            violations.append(step.max_violation)
    biases = {name: b.clone() for name, b in trainer.model.named_buffers() if name.endswith("bias")}
    return Steps(gradients, losses, violations, biases)


def whole_gradients(trainer: Trainer) -> dict[str, Tensor]:
    """This rank's gradients, each made whole."""
    if not trainer.config.mesh:
        return {name: g.clone() for name, g in trainer.optimizer.gradients()}
    return {
        piece.name: whole(piece.param.grad.to_local(), piece, trainer.spread.mesh).clone()
        for piece in trainer.spread.parameters()
    }


def whole(local: Tensor, piece: Piece, mesh: Mesh) -> Tensor:
    """The whole tensor of which every rank of the stage gives its piece, divided as `piece` is."""
    p = piece.param
    assert isinstance(p, DTensor)
    full = DTensor.from_local(local, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()).full_tensor()
    if piece.split is None:
        return full
    parts = [torch.empty_like(full) for _ in range(mesh.size(piece.split.axis))]
    dist.all_gather(parts, full.contiguous(), group=mesh.group(piece.split.axis))
    return torch.cat(parts, piece.split.dims[piece.name.rpartition(".")[2]])


def compare(ours: Steps, one: Steps, rtol: float = 2e-5) -> None:
    """Raises AssertionError unless these are the same steps, up to the rounding of float32 sums in another order."""
    for name, gradient in ours.gradients.items():
        scale = one.gradients[name].abs().max().item()
        torch.testing.assert_close(gradient, one.gradients[name], rtol=1e-4, atol=2e-6 * max(scale, 1.0), msg=name)
    for number, (a, b) in enumerate(zip(ours.losses, one.losses, strict=True)):
        torch.testing.assert_close(torch.tensor(a[:-1]), torch.tensor(b[:-1]), rtol=rtol * (1 + number), atol=1e-6)
        assert abs(a[-1] / b[-1] - 1) < 10 * rtol * (1 + number)  # the gradient's norm, which errors move more
    assert ours.violations[0] == one.violations[0]
