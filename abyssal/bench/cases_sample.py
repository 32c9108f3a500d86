"""Sampling: a token of every sequence's logits, greedy or filtered, and the verification of drafts."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from abyssal.bench import peers
from abyssal.bench.case import Call, Calls, Case, Output, Prepared
from abyssal.bench.measure import rotations
from abyssal.ops.sample import Settings, draw, verify

V3 = 129280  # the vocabulary of DeepSeek-V2 and V3, about
GREEDY, PLAIN, NUCLEUS, BOTH = (0.0, 0, 1.0), (1.0, 0, 1.0), (0.6, 0, 0.95), (1.0, 50, 0.95)  # temperature, k, p


def cases(cuda: bool) -> list[Case]:
    """Draws and verifications; on a CPU tiny ones."""
    if not cuda:
        return [_draw(2, 1000, GREEDY), _draw(2, 1000, BOTH), _verify(2, 2, 1000, NUCLEUS)]
    found = [
        _draw(S, V3, wish, quick=S == 32 and wish != PLAIN)
        for wish in (GREEDY, PLAIN, NUCLEUS, BOTH)
        for S in (1, 32, 128)
    ]
    return found + [_verify(S, 2, V3, wish, quick=S == 32) for wish in (GREEDY, NUCLEUS) for S in (1, 32, 128)]


def _said(wish: tuple[float, int, float]) -> str:
    temperature, k, p = wish
    if temperature == 0:
        return "greedy"
    filters = [f"k={k}"] * (k > 0) + [f"p={p}"] * (p < 1)
    return ", ".join([f"temperature {temperature}", *filters])


def _draw(S: int, V: int, wish: tuple[float, int, float], quick: bool = False) -> Case:
    return Case(
        group="sample", op="sampling", shape=f"S={S} vocabulary {V}, {_said(wish)}", flops=0.0, bytes=2.0 * S * V,
        prepare=partial(_prepare_draw, S, V, wish), limit=0.05, small=True, quick=quick,
    )  # fmt: skip


def _verify(S: int, W: int, V: int, wish: tuple[float, int, float], quick: bool = False) -> Case:
    return Case(
        group="sample", op="verification", shape=f"S={S} drafts {W - 1} vocabulary {V}, {_said(wish)}", flops=0.0,
        bytes=2.0 * S * W * V, prepare=partial(_prepare_verify, S, W, V, wish), limit=0.05, small=True, quick=quick,
    )  # fmt: skip


def _logits(sets: int, S: int, W: int, V: int, device: torch.device) -> Tensor:
    """`[sets, S, W, V]`: some tokens in ten thousand stand out, as after training."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(sets, S, W, V, device=device)
    logits += 10 * (torch.rand(sets, S, W, V, device=device) < 3e-4)
    return logits.to(torch.bfloat16 if device.type == "cuda" else torch.float32)


def _settings(S: int, wish: tuple[float, int, float], device: torch.device) -> Settings:
    one = torch.ones(S, device=device)
    temperature, k, p = wish
    return Settings(one * temperature, torch.full_like(one, k).int(), one * p, 0 * one, one.long().cumsum(0))


def _outside(tokens: Tensor, probs: Tensor) -> float:
    """The share of `tokens [S]` that `probs [S, V]` rules out."""
    return float((probs.gather(1, tokens.long()[:, None]) == 0).float().mean())


def _prepare_draw(S: int, V: int, wish: tuple[float, int, float], device: torch.device) -> Prepared:
    sets = rotations(2 * S * V, device)
    logits = _logits(sets, S, 1, V, device)[:, :, 0]
    chosen, positions = _settings(S, wish, device), torch.arange(S, device=device)
    temperature, k, p = wish
    greedy = temperature == 0
    probs = draw(logits[0], positions, chosen, want_probs=True, greedy=greedy, path="reference")[1]
    assert probs is not None
    exact = probs

    def ours() -> Calls:
        def call(i: int) -> Output:
            return draw(logits[i], positions, chosen, greedy=greedy)[0]

        return [partial(call, i) for i in range(sets)]

    def each(plain: Callable[[Tensor], Tensor]) -> Calls:
        return [partial(plain, logits[i]) for i in range(sets)]

    def flashinfer() -> Calls:
        made = peers.module("FlashInfer", "flashinfer.sampling")

        def call(x: Tensor) -> Tensor:
            soft = torch.softmax(x.float() / temperature, -1)
            if k and p < 1:
                return made.top_k_top_p_sampling_from_probs(soft, k, p)
            return made.top_p_sampling_from_probs(soft, p) if p < 1 else made.sampling_from_probs(soft)

        return each(call)

    plain = plain_greedy if greedy else partial(plain_draw, temperature=temperature, k=k, p=p)
    found: dict[str, Callable[[], Calls]] = {"PyTorch": lambda: each(plain)}
    if device.type == "cuda" and not greedy:
        found["FlashInfer"] = flashinfer
    return Prepared(ours, found, lambda output: _outside(_one(output), exact))


def plain_greedy(logits: Tensor) -> Tensor:
    """`[S, V]` -> `[S]`."""
    return logits.argmax(-1)


def plain_probs(logits: Tensor, temperature: float, k: int, p: float) -> Tensor:
    """`[..., V]` logits -> probabilities, as a plain user writes it: by sorting."""
    scores = logits.float() / temperature
    if not k and p == 1:
        return scores.softmax(-1)
    values, order = scores.sort(-1, descending=True)
    if k:
        values[..., k:] = float("-inf")
    probs = values.softmax(-1)
    probs = probs.where(probs.cumsum(-1) - probs < p, 0.0)
    probs /= probs.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter_(-1, order, probs)


def plain_draw(logits: Tensor, temperature: float, k: int, p: float) -> Tensor:
    """`[S, V]` -> `[S]`; the largest of probabilities over exponential noise is a draw, and does not wait."""
    probs = plain_probs(logits, temperature, k, p)
    return (probs / torch.empty_like(probs).exponential_()).argmax(-1)


def _prepare_verify(S: int, W: int, V: int, wish: tuple[float, int, float], device: torch.device) -> Prepared:
    """Greedy drafts are chosen, the others drawn from distributions a little off the model's."""
    temperature, k, p = wish
    greedy = temperature == 0
    sets = rotations(2 * S * W * V + (0 if greedy else 4 * S * (W - 1) * V), device)
    logits = _logits(sets, S, W, V, device)
    chosen, positions = _settings(S, wish, device), torch.arange(S, device=device)
    drafts = torch.empty(sets, S, W - 1, dtype=torch.int64, device=device)
    q = torch.empty(0 if greedy else sets, S, W - 1, V, device=device)
    for i in range(sets):
        for j in range(W - 1):
            hint = logits[i, :, j] + torch.randn(S, V, device=device)
            drafts[i, :, j], probs = draw(hint, positions + j, chosen, want_probs=not greedy, greedy=greedy)
            if probs is not None:
                q[i, :, j] = probs
    rows = [draw(logits[0, :, j], positions, chosen, want_probs=True, path="reference")[1] for j in range(W)]
    exact = torch.stack([row for row in rows if row is not None], 1)

    def check(output: Output) -> float:
        """The share of tokens, drafts that were kept included, that the model's distributions rule out."""
        accepted, token = output[0], output[1]
        wrong = _outside(token, exact[torch.arange(S, device=device), accepted])
        for j in range(W - 1):
            kept = accepted > j
            if bool(kept.any()):
                wrong += _outside(drafts[0, kept, j], exact[kept, j])
        return wrong

    def ours() -> Calls:
        def call(i: int) -> Output:
            return verify(logits[i], drafts[i], None if greedy else q[i], positions, chosen, greedy=greedy)

        return [partial(call, i) for i in range(sets)]

    def plain(i: int) -> Call:
        if greedy:
            return lambda: plain_verify_greedy(logits[i], drafts[i])
        return lambda: plain_verify(plain_probs(logits[i], temperature, k, p), drafts[i], q[i])

    return Prepared(ours, {"PyTorch": lambda: [plain(i) for i in range(sets)]}, check)


def plain_verify_greedy(logits: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
    """`[S, W, V]` and `[S, W - 1]` -> how many drafts are the largest logits, and the token that follows."""
    best = logits.argmax(-1)
    accepted = (best[:, :-1] == drafts).long().cumprod(1).sum(1)
    return accepted, best.gather(1, accepted[:, None]).squeeze(1)


def plain_verify(p: Tensor, drafts: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Speculative sampling as a plain user writes it: `p [S, W, V]`, `drafts [S, W - 1]`, `q [S, W - 1, V]`."""
    at = drafts[..., None]
    share = p[:, :-1].gather(2, at) / q.gather(2, at)
    kept = torch.rand_like(share) < share
    accepted = kept.squeeze(2).long().cumprod(1).sum(1)
    row = accepted[:, None, None].expand(-1, 1, p.shape[-1])
    missing = torch.cat((q, torch.zeros_like(p[:, :1])), 1)
    rest = (p.gather(1, row) - missing.gather(1, row)).clamp(min=0).squeeze(1)
    return accepted, (rest / torch.empty_like(rest).exponential_()).argmax(-1)


def _one(output: Output) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
