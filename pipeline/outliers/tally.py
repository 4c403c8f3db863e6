"""Outliers of the rows that enter one linear in one mask state, counted batch by batch.

Shape letters: T tokens, K channels. A row's unit is the median of its magnitudes: a few huge values leave it alone.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

RATIO_CAP = 1e9  # a row whose median is zero has no ratio to it


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What is large, on most tokens, and massive; ratios are to the median magnitude of a token.

    "Quantization Meets dLLMs" (arXiv 2508.14896), after DuQuant (arXiv 2406.01721), tells normal outliers, large on all
    tokens, from massive ones, very large on some, without numbers. 10 medians are 6.7 RMS of a normal variable, near
    the 6 of LLM.int8 (arXiv 2208.07339); 1000 medians are massive by arXiv 2402.17762, whose other condition, a
    magnitude above 100, depends on the units of a site and is left out.
    """

    large_ratio: float = 10.0
    normal_share: float = 0.5
    massive_ratio: float = 1000.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Outliers of one site in one mask state.

    `crest_factor` is the largest magnitude over the RMS of all rows, `token_crest_factor` that of a row (median and
    largest of the rows), `token_peak_ratio` the same over the row's median; `massive_tokens` is a share 0..1.
    `normal_channels` are large on most tokens; `massive_channels` are others that hold a massive value.
    """

    tokens: int
    max: float
    rms: float
    crest_factor: float
    token_crest_factor: tuple[float, float]
    token_peak_ratio: tuple[float, float]
    massive_tokens: float
    normal_channels: list[int]
    massive_channels: list[int]
    channel_maxima: Tensor  # [K]

    @property
    def kind(self) -> str:
        """`none`, `normal`, `massive` or `both`."""
        normal, massive = bool(self.normal_channels), bool(self.massive_channels)
        return {(False, False): "none", (True, False): "normal", (False, True): "massive"}.get(
            (normal, massive), "both"
        )


@dataclass
class Tally:
    """Running counts over K channels; `shown`, rows with the largest value among them, are for a picture."""

    thresholds: Thresholds
    shown_tokens: int
    shown: Tensor = field(default_factory=lambda: torch.empty(0))
    tokens: int = 0
    squares: float = 0.0
    maxima: Tensor = field(default_factory=lambda: torch.zeros(()))
    large: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.long))
    massive: list[Tensor] = field(default_factory=list)  # pairs (token, channel)
    crests: list[Tensor] = field(default_factory=list)
    ratios: list[Tensor] = field(default_factory=list)

    def add(self, rows: Tensor) -> None:
        """Count `rows` [T, K], which are finite."""
        if not len(rows):
            return
        magnitudes = rows.abs()
        unit, peaks = magnitudes.median(1, keepdim=True).values, magnitudes.amax(1)
        powers = rows.double().square().mean(1)
        massive = (magnitudes >= self.thresholds.massive_ratio * unit) & (magnitudes > 0)
        self.massive.append(massive.nonzero() + torch.tensor([self.tokens, 0]))
        self.large = self.large + ((magnitudes >= self.thresholds.large_ratio * unit) & (magnitudes > 0)).sum(0)
        if not self.tokens or peaks.max() > self.maxima.max():
            start = min(int(peaks.argmax()), max(0, len(rows) - self.shown_tokens))
            self.shown = rows[start : start + self.shown_tokens].clone()
        self.maxima = torch.maximum(self.maxima, magnitudes.amax(0))
        self.squares += float(powers.sum())
        self.crests.append(_ratio(peaks.double(), powers.sqrt()))
        self.ratios.append(_ratio(peaks.double(), unit[:, 0].double()))
        self.tokens += len(rows)

    def finding(self) -> Finding:
        """What the rows so far show; there is at least one."""
        normal = self.large >= self.thresholds.normal_share * self.tokens
        pairs = torch.cat(self.massive)
        pairs = pairs[~normal[pairs[:, 1]]]
        rms, largest = (self.squares / self.tokens) ** 0.5, float(self.maxima.max())
        return Finding(
            tokens=self.tokens,
            max=largest,
            rms=rms,
            crest_factor=largest / rms if rms else 0.0,
            token_crest_factor=_median_and_max(self.crests),
            token_peak_ratio=_median_and_max(self.ratios),
            massive_tokens=len(set(pairs[:, 0].tolist())) / self.tokens,
            normal_channels=normal.nonzero()[:, 0].tolist(),
            massive_channels=sorted(set(pairs[:, 1].tolist())),
            channel_maxima=self.maxima,
        )


def _ratio(peak: Tensor, unit: Tensor) -> Tensor:
    """`peak / unit`, 0 for a row of zeros and at most `RATIO_CAP`."""
    return torch.where(peak > 0, peak / unit.clamp_min(1e-300), 0.0).clamp_max(RATIO_CAP)


def _median_and_max(parts: list[Tensor]) -> tuple[float, float]:
    values = torch.cat(parts)
    return float(values.median()), float(values.max())
