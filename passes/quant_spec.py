"""How each linear is quantised: the plan that passes read, free of files and recipes."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

HEAD = "head"


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """Bits and grouping of one linear; 16 bits means float, group 0 the whole channel or token."""

    w_bits: int
    a_bits: int = 16
    w_group: int = 0
    a_group: int = 0
    symmetric: bool = True


@dataclass(frozen=True, kw_only=True)
class QuantPlan:
    """Specs by site name; `skip` holds shell patterns of sites in the blocks that stay at 16 bits."""

    linear: QuantSpec | None
    head: QuantSpec | None
    embedding_bits: int = 16
    skip: tuple[str, ...] = field(default=())

    def spec(self, site: str) -> QuantSpec | None:
        """Spec of the linear called `site`, None when it stays at 16 bits."""
        if site == HEAD:
            return self.head
        return None if any(fnmatchcase(site, pattern) for pattern in self.skip) else self.linear
