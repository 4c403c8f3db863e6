"""Give a quantiser the norm before it: `quantize(rms_norm(x, w))` -> `quantize(x, norm_weight=w)`."""

import torch
from torch.fx import GraphModule

from passes.graph import calls, is_call, node_of

aten, ops = torch.ops.aten, torch.ops.dllmc
NORM_WEIGHT, EPS = 1, 13  # argument positions of `dllmc::quantize`


class FuseNorm:
    """The norm stays where something else reads it too."""

    def __call__(self, graph: GraphModule) -> int:
        count = 0
        for quantize in calls(graph, ops.quantize.default):
            if not is_call(quantize.args[0], aten.rms_norm.default) or quantize.args[NORM_WEIGHT] is not None:
                continue
            x, shape, weight, eps = (*node_of(quantize.args[0]).args, None, None)[:4]
            # The op's norm runs over the last axis and always has a weight; to drop either would change the values.
            if not isinstance(shape, list | tuple) or len(shape) != 1 or weight is None or eps is None:
                continue
            quantize.update_arg(0, x)
            quantize.update_arg(NORM_WEIGHT, weight)
            quantize.update_arg(EPS, eps)
            count += 1
        return count
