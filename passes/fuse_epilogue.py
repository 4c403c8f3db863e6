"""Move what follows an integer GEMM into its epilogue.

y = int_linear(...); silu(y[..., 0::2]) * y[..., 1::2]  ->  int_linear(..., swiglu=True)
r + int_linear(...)                                     ->  int_linear(..., residual=r)
"""

import torch
from torch.fx import GraphModule, Node

from passes.graph import calls, is_call, node_of

aten, ops = torch.ops.aten, torch.ops.dllmc
LINEARS = (ops.int4_linear.default, ops.int8_linear.default)
RESIDUAL, SWIGLU = 7, 12  # argument positions of `dllmc::int4_linear`


def _is_half(value: object, start: int) -> bool:
    return is_call(value, aten.slice.Tensor) and node_of(value).args[1:] == (-1, start, 2**63 - 1, 2)


class FuseSwiglu:
    """SwiGLU over interleaved gate and up rows."""

    def __call__(self, graph: GraphModule) -> int:
        count = 0
        for product in calls(graph, aten.mul.Tensor):
            active, up = product.args
            if not is_call(active, aten.silu.default) or not _is_half(up, 1):
                continue
            gate = node_of(active).args[0]
            linear = node_of(node_of(up).args[0])
            if not _is_half(gate, 0) or node_of(gate).args[0] is not linear or linear.target not in LINEARS:
                continue
            if len(linear.users) != 2 or any(len(node_of(node).users) != 1 for node in (active, gate, up)):
                continue
            product.replace_all_uses_with(linear)
            linear.update_arg(SWIGLU, True)
            for dead in (product, node_of(active), node_of(gate), node_of(up)):
                graph.graph.erase_node(dead)
            count += 1
        return count


class FuseResidual:
    """The residual add of the block, in float32."""

    def __call__(self, graph: GraphModule) -> int:
        count = 0
        for add in calls(graph, aten.add.Tensor):
            if add.kwargs or add.args[0] is add.args[1]:  # r + alpha y, y + y
                continue
            for residual, linear in (tuple(add.args), tuple(reversed(add.args))):
                if not isinstance(linear, Node) or linear.target not in LINEARS or len(linear.users) != 1:
                    continue
                if linear.args[RESIDUAL] is not None or linear.args[SWIGLU] or not isinstance(residual, Node):
                    continue
                # The residual may be computed after the linear's place in the graph, so the linear moves down.
                add.prepend(linear)
                add.replace_all_uses_with(linear)
                linear.update_arg(RESIDUAL, residual)
                graph.graph.erase_node(add)
                count += 1
                break
        return count
