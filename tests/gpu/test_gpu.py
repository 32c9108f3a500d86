"""What only a GPU can show: its paths agree with the references, and a training step never waits for the host."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from abyssal import LLM, ModelConfig, Sampling
from abyssal.model.packing import Packing
from abyssal.model.transformer import Transformer
from abyssal.ops.attention import attention
from abyssal.ops.cross_entropy import linear_cross_entropy
from abyssal.ops.experts import experts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def error(out: Tensor, exact: Tensor) -> float:
    """Relative error in the Frobenius norm, against float64 on the CPU."""
    out, exact = out.detach().cpu().double(), exact.detach().cpu().double()
    assert out.isfinite().all()
    return float((out - exact).norm() / exact.norm())


@pytest.mark.parametrize("widths", [(128, 64, 128), (192, 64, 256), (16, 8, 16), (64, 0, 64)])
def test_varlen_attention(widths: tuple[int, int, int]) -> None:
    N, R, V = widths
    lens, H = [1, 0, 300, 77, 513], 5
    T, cu = sum(lens), torch.tensor([0, *lens]).cumsum(0).to(torch.int32)
    shapes = {"q_nope": (T, H, N), "q_rope": (T, H, R), "k_nope": (T, H, N), "k_rope": (T, R), "v": (T, H, V)}
    exact = {k: torch.randn(s, dtype=torch.float64).requires_grad_() for k, s in shapes.items()}
    narrow = {k: t.detach().cuda().bfloat16().requires_grad_() for k, t in exact.items()}
    if not R:
        exact["q_rope"] = exact["k_rope"] = narrow["q_rope"] = narrow["k_rope"] = None  # type: ignore[assignment]
    scale = (N + R) ** -0.5
    expected = attention(*exact.values(), cu, cu, 513, 513, scale, path="reference")
    out = attention(*narrow.values(), cu.cuda(), cu.cuda(), 513, 513, scale, path="varlen")
    assert error(out, expected) < 1e-2
    weight = torch.randn(expected.shape, dtype=torch.float64)
    (expected * weight).sum().backward()
    (out * weight.cuda().bfloat16()).sum().backward()
    for name, t in exact.items():
        if t is not None:
            assert error(narrow[name].grad, t.grad) < 2e-2, name  # type: ignore[arg-type]


def test_grouped_experts() -> None:
    T, D, F, E, K = 333, 128, 64, 16, 3
    exact = [torch.randn(s, dtype=torch.float64) / s[-1] ** 0.5 for s in ((T, D), (E, F, D), (E, D, F), (E, F, D))]
    indices = torch.stack([torch.randperm(E - 3)[:K] for _ in range(T)])  # three experts get nothing
    weights = torch.rand(T, K, dtype=torch.float64)
    exact = [t.requires_grad_() for t in exact]
    narrow = [t.detach().cuda().bfloat16().requires_grad_() for t in exact]
    expected = experts(*exact, indices, weights, path="reference")
    out = experts(*narrow, indices.cuda(), weights.cuda().float(), path="grouped")
    assert error(out, expected) < 2e-2
    expected.square().sum().backward()
    out.float().square().sum().backward()
    for a, b in zip(narrow, exact):
        assert error(a.grad, b.grad) < 4e-2  # type: ignore[arg-type]


def build(**changes: object) -> Transformer:
    config = ModelConfig.load("tiny").replace(initializer_range=0.1, **changes)
    return Transformer(config).init_weights(torch.Generator().manual_seed(0))


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"n_routed_experts": None}])
def test_the_model_in_float32_is_the_cpu_s(changes: dict[str, object]) -> None:
    model, tokens, lengths = build(**changes), torch.randint(0, 512, (200,)), [150, 0, 1, 49]
    exact = [model.double()(tokens, lengths), *model.predict(tokens, lengths)]
    model, tokens = model.float().cuda(), tokens.cuda()
    for out, expected in zip([model(tokens, lengths), *model.predict(tokens, lengths)], exact, strict=True):
        assert error(out, expected) < 1e-4


def test_a_training_step_never_waits_for_the_host() -> None:
    """Forward with MTP, losses and backward in bf16 under CUDA's synchronisation check."""
    model = build().cuda().bfloat16()
    tokens = torch.randint(0, 512, (512,), device="cuda")
    packing = Packing.of([400, 12, 100], tokens)
    weights = torch.ones(512, device="cuda")

    def step() -> Tensor:
        states, _ = model.hidden(tokens, packing)
        loss = linear_cross_entropy(states, model.head.weight, tokens, weights)
        for p in model.predict_states(states, tokens, packing):
            loss = loss + linear_cross_entropy(p.states, model.head.weight, tokens, weights * p.live)
        loss.backward()
        return loss

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_generation_on_the_gpu_is_the_cpu_s() -> None:
    """Greedy, in float32, with speculation, several prompts at once."""
    model = build()
    prompts = [torch.randint(0, 512, (n,)).tolist() for n in (5, 40, 1)]
    sampling = Sampling(max_tokens=32, temperature=0)
    expected = [o.tokens for o in LLM(model, compiled=False).generate(prompts, sampling)]
    assert [o.tokens for o in LLM(model.cuda()).generate(prompts, sampling)] == expected


def test_training_on_the_gpu(tmp_path: Path) -> None:
    """bf16 with float32 masters: the loss falls, and the saved model loads."""
    from abyssal import load
    from abyssal.train import TrainConfig, train

    data = tmp_path / "text"
    data.mkdir()
    for i in range(20):
        (data / f"{i}.txt").write_text(" ".join(f"the {w} of {w + i}" for w in range(400)))
    settings = {"model": "tiny", "data": str(data), "out": str(tmp_path / "run"), "steps": 60, "batch_tokens": 1024,
                "sequence": 256, "lr": 3e-3, "warmup_steps": 5, "device": "cuda", "log_every": 10, "save_every": 60,
                "validate_every": 60, "validation_tokens": 2048}  # fmt: skip
    result = train(TrainConfig.of(settings))
    losses = [float(line.split('"main_loss": ')[1].split(",")[0]) for line in result.metrics.read_text().splitlines()]
    assert losses[-1] < losses[0] - 1
    assert result.model is not None
    model = load(result.model, device="cuda")
    assert model.embed.weight.dtype == torch.bfloat16 and model.gates()[0].bias.dtype == torch.float32  # type: ignore[union-attr]
