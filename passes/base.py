"""The runner of passes: run, clean, check the invariant, count; a failure names the pass and those before it."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch.fx import GraphModule

from passes.graph import drop_unused


class Pass(Protocol):
    """Edits a graph in place and returns how many places changed."""

    def __call__(self, graph: GraphModule) -> int: ...


class PassError(RuntimeError):
    """A pass failed or broke the graph's invariant; always our own bug."""


Invariant = Callable[[GraphModule], None]


def run(graph: GraphModule, passes: Sequence[Pass], check: Invariant) -> dict[str, int]:
    """Run `passes` in order with `check` after each; returns places changed by pass name."""
    changed: dict[str, int] = {}
    for index, each in enumerate(passes):
        name = type(each).__name__
        try:
            changed[name] = changed.get(name, 0) + each(graph)
            drop_unused(graph)
            graph.graph.lint()
            graph.recompile()
            check(graph)
        except Exception as error:
            before = ", ".join(type(earlier).__name__ for earlier in passes[:index]) or "none"
            raise PassError(f"pass {name} failed ({error}); passes before it: {before}") from error
    return changed
