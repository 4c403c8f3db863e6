"""Give a quantiser what is done to its input first: `quantize(prepare(x, ...), grid)` -> `quantize(x, ..., grid)`."""

import torch
from torch.fx import GraphModule

from passes.graph import calls, is_call, node_of

ops = torch.ops.dllmc
DEFAULTS = (*[None] * 8, 1e-5, 0, 0)  # of `dllmc::prepare`: x, seven tensors, eps, gate_axis, gate_size
TENSORS, EPS = 8, 13  # `dllmc::quantize` has its grid between the tensors and eps


class FusePrepare:
    """Only where nobody else reads the prepared values."""

    def __call__(self, graph: GraphModule) -> int:
        count = 0
        for quantize in calls(graph, ops.quantize.default):
            if not is_call(quantize.args[0], ops.prepare.default):
                continue
            prepare = node_of(quantize.args[0])
            if len(prepare.users) != 1:
                continue
            given = (*prepare.args, *DEFAULTS[len(prepare.args) :])
            middle = quantize.args[TENSORS:EPS]
            quantize.args = (*given[:TENSORS], *middle, *given[TENSORS:])
            count += 1
        return count
