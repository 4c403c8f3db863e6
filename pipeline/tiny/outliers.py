"""Training pressure towards token-dependent activation outliers, which large models grow and tiny ones do not.

A reference model that round-to-nearest W4A4 cannot hurt tells no methods apart. The pressure rewards a large peak in
every token's row at the input of each linear, and charges channels that peak for every token alike: a fixed channel
scaling (SmoothQuant, AWQ) would simply divide those away.
"""

import torch
from torch import Tensor, nn

CHANNEL_SHARE = 16.0  # energy of one channel over the mean channel's, above which it is charged


class OutlierPressure:
    """Adds up over one forward pass: mean shortfall of ln(peak / rms) from its target, plus the charge for channels."""

    def __init__(self, model: nn.Module, target: float) -> None:
        self.log_target = torch.tensor(target).log().item()
        self.terms: list[Tensor] = []
        self.ratios: list[Tensor] = []
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith(("head", "k_proj", "v_proj", "up_proj")):
                module.register_forward_pre_hook(self._measure)

    def _measure(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2)
        power = x.square().mean(-1, keepdim=True) + 1e-12
        peak = x.abs().amax(-1, keepdim=True)
        log_ratio = (peak.square() / power).log() / 2
        share = (x.square() / power).mean(0)
        shortfall = (self.log_target - log_ratio).clamp_min(0).mean()
        self.terms.append(shortfall + (share.amax() / CHANNEL_SHARE).log().clamp_min(0))
        self.ratios.append(log_ratio.detach().mean().exp())

    def take(self) -> tuple[Tensor, float]:
        """Mean over the linears since the last call, and their mean ratio of peak to rms."""
        loss, ratio = torch.stack(self.terms).mean(), torch.stack(self.ratios).mean().item()
        self.terms.clear()
        self.ratios.clear()
        return loss, ratio
