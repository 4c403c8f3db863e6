"""How each linear is quantised: the plan that passes read, free of files and recipes."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from passes.options import Options

HEAD = "head"


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """Bits and grouping of one linear; 16 bits means float, group 0 the whole channel or token.

    `symmetric` is the activations' grid, `w_symmetric` the weights'.
    """

    w_bits: int
    a_bits: int = 16
    w_group: int = 0
    a_group: int = 0
    symmetric: bool = True
    w_symmetric: bool = True


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Bits of attention's operands; probabilities on a fixed grid over 0..1 (unit) or on one of each row."""

    k_bits: int = 16
    v_bits: int = 16
    prob_bits: int = 16
    prob_scale: Literal["unit", "row"] = "unit"

    @property
    def is_float(self) -> bool:
        """Whether every operand has 16 bits."""
        return min(self.k_bits, self.v_bits, self.prob_bits) >= 16


@dataclass(frozen=True, kw_only=True)
class QuantPlan:
    """Specs by site name; `skip` holds shell patterns of sites in the blocks that stay at 16 bits.

    `mask_id` is the token that a whole graph knows masked positions by.
    """

    linear: QuantSpec | None
    head: QuantSpec | None
    embedding_bits: int = 16
    skip: tuple[str, ...] = field(default=())
    attention: AttentionSpec = field(default_factory=AttentionSpec)
    options: Options = field(default_factory=Options)
    mask_id: int = 0

    @property
    def symmetric_rows(self) -> bool:
        """Whether what is rounded per token, operands of attention included, has a grid without a zero point."""
        return self.linear is None or self.linear.symmetric

    def spec(self, site: str) -> QuantSpec | None:
        """Spec of the linear called `site`, None when it stays at 16 bits."""
        if site == HEAD:
            return self.head
        return None if any(fnmatchcase(site, pattern) for pattern in self.skip) else self.linear
