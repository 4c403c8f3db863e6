"""Give a quantiser what is done to its input first: `quantize(prepare(x, ...), grid)` -> `quantize(x, ..., grid)`."""

import torch
from torch.fx import GraphModule

from passes.graph import calls, is_call, node_of
from plugins.prepare import PREPARE
from plugins.quantize import QUANTIZE

ops = torch.ops.dllmc


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
            given = QUANTIZE.arguments(*quantize.args) | PREPARE.arguments(*prepare.args)
            quantize.args = tuple(given.values())
            count += 1
        return count
