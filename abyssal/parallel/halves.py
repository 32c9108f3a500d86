"""A backward pass in two halves: the gradients of a stage's input, which another stage waits for, then its weights'.

The first half goes down the nodes of autograd's graph that lie between outputs and input, and keeps what comes into
each node where the way to a weight branches off. The second goes down these branches ("Zero Bubble Pipeline
Parallelism", Qi et al. 2023). Weights that are used at several places, as head and embedding are, get their gradient in
the first half: it is little work, and a way from one place to another would be gone twice. torch's own halves, before
2.13, are wrong for these and for nodes with several outputs.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node


class Branch(NamedTuple):
    """What the second half goes down."""

    node: Node
    came: tuple[Tensor | None, ...]  # the gradients of the node's outputs
    weights: list[nn.Parameter]
    owner: Node  # itself or above it; see `_owner`


def input_half(
    outputs: Sequence[Tensor], gradients: Sequence[Tensor | None] | None, inputs: Sequence[Any],
    weights: Iterable[nn.Parameter],
) -> tuple[tuple[Tensor | None, ...], list[Branch]]:  # fmt: skip
    """The gradients of the `inputs` that are tensors and require them, None for others; `gradients` of the outputs are
    ones if None. The outputs are detached from the graph."""
    given = [torch.ones_like(o) for o in outputs] if gradients is None else gradients
    roots = [o for o in outputs if o.requires_grad]
    asked = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    # Above the outputs, so that what made these has an owner too.
    above = _parents([cast(Node, o.view_as(o).grad_fn) for o in roots])
    path = _upward([_node(x) for x in asked], above, set())[0]
    later: dict[Node, list[nn.Parameter]] = defaultdict(list)
    now: list[nn.Parameter] = []
    for weight in weights:
        if weight.requires_grad:
            nodes = list(_upward([_node(weight)], above, path)[1])
            (later[nodes[0]] if len(nodes) == 1 else now).append(weight)
    came: dict[Node, tuple[Tensor | None, ...]] = {}
    hooks = [node.register_prehook(partial(came.__setitem__, node)) for node in later]
    try:
        found = torch.autograd.grad(
            roots, [*asked, *now], [g for o, g in zip(outputs, given, strict=True) if o.requires_grad],
            retain_graph=len(later) > 0, allow_unused=True,
        )  # fmt: skip
    finally:
        for hook in hooks:
            hook.remove()
    for o in outputs:
        o.detach_()
    _add(now, found[len(asked) :])
    of_inputs = {id(x): g for x, g in zip(asked, found)}
    branches = [Branch(n, came[n], later[n], _owner(n, above)) for n in later if n in came]
    return tuple(of_inputs.get(id(x)) for x in inputs), branches


def weight_half(branches: list[Branch]) -> None:
    """Adds to the weights' `grad`, and lets go of the graph."""
    while branches:
        branch = branches.pop()
        edges = [(GradientEdge(branch.node, i), g) for i, g in enumerate(branch.came) if g is not None]
        if edges:
            nodes, gradients = [edge for edge, _ in edges], [g for _, g in edges]
            _add(branch.weights, torch.autograd.grad(nodes, branch.weights, gradients, allow_unused=True))


def _add(weights: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    for weight, g in zip(weights, gradients, strict=True):
        if g is not None:
            weight.grad = g if weight.grad is None else weight.grad.add_(g)


def _node(t: Tensor) -> Node:
    """What a tensor's gradient goes to. A leaf's node is made when it is first used."""
    node = t.grad_fn or cast(Node, t.view_as(t).grad_fn).next_functions[0][0]
    return cast(Node, node)


def _owner(node: Node, above: Mapping[Node, Sequence[Node]]) -> Node:
    """The nearest node that keeps this one's graph alive: one that is defined in Python does not, before torch 2.13."""
    while isinstance(node, torch._C._FunctionBase):
        node = above[cast(Node, node)][0]
    return node


def _parents(roots: Sequence[Node]) -> dict[Node, list[Node]]:
    """For every node below the roots, those that hand gradients on to it."""
    above: dict[Node, list[Node]] = defaultdict(list)
    seen, left = set(roots), list(roots)
    while left:
        node = left.pop()
        for child, _ in node.next_functions:
            if child is not None:
                above[child].append(node)
                if child not in seen:
                    seen.add(child)
                    left.append(child)
    return above


def _upward(starts: Sequence[Node], above: dict[Node, list[Node]], end: set[Node]) -> tuple[set[Node], set[Node]]:
    """The nodes above some, these included, not going on from those in `end`; and which of `end` were met."""
    seen, met, left = set(starts), set(), list(starts)
    while left:
        for node in above.get(left.pop(), ()):
            if node in end:
                met.add(node)
            elif node not in seen:
                seen.add(node)
                left.append(node)
    return seen, met
