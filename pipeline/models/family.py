"""A model family: how its published `config.json` and tensor names map onto ours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.models.config import ModelConfig

QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """`top` and `block` map our parameter names to the checkpoint's; `{}` in `block_prefix` is the layer number."""

    name: str
    model_type: str
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    top: Mapping[str, str]
    block_prefix: str
    block: Mapping[str, str]

    def tensor_names(self, config: ModelConfig) -> dict[str, str]:
        """Our parameter name -> checkpoint tensor name, for every tensor of one model; a tied head has none."""
        names = {ours: theirs for ours, theirs in self.top.items() if not (config.tied_head and ours == "head.weight")}
        block = dict(self.block)
        if config.qkv_bias:
            block |= {f"attn.{p}.bias": self.block[f"attn.{p}.weight"].removesuffix("weight") + "bias" for p in QKV}
        for layer in range(config.num_layers):
            prefix = self.block_prefix.format(layer)
            names |= {f"blocks.{layer}.{ours}": prefix + theirs for ours, theirs in block.items()}
        return names
