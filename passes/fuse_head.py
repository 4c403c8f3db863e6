"""Join the quantised LM head with its reductions: `record(int8_linear(...))` -> `head(...)`, no logits in memory."""

import torch
from torch.fx import GraphModule

from passes.graph import calls, is_call, node_of

ops = torch.ops.dllmc


class FuseHead:
    """Only a head without bias, zero point or groups, and whose logits nobody else reads, can be fused."""

    def __call__(self, graph: GraphModule) -> int:
        count = 0
        for record in calls(graph, ops.record.default):
            if not is_call(record.args[0], ops.int8_linear.default):
                continue
            linear = node_of(record.args[0])
            codes, scale, zero, weight, w_scale, _, bias, residual, a_bits, _, a_group, w_group = linear.args[:12]
            plain = zero is None and bias is None and residual is None and not a_group and not w_group
            if not plain or a_bits != 8 or len(linear.users) != 1:
                continue
            with graph.graph.inserting_before(record):
                head = graph.graph.call_function(ops.head.default, (codes, scale, weight, w_scale, *record.args[1:]))
            record.replace_all_uses_with(head)
            graph.graph.erase_node(record)
            count += 1
        return count
