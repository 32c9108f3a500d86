"""Recomputation keeps what it says it keeps, and changes no number."""

import pytest
import torch

from abyssal.config import ConfigError
from abyssal.model.objective import LossScales, Microbatch, Objective, Totals
from abyssal.model.transformer import Transformer
from abyssal.train.recompute import OPERATIONS, parse
from abyssal.train.wrap import wrap_blocks

# Wide enough that what a block keeps is seen; latent attention's up-projections widen by four.
WIDE = {"hidden_size": 64, "kv_lora_rank": 16, "q_lora_rank": 24, "num_nextn_predict_layers": 1, "n_shared_experts": 1}


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the operations that run, with their second argument's shape."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        shapes = [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]
        self.calls.append((function.name().split("::")[-1].split(".")[0], *shapes[1:2]))
        return function(*args, **(kwargs or {}))


def once(make_config, make_batch, recompute, **model):
    """Loss and gradients, and the operations of the backward pass."""
    config = make_config(WIDE | model, recompute=recompute, sequence_balance=0.1)
    model = Transformer(config.model_settings()).init_weights(torch.Generator().manual_seed(0))
    wrap_blocks(model, config)
    micro = Microbatch.of(make_batch([50, 3, 1, 40]), 1)
    loss = Objective(model)(micro, Totals.of([micro]), LossScales(0.3, 0.1)).total
    with Seen() as seen:
        loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters()}, seen.calls


@pytest.mark.parametrize("recompute", ["cheap", "up", "attention", "up,attention", "products,experts", "block"])
def test_no_number_changes(make_config, make_batch, recompute):
    loss, gradients, _ = once(make_config, make_batch, "none")
    loss_again, again, _ = once(make_config, make_batch, recompute)
    assert loss_again == loss
    for name, gradient in gradients.items():
        assert torch.equal(again[name], gradient), name


@pytest.mark.parametrize("rank", [24, 16], ids=["", "ranks alike"])
def test_what_is_recomputed_is_what_was_named(make_config, make_batch, rank):
    """The products of the backward pass whose right factor is an up-projection, by mode: each layer has two."""
    c = make_config(WIDE | {"q_lora_rank": rank}).model_settings()
    head_kv, head_q = c.qk_nope_head_dim + c.v_head_dim, c.qk_nope_head_dim + c.qk_rope_head_dim
    ups = {(c.kv_lora_rank, c.num_attention_heads * head_kv), (c.q_lora_rank, c.num_attention_heads * head_q)}
    blocks = c.num_hidden_layers + 1

    def counted(recompute):
        calls = once(make_config, make_batch, recompute, q_lora_rank=rank)[2]
        up = sum(name == "mm" and shape in ups for name, *rest in calls for shape in rest)
        attention = sum("attention" in name and "backward" not in name for name, *_ in calls)
        return up, attention

    none, cheap, up, attention, block = (counted(r) for r in ("none", "cheap", "up", "attention", "block"))
    assert cheap == none
    assert up == (none[0] + 2 * blocks, none[1])
    assert attention[0] == none[0] and attention[1] >= none[1] + blocks
    assert block[0] == up[0] and block[1] == attention[1]


@pytest.mark.parametrize(("text", "named"), [
    ("none", set()), ("block", set(OPERATIONS)), ("up", {"cheap", "up"}), ("experts, up", {"cheap", "experts", "up"}),
])  # fmt: skip
def test_names(text, named):
    assert parse(text) == named


def test_unknown_operations_are_refused(make_config):
    with pytest.raises(ConfigError, match="recompute: unknown operation 'norms'; expected 'none', 'block', or some of"):
        make_config(recompute="norms")


def test_stored_weights_are_read_the_other_way_round():
    """What `linear` operators of ours take is `[out, in]`, what mm takes is `[in, out]`."""
    from abyssal.train.recompute import kind_of

    class Named:
        def __init__(self, name):
            self._name = name

        def name(self):
            return self._name

    x, ranks = torch.empty(3, 16), {16: {32}}
    assert kind_of(Named("aten::mm"), (x, torch.empty(16, 64)), ranks) == "up"
    assert kind_of(Named("abyssal::fp8_train_linear"), (x, torch.empty(64, 16)), ranks) == "up"
    assert kind_of(Named("abyssal::fp8_train_linear"), (x, torch.empty(16, 64)), ranks) == "products"
    assert kind_of(Named("abyssal::grouped_experts"), (x,), ranks) == "experts"
    assert kind_of(Named("aten::add"), (x, x), ranks) is None


def test_every_attention_there_is_counts_as_one():
    from torch.nn.attention import varlen  # noqa: F401  it makes the operator

    from abyssal.train.recompute import kind_of

    for operator in (
        torch.ops.torch_attn._varlen_attn.default, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.abyssal.attention_hopper.default, torch.ops.abyssal.latent_attention.default,
    ):  # fmt: skip
        assert kind_of(operator, (), {}) == "attention"
