"""What can be chosen about a method, with the published settings as defaults. The recipe has a section for each."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Gptq:
    """arXiv 2210.17323: `damping` a share of the mean diagonal of the Hessian, `block` columns between lazy updates."""

    damping: float = 0.01
    block: int = 128
    act_order: bool = False


@dataclass(frozen=True, kw_only=True)
class Awq:
    """arXiv 2306.00978: exponents 0, 1/`grid`, .. of the mean magnitude; clips 1, 1 - 1/`clip_steps`, .. to `min_clip`.

    The error of the outputs is measured on `rows` inputs drawn from all.
    """

    grid: int = 20
    rows: int = 512
    clip: bool = True
    min_clip: float = 0.5
    clip_steps: int = 20


@dataclass(frozen=True, kw_only=True)
class SmoothQuant:
    """arXiv 2211.10438, equation 4: `alpha` moves difficulty from activations to weights."""

    alpha: float = 0.5


@dataclass(frozen=True, kw_only=True)
class QuaRot:
    """arXiv 2404.00456: how rotated weights are rounded, and whether their clip is searched by squared error."""

    weights: Literal["gptq", "rtn"] = "gptq"
    clip_weights: bool = True


@dataclass(frozen=True, kw_only=True)
class DuQuant:
    """arXiv 2406.01721: smoothing exponent, channels a rotated block, greedy steps, and the clip ratios.

    `weights` by gptq are solved on what the float blocks before give, not the quantised ones.
    """

    alpha: float = 0.5
    block: int = 128
    steps: int = 256
    a_clip: float = 0.9
    w_clip: float = 0.8
    weights: Literal["gptq", "rtn"] = "rtn"


@dataclass(frozen=True, kw_only=True)
class FlatQuant:
    """arXiv 2410.09426: AdamW over each block; `clip_rate` multiplies the rate of the clips, 0 leaves them.

    `weights` by gptq are solved on what the float blocks before give, not the quantised ones.
    """

    rate: float = 5e-3
    clip_rate: float = 10.0
    epochs: int = 15
    batch: int = 4
    alpha: float = 0.3
    weights: Literal["gptq", "rtn"] = "rtn"


@dataclass(frozen=True, kw_only=True)
class FreeAct:
    """arXiv 2603.01776: FlatQuant with d / `share` coordinates that only one mask state uses."""

    share: int = 32


@dataclass(frozen=True, kw_only=True)
class Star:
    """SGAT of arXiv 2606.04945, section 3.2, and what goes beyond it.

    d / `share` coordinates for each state; AdamW over each linear; `init` by the states' second moments or at random,
    `transform` of two factors, one, or a Hadamard that is not learned. The right factor is `tile` wide where that
    divides, 0 is the closest pair. `clip_rate` multiplies the rate of learned clips, 0 learns none. `balance` folds
    closed-form scales and head transforms first; by kronecker the factors are stretched, too, and P is not orthogonal.
    `weights` by gptq are solved on float inputs, by paired on the quantised ones towards the float output.
    """

    share: int = 32
    transform: Literal["kronecker", "dense", "hadamard"] = "kronecker"
    tile: int = 0
    init: Literal["random", "moments"] = "random"
    gate: bool = True
    rate: float = 1e-3
    epochs: int = 15
    batch: int = 4
    clip_rate: float = 0.0
    balance: Literal["none", "channels", "kronecker"] = "none"
    weights: Literal["rtn", "gptq", "paired"] = "rtn"


@dataclass(frozen=True, kw_only=True)
class Tac:
    """TAC of arXiv 2606.04945, appendix C, with its symbols: blocks of g channels, rho, eta, alpha, and the samples.

    `form` paired is a ridge regression on paired rows, its shrinkage `alpha` chosen on held-out samples.
    """

    form: Literal["none", "covariance", "paired"] = "covariance"
    block: int = 16
    samples: int = 64
    rho: float = 3e-4
    eta: float = 0.15
    alpha: float = 0.55


@dataclass(frozen=True, kw_only=True)
class Options:
    """All of them; a method reads its own, and GPTQ's where it solves with that."""

    gptq: Gptq = field(default_factory=Gptq)
    awq: Awq = field(default_factory=Awq)
    smoothquant: SmoothQuant = field(default_factory=SmoothQuant)
    quarot: QuaRot = field(default_factory=QuaRot)
    duquant: DuQuant = field(default_factory=DuQuant)
    flatquant: FlatQuant = field(default_factory=FlatQuant)
    freeact: FreeAct = field(default_factory=FreeAct)
    star: Star = field(default_factory=Star)
    tac: Tac = field(default_factory=Tac)
