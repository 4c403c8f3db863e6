"""What transforms cost at the sizes of the 8B models, counted from the graph. `python -m bench.costs`"""

from typing import Any

from bench.gpu.shapes import MODELS, ModelShape
from bench.record import write_result
from pipeline.costs import run_time_costs
from pipeline.lower import simulated_graph
from pipeline.models.config import ModelConfig
from pipeline.recipe_file import load_recipe


def config_of(shape: ModelShape) -> ModelConfig:
    """One block of it: every block costs the same, so one stands for all."""
    return ModelConfig(
        family="dream" if shape.shifted else "llada",
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_layers=1,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        embedding_size=shape.vocabulary,
        vocab_size=shape.vocabulary,
        max_length=4096,
        rope_theta=shape.rope_theta,
        norm_eps=shape.norm_eps,
        qkv_bias=shape.qkv_bias,
        tied_head=False,
        shifted_logits=shape.shifted,
        mask_id=shape.mask_id,
        eos_id=0,
        pad_id=0,
    )


LLADA, DREAM = (shape.name for shape in MODELS)
SHAPES = {shape.name: config_of(shape) for shape in MODELS}
RECIPES = ("quarot-w4a4", "duquant-w4a4", "flatquant-w4a4", "freeact-w4a4", "star-w4a4", "star-plus-w4a4", "star-w8a8")


def main() -> None:
    rows: list[dict[str, Any]] = []
    for name, config in SHAPES.items():
        for recipe in RECIPES:
            costs = run_time_costs(simulated_graph(config, load_recipe(recipe), {}), config)
            row = {"model": name, "recipe": recipe}
            rows.append(row | {"extra_multiply_adds": costs.multiply_adds, "extra_parameters": costs.parameters})
            print(rows[-1])
    print(write_result("costs", rows))


if __name__ == "__main__":
    main()
