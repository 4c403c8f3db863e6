"""The runner of passes: counts by name, tidies, checks, and blames the right pass."""

import pytest
import torch
from torch.fx import GraphModule

from passes.base import PassError, run
from passes.graph import attributes, calls, node_of
from tests.passes.sketch import Sketch, aten, count


class CountNegs:
    """Changes nothing and counts the negs."""

    def __call__(self, graph: GraphModule) -> int:
        return sum(1 for _ in calls(graph, aten.neg.default))


class Unhook:
    """Leaves a linear that nobody reads."""

    def __call__(self, graph: GraphModule) -> int:
        for linear in calls(graph, aten.linear.default):
            linear.replace_all_uses_with(node_of(linear.args[0]))
        return 1


class Fail:
    def __call__(self, graph: GraphModule) -> int:
        raise KeyError("lost")


class FailSecondTime(CountNegs):
    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: GraphModule) -> int:
        self.runs += 1
        if self.runs == 2:
            raise KeyError("lost")
        return 1


class Disorder:
    """Moves a node in front of what it reads."""

    def __call__(self, graph: GraphModule) -> int:
        (neg,) = calls(graph, aten.neg.default)
        next(iter(graph.graph.nodes)).prepend(neg)
        return 1


def tiny() -> GraphModule:
    sketch = Sketch()
    x = sketch.input("x")
    return sketch.output(sketch(aten.neg.default, sketch.linear(x, "head", torch.ones(4, 4))))


def anything(graph: GraphModule) -> None:
    return None


def test_counts_by_name_and_adds_up_repeats() -> None:
    assert run(tiny(), [CountNegs(), Unhook(), CountNegs()], anything) == {"CountNegs": 2, "Unhook": 1}


def test_no_passes_change_nothing() -> None:
    graph = tiny()
    text = str(graph.graph)
    assert run(graph, [], anything) == {}
    assert str(graph.graph) == text


def test_tidies_and_recompiles_after_each_pass() -> None:
    graph = tiny()
    seen = []
    run(graph, [CountNegs(), Unhook()], lambda g: seen.append((count(g, aten.linear.default), len(attributes(g)))))
    assert seen == [(1, 1), (0, 0)]
    assert torch.equal(graph(torch.ones(1, 4)), -torch.ones(1, 4))


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([Fail(), CountNegs()], r"pass Fail failed \('lost'\); passes before it: none"),
        ([CountNegs(), Unhook(), Fail()], r"pass Fail failed \('lost'\); passes before it: CountNegs, Unhook$"),
        ([CountNegs(), Unhook(), CountNegs(), Fail()], r"passes before it: CountNegs, Unhook, CountNegs$"),
        ([CountNegs(), Disorder()], r"(?s)pass Disorder failed \(.*\); passes before it: CountNegs$"),
    ],
)
def test_a_failure_names_the_pass_and_those_before(passes: list[CountNegs], message: str) -> None:
    with pytest.raises(PassError, match=message) as caught:
        run(tiny(), passes, anything)
    assert caught.value.__cause__ is not None


def test_a_pass_that_fails_the_second_time_has_itself_before_it() -> None:
    twice = FailSecondTime()
    with pytest.raises(PassError, match=r"pass FailSecondTime failed .* before it: FailSecondTime, Unhook$"):
        run(tiny(), [twice, Unhook(), twice], anything)


def test_a_broken_invariant_is_blamed_on_the_pass_just_run() -> None:
    def no_linear_lost(graph: GraphModule) -> None:
        if not count(graph, aten.linear.default):
            raise ValueError("the linear is gone")

    ran = FailSecondTime()
    message = r"pass Unhook failed \(the linear is gone\); passes before it: CountNegs$"
    with pytest.raises(PassError, match=message) as caught:
        run(tiny(), [CountNegs(), Unhook(), ran], no_linear_lost)
    assert isinstance(caught.value.__cause__, ValueError)
    assert ran.runs == 0
