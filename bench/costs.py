"""What transforms cost at the sizes of the 8B models, counted from the graph. `python -m bench.costs`"""

from typing import Any

from bench.record import write_result
from pipeline.costs import run_time_costs
from pipeline.lower import simulated_graph
from pipeline.models.config import ModelConfig
from pipeline.recipe_file import load_recipe

SHARED: dict[str, Any] = {"max_length": 4096, "rope_theta": 5e5, "norm_eps": 1e-5, "tied_head": False, "num_layers": 1}
LLADA, DREAM = "LLaDA-8B", "Dream-7B"
# Every block costs the same, so one stands for all.
SHAPES = {
    LLADA: ModelConfig(
        family="llada",
        hidden_size=4096,
        intermediate_size=12288,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        embedding_size=126464,
        vocab_size=126464,
        qkv_bias=False,
        shifted_logits=False,
        mask_id=126336,
        eos_id=126081,
        pad_id=126081,
        **SHARED,
    ),
    DREAM: ModelConfig(
        family="dream",
        hidden_size=3584,
        intermediate_size=18944,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        embedding_size=152064,
        vocab_size=152064,
        qkv_bias=True,
        shifted_logits=True,
        mask_id=151666,
        eos_id=151643,
        pad_id=151643,
        **SHARED,
    ),
}
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
