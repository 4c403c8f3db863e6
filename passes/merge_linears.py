"""Merge linears that read the same input, so that it is quantised once and one GEMM serves them.

    q = x Wq^T, k = x Wk^T, v = x Wv^T      ->  q, k, v = slices of x [Wq; Wk; Wv]^T
    silu(x Wg^T) * (x Wu^T)                 ->  y = x W^T; silu(y[..., 0::2]) * y[..., 1::2]

Gate and up rows are interleaved (row 2i gate, 2i+1 up), the order in which the GEMM's SwiGLU epilogue wants them.
Per-channel and per-token quantisation are unchanged by merging.
"""

from collections import defaultdict
from itertools import accumulate

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.graph import add_attribute, attribute, calls, is_attribute, is_call, node_of, site_of

aten = torch.ops.aten


class MergeLinears:
    """Gate and up are told by the SwiGLU that joins them, the rest by their common input."""

    def __call__(self, graph: GraphModule) -> int:
        count = 0
        for product in calls(graph, aten.mul.Tensor):
            count += self._merge_gate_up(graph, product)
        by_input: dict[Node, list[Node]] = defaultdict(list)
        for linear in calls(graph, aten.linear.default):
            by_input[node_of(linear.args[0])].append(linear)
        for linears in by_input.values():
            if len(linears) > 1:
                self._concatenate(graph, linears)
                count += 1
        return count

    @staticmethod
    def _merge_gate_up(graph: GraphModule, product: Node) -> int:
        silu, up = product.args
        if not is_call(silu, aten.silu.default) or not is_call(up, aten.linear.default):
            return 0
        gate, up = node_of(node_of(silu).args[0]), node_of(up)
        if not is_call(gate, aten.linear.default) or gate.args[0] is not up.args[0]:
            return 0
        if any(len(node.users) != 1 for node in (node_of(silu), gate, up)):
            return 0
        with graph.graph.inserting_before(gate):
            merged = _merged_linear(graph, [gate, up], interleave=True)
            halves = [graph.graph.call_function(aten.slice.Tensor, (merged, -1, i, 2**63 - 1, 2)) for i in range(2)]
            active = graph.graph.call_function(aten.silu.default, (halves[0],))
            joined = graph.graph.call_function(aten.mul.Tensor, (active, halves[1]))
        product.replace_all_uses_with(joined)
        for old in (product, node_of(silu), gate, up):
            graph.graph.erase_node(old)
        return 1

    @staticmethod
    def _concatenate(graph: GraphModule, linears: list[Node]) -> None:
        with graph.graph.inserting_before(linears[0]):
            merged = _merged_linear(graph, linears, interleave=False)
            sizes = [attribute(graph, node_of(linear.args[1])).shape[0] for linear in linears]
            ends = list(accumulate(sizes))
            # Not one split: it becomes a sequence in ONNX, which TensorRT does not know.
            parts = [
                graph.graph.call_function(aten.slice.Tensor, (merged, -1, end - size, end))
                for size, end in zip(sizes, ends, strict=True)
            ]
        for linear, part in zip(linears, parts, strict=True):
            linear.replace_all_uses_with(part)
            graph.graph.erase_node(linear)


def merged_site(sites: list[str]) -> str:
    """`a.q_proj`, `a.k_proj`, `a.v_proj` -> `a.q_k_v_proj`."""
    parents = {site.rpartition(".")[0] for site in sites}
    if len(parents) != 1:
        raise ValueError(f"linears {sites} share an input but not a module")
    leaves = [site.rpartition(".")[2] for site in sites]
    endings = {leaf.partition("_")[2] for leaf in leaves}
    if len(endings) != 1:
        raise ValueError(f"linears {sites} share an input but not an ending")
    return f"{parents.pop()}.{'_'.join(leaf.partition('_')[0] for leaf in leaves)}_{endings.pop()}"


def _merged_linear(graph: GraphModule, linears: list[Node], *, interleave: bool) -> Node:
    def join(parts: list[Tensor]) -> Tensor:
        # Stacking along dimension 1 and flattening alternates the rows of equally tall parts.
        return torch.stack(parts, dim=1).flatten(0, 1) if interleave else torch.cat(parts)

    for linear in linears:
        if not is_attribute(linear.args[1]):
            raise ValueError(f"{linear.name} is quantised already; merge first")
    site = merged_site([site_of(linear) for linear in linears])
    weights = [attribute(graph, node_of(linear.args[1])) for linear in linears]
    arguments = [linears[0].args[0], add_attribute(graph, f"{site}.weight", join(weights))]
    biases = [linear.args[2] if len(linear.args) > 2 else None for linear in linears]
    if any(bias is not None for bias in biases):
        if any(bias is None for bias in biases):
            raise ValueError(f"only some linears merged into {site} have a bias")
        arguments.append(
            add_attribute(graph, f"{site}.bias", join([attribute(graph, node_of(bias)) for bias in biases]))
        )
    return graph.graph.call_function(aten.linear.default, tuple(arguments))
