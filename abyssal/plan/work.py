"""What a rank does in a pass, counted operation by operation: FLOPs, bytes of memory passed over, traffic to others."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NODE = 8  # GPUs that NVLink joins


class Traffic(NamedTuple):
    """Bytes that a rank sends in a pass, by what for and over which link."""

    what: str  # "all-gather", "reduce-scatter", "all-to-all", "all-reduce", "send"
    link: str  # "NVLink" within a node, "InfiniBand" between nodes
    ranks: int  # of the group


class Work(TorchDispatchMode):
    """While it is on, it counts. `context`: the mean number of tokens that a token attends to. `experts`: of a layer,
    on all ranks; fake tokens pick nobody, and are counted as if balanced."""

    def __init__(self, context: float, experts: int) -> None:
        super().__init__()
        self.context, self.experts = context, experts
        self.flops: Counter[str] = Counter()
        self.passed: Counter[str] = Counter()  # bytes read and written, by kind of operation
        self.traffic: Counter[Traffic] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        space, _, name = function.name().partition("::")
        name = name.partition(".")[0]
        if space == "prim":  # questions, as for a device
            return out
        if space == "c10d":
            self._sent(name, args)
        elif space == "abyssal" and "attention" in name:
            self._attention(name, args)
        elif space == "abyssal" and name.startswith("grouped_experts"):
            self._experts(name, args)
        elif space == "abyssal" and name.startswith("fp8_train_linear"):
            self.flops["fp8"] += _fp8_products(name, args)
            self.passed[name] += sum(map(_bytes, _tensors((args, out))))  # rounding
        elif name in ("mm", "addmm", "bmm", "_scaled_mm"):
            a, b = args[1:3] if name == "addmm" else args[:2]
            self.flops["products"] += 2 * a.numel() * b.shape[-1]
        elif not (function.is_view or name.startswith(("empty", "new_empty"))):
            self.passed[name] += sum(map(_bytes, _tensors((args, kwargs, out))))
        return out

    def _attention(self, name: str, args: Any) -> None:
        """Scores and sums: a head's query, and its value, are met by `context` tokens."""
        if name == "latent_attention":
            q, kv, k_rope = args[:3]
            heads, width = q.shape[1], q.shape[-1] + kv.shape[-1] - (q.shape[-1] - k_rope.shape[-1])
        else:
            q, rope, _, _, v = args[1:6] if "backward" in name else args[:5]
            heads, width = q.shape[1], q.shape[-1] + (0 if rope is None else rope.shape[-1]) + v.shape[-1]
        passes = 2.5 if "backward" in name else 1.0  # five products instead of two
        self.flops["attention"] += int(2 * q.shape[0] * heads * width * self.context * passes)

    def _experts(self, name: str, args: Any) -> None:
        if "backward" in name:
            _, x, w1, _, _, kept, _, _, chosen, _ = args
            choices, rows, passes = x.shape[0] * chosen, kept.shape[1], 2
        else:
            _, w1, _, _, indices, _, rows, _ = args
            choices, chosen, passes = indices.numel(), indices.shape[1], 1
        # The host doesn't know how many fall on experts that are here; of one a token, it does (`dispatch.reached`).
        if rows >= choices and chosen > 1:
            rows = choices * w1.shape[0] / max(self.experts, 1)
        self.flops["experts"] += int(rows * 6 * w1.shape[-1] * w1.shape[-2] * passes)

    def _sent(self, name: str, args: Any) -> None:
        found = next(((what, share) for key, (what, share) in SENT.items() if key in name), None)
        group = next((g for g in map(_group, args) if g is not None), None)
        if found is None or group is None:
            return
        what, share = found
        sizes = [_bytes(t) for t in _tensors(args)]
        if what == "all-to-all":
            sizes = [_for_others(args[1], args[4], group.rank())]
        ranks = dist.get_process_group_ranks(group)
        for link, part in links(ranks).items():
            self.traffic[Traffic(what, link, len(ranks))] += int(max(sizes, default=0) * share(len(ranks)) * part)


def _for_others(rows: Tensor, sizes: Sequence[int], rank: int) -> int:
    """Bytes of what is exchanged, `sizes` of it with each rank. Rows for experts have none with the rank itself
    (`dispatch.Sizes`), counts of such rows do."""
    return _bytes(rows) * (sum(sizes) - sizes[rank]) // max(sum(sizes), 1)


def _fp8_products(name: str, args: Any) -> int:
    """FLOPs of a map, or of an MLP's three, in FP8: y forward, dx and dW backward so far as they are wanted."""
    weights: tuple[Tensor, ...] = args[1:4] if "mlp" in name else args[1:2]
    once = sum(w.numel() for w in weights)
    if "backward" in name:
        asked, learns = args[-2:]
        own = once if asked else weights[1].numel() if "mlp" in name else 0  # an MLP's w2 hands on what w1 and w3 need
        once = own + (once if learns else 0)
    return 2 * int(args[0].shape[0]) * once


# What a rank sends, of the largest tensor of the call, by the number of ranks.
SENT: dict[str, tuple[str, Callable[[int], float]]] = {
    "allgather": ("all-gather", lambda n: (n - 1) / n),
    "reduce_scatter": ("reduce-scatter", lambda n: (n - 1) / n),
    "alltoall": ("all-to-all", lambda n: 1.0),  # of `_for_others`
    "allreduce": ("all-reduce", lambda n: 2 * (n - 1) / n),
    "send": ("send", lambda n: 1.0),
}


def links(ranks: list[int]) -> dict[str, float]:
    """Which shares of what a rank sends to the others of its group go over which link, if it sends each as much."""
    others = len(ranks) - 1
    if others < 1:
        return {}
    near = sum(rank // NODE == ranks[0] // NODE for rank in ranks) - 1
    return {link: n / others for link, n in (("NVLink", near), ("InfiniBand", others - near)) if n}


def _group(value: Any) -> dist.ProcessGroup | None:
    """An operator's argument, where it is a process group."""
    if not isinstance(value, torch.ScriptObject):
        return None
    try:
        return dist.ProcessGroup.unbox(value)
    except RuntimeError:  # something else, such as the operation of a reduction
        return None


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, Tensor))


def _bytes(t: Tensor) -> int:
    return math.prod(t.shape) * t.element_size()
