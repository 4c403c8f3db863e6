"""What a rewrite must leave alone: the logits of a whole model, and the graph that it makes on shapes alone."""

from torch import Tensor
from torch.fx import GraphModule

from passes.graph import attributes, calls, set_attributes
from tests.passes.lockstep import Values
from tests.passes.sketch import aten, copy_of

Feeds = tuple[Tensor, ...]


def values_of(graph: GraphModule, op: object, feeds: Feeds) -> list[Tensor]:
    """What each call of `op` gives."""
    seen = Values(graph)
    seen.run(*feeds)
    return [seen.values[node] for node in calls(graph, op)]


def logits(graph: GraphModule, feeds: Feeds) -> Tensor:
    return values_of(graph, aten.linear.default, feeds)[-1]


def assert_same_logits(graph: GraphModule, other: GraphModule, feeds: Feeds) -> None:
    expected, found = logits(graph, feeds), logits(other, feeds)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def on_shapes(graph: GraphModule) -> GraphModule:
    made = copy_of(graph)
    set_attributes(made, {name: value.to("meta") for name, value in attributes(made).items()})
    return made
