"""The items of a section that measures whole models: each model with each method."""

from collections.abc import Callable, Iterator
from functools import partial

from bench.gpu.section import Item, Plan, Row
from bench.gpu.shapes import MODELS, TINY_MODELS, ModelShape


def items_of(measure: Callable[[Plan, ModelShape, str, int], Row]) -> Callable[[Plan], Iterator[Item]]:
    """For `Section.items`; a model has the same seed in every section."""

    def items(plan: Plan) -> Iterator[Item]:
        for number, shape in enumerate(TINY_MODELS if plan.machine.emulated else MODELS):
            for method in plan.methods:
                yield f"{shape.name} {method}", partial(measure, plan, shape, method, plan.seed + number)

    return items
