"""A trained model with experts taken out, as DeepSeekMoE's section 4.5 does it. The model itself is not changed."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from abyssal.model.experts import Gate, MoE, Routing
from abyssal.model.transformer import Transformer
from abyssal.ops.gate import gate as decide


class OtherGate(Gate):
    """Another gate's, without the `masked` experts that it would pick first for each token, and with `chosen` of the
    rest.

    The bias of `ops.gate` is here one a token and expert, -inf for what is masked: it steers who is picked, and the
    gate value still comes from the unbiased score.
    """

    def __init__(self, gate: Gate, masked: int, chosen: int) -> None:
        """Raises ConfigError if there are too few experts."""
        super().__init__(gate.config.replace(num_experts_per_tok=chosen + masked))
        self.config = gate.config.replace(num_experts_per_tok=chosen)
        self.weight, self.bias, self.masked = gate.weight, gate.bias, masked

    def forward(self, x: Tensor) -> Routing:
        first = self._decide(x, self.bias)
        steering = first.scores.new_zeros(first.scores.shape)
        if self.bias is not None:
            steering = steering + self.bias
        best = (first.scores + steering).topk(self.masked, -1).indices
        return self._decide(x, steering.scatter(1, best, float("-inf")))

    def _decide(self, x: Tensor, bias: Tensor | None) -> Routing:
        c = self.config
        return Routing(*decide(
            x, self.weight, bias, c.scoring_func, c.n_group, c.topk_group, c.num_experts_per_tok, c.norm_topk_prob,
            c.routed_scaling_factor, "best" if self.bias is None else "best two", path="reference",
        ))  # fmt: skip


@contextmanager
def routed_otherwise(model: Transformer, masked: int = 0, more: int = 0, shared: bool = True) -> Iterator[None]:
    """Within it every layer's gate leaves out each token's `masked` first experts and picks `more` than it was trained
    to; where `shared` is false the shared experts are out, too. Afterwards the model is as it was."""
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    kept = [(layer.gate, layer.shared_experts) for layer in layers]
    try:
        for layer in layers:
            layer.gate = OtherGate(layer.gate, masked, layer.gate.config.num_experts_per_tok + more)
            if not shared:
                layer.shared_experts = None
        yield
    finally:
        for layer, (gate, mlp) in zip(layers, kept):
            layer.gate, layer.shared_experts = gate, mlp
