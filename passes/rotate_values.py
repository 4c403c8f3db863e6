"""Rotate the values of attention head by head, for nothing at run time.

One R [C, C] serves all heads of a layer, so grouped heads stay grouped (QuaRot, arXiv 2404.00456, stage 1c); what it
does to the weights is in `transform_values.py`. Shape letter: C channels a head.
"""

from torch.fx import GraphModule

from passes.solvers.draws import generator
from passes.solvers.hadamard import rotation
from passes.transform_values import TransformValues, ValueTransform


class RotateValues:
    """Every attention. Raises ValueError for one whose values no linear makes, or that no linear reads."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, graph: GraphModule) -> int:
        return TransformValues(self._rotation)(graph)

    def _rotation(self, site: str, size: int) -> ValueTransform:
        turn = rotation(size, generator(self.seed, site, "values"))
        return ValueTransform(fold=turn, unfold=turn)
