"""Sidecar files: what the passes leave of each piece, equal to what they leave of the whole model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from passes.graph import attributes
from pipeline.capture import capture_whole, materialise
from pipeline.errors import InputRefused, UsageFault
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.quantize import Weights, check_format, quant_plan, simulate, write_weights
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from tests.pipeline.watched import Watched, uncollected

Made = Callable[..., Path]

RECIPES = {
    "fp16": load_recipe("fp16"),
    "rtn-w8a8": load_recipe("rtn-w8a8"),
    "rtn-w4a16": load_recipe("rtn-w4a16", ["linear.w_group=32", "linear.w_symmetric=true"]),
    "rtn-w3a16": load_recipe("rtn-w3a16", ["linear.w_group=16", "linear.w_symmetric=false"]),
    "rtn-w4a4": load_recipe("rtn-w4a4", ["embedding.bits=8", "skip=[blocks.1.mlp.down_proj]"]),
}


def written(checkpoint: Checkpoint, recipe: Recipe, folder: Path) -> Weights:
    write_weights(checkpoint, recipe, folder, on_piece=lambda _: None)
    return Weights(folder)


def merged(checkpoint: Checkpoint, site: str) -> Tensor:
    """The float weight of a site, from the checkpoint's own tensors."""
    parent, _, leaf = site.rpartition(".")
    parts = [f"{parent}.{part}_proj" for part in leaf.removesuffix("_proj").split("_")] if parent else [site]
    tensors = [checkpoint.tensor(f"{part}.weight").float() for part in parts]
    if leaf == "gate_up_proj":  # row 2i gate, 2i+1 up
        rows = torch.empty(2 * len(tensors[0]), tensors[0].shape[1])
        rows[0::2], rows[1::2] = tensors
        return rows
    return torch.cat(tensors)


@pytest.mark.parametrize("name", RECIPES)
def test_pieces_leave_what_the_whole_model_leaves(model: Made, name: str, tmp_path: Path) -> None:
    """The names of the lowered graph, and the values of the passes run on everything at once."""
    checkpoint = open_checkpoint(model("dream", layers=2))
    recipe = RECIPES[name]
    weights = written(checkpoint, recipe, tmp_path)
    whole = materialise(
        capture_whole(checkpoint.config, top_k=8),
        {**{n: merged(checkpoint, n.removesuffix(".weight")) for n in weight_names(checkpoint)}, **small(checkpoint)},
    )
    simulate(whole, recipe, checkpoint.config)
    expected = attributes(whole)
    assert weights.names == expected.keys()
    for each, value in expected.items():
        assert weights[each].dtype == value.dtype
        assert torch.equal(weights[each], value), each


def weight_names(checkpoint: Checkpoint) -> list[str]:
    inside = ("attn.q_k_v_proj", "attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    blocks = [f"blocks.{index}.{site}.weight" for index in range(checkpoint.config.num_layers) for site in inside]
    return [*blocks, "embed.weight", "head.weight"]


def small(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Norms, merged biases, rotary frequencies."""
    from pipeline.capture import constants

    found = {n: checkpoint.tensor(n).float() for n in checkpoint.tensor_names if "norm" in n}
    for index in range(checkpoint.config.num_layers):
        site = f"blocks.{index}.attn"
        parts = [checkpoint.tensor(f"{site}.{letter}_proj.bias").float() for letter in "qkv"]
        found[f"{site}.q_k_v_proj.bias"] = torch.cat(parts)
    return found | constants(checkpoint.config)


@pytest.mark.parametrize(("name", "limit"), [("rtn-w8a8", 127), ("rtn-w4a16", 7), ("rtn-w4a4", 7)])
def test_codes_lie_within_half_a_step_of_the_weights(model: Made, name: str, limit: int, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model("llada", layers=2))
    recipe = RECIPES[name]
    weights = written(checkpoint, recipe, tmp_path)
    sites = [each.removesuffix(".codes") for each in weights.names if each.endswith(".codes")]
    assert len(sites) == 8 + 1 - len(recipe.skip) + (recipe.embedding.bits == 8)
    for site in sites:
        codes, scale, true = weights[f"{site}.codes"], weights[f"{site}.w_scale"], merged(checkpoint, site)
        largest = 127 if site in ("head", "embed") else limit
        assert int(codes.abs().max()) == largest
        steps = scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)
        assert bool(((codes * steps - true).abs() <= steps * (0.5 + 1e-5)).all()), site
        if site not in ("head", "embed") and recipe.linear.w_group:
            assert scale.shape[1] == codes.shape[1] // recipe.linear.w_group


def test_four_bits_take_half_a_byte(model: Made, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model("llada", layers=2))
    weights = written(checkpoint, RECIPES["rtn-w4a4"], tmp_path)
    for name in weights.names:
        packed = name.endswith(".codes") and name.startswith("blocks.")
        assert weights.is_packed(name) == packed
        assert weights.stored(name).numel() == weights[name].numel() // (2 if packed else 1)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["blocks.0", "blocks.1", "constants", "ends"]
    with safe_open(tmp_path / "blocks.0.safetensors", "pt") as file:
        assert all(name.startswith("blocks.0.") for name in file.keys())  # noqa: SIM118 (a file is not a dict)
    stored = weights.stored("blocks.0.attn.o_proj.codes").view(torch.uint8)
    even = (stored & 15).to(torch.int8)
    even[even > 7] -= 16
    assert torch.equal(even, weights["blocks.0.attn.o_proj.codes"][:, 0::2])  # low nibble first


def test_a_skipped_linear_stays_at_16_bits(model: Made, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model("llada", layers=2))
    weights = written(checkpoint, RECIPES["rtn-w4a4"], tmp_path)
    site = "blocks.1.mlp.down_proj"
    assert {name for name in weights.names if name.startswith(site)} == {f"{site}.weight_half"}
    assert torch.equal(weights[f"{site}.weight_half"].float(), merged(checkpoint, site).half().float())
    assert quant_plan(RECIPES["rtn-w4a4"], checkpoint.config).spec(site) is None


def test_the_same_weights_give_the_same_files(model: Made, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model("llada", layers=2))
    told: list[str] = []
    for place in ("a", "b"):
        write_weights(checkpoint, RECIPES["rtn-w4a4"], tmp_path / place, on_piece=told.append)
    assert told == ["ends", "blocks.0", "blocks.1"] * 2
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_passes_are_counted_over_all_pieces(model: Made, tmp_path: Path) -> None:
    changed = write_weights(
        open_checkpoint(model("llada", layers=2)), RECIPES["rtn-w4a4"], tmp_path, on_piece=lambda _: None
    )
    assert changed == {"QuantizeWeights": 8, "InsertFakeQuant": 8, "StoreHalf": 2}  # one skipped, the head added


def test_one_piece_is_in_memory_at_a_time(model: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(model("llada", layers=4))
    watched = Watched(monkeypatch)
    with uncollected():
        written(checkpoint, RECIPES["rtn-w4a4"], tmp_path)
    assert watched.alive == [0] * 5


def test_a_weight_beyond_half_precision_is_refused(
    model: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(model("llada", layers=2))
    tensor = Checkpoint.tensor
    monkeypatch.setattr(
        Checkpoint,
        "tensor",
        lambda self, name: tensor(self, name) * (1e6 if name == "blocks.1.attn.o_proj.weight" else 1),
    )
    written(checkpoint, RECIPES["rtn-w8a8"], tmp_path / "codes")  # scales are float32
    with pytest.raises(InputRefused, match=r"blocks\.1\.attn\.o_proj\.weight"):
        written(checkpoint, RECIPES["fp16"], tmp_path / "half")


def test_static_scales_that_no_method_finds_are_refused() -> None:
    recipe = load_recipe("rtn-w8a8", ["attention.v_bits=8", "attention.v_scale=head_static"])
    with pytest.raises(UsageFault, match=r"pass --set attention\.v_scale=token"):
        check_format(recipe)
    check_format(load_recipe("rtn-w8a8", ["attention.v_bits=8"]))


def test_mask_states_that_clean_text_lacks_are_refused() -> None:
    for name in ("freeact", "star"):
        with pytest.raises(UsageFault, match=rf"method {name} .*calibration\.states=noised"):
            check_format(load_recipe(f"{name}-w4a4", ["calibration.states=clean"]))
    for name, states in (("freeact-w4a4", "noised"), ("flatquant-w4a4", "clean")):
        check_format(load_recipe(name, [f"calibration.states={states}"]))


def test_a_tied_head_is_stored_in_its_own_format(model: Made, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model("llada", layers=2, tied=True))
    weights = written(checkpoint, RECIPES["rtn-w8a8"], tmp_path)
    assert {"embed.weight_half", "head.codes", "head.w_scale"} <= weights.names
    embedding = weights["embed.weight_half"].float()
    assert bool(((weights["head.codes"] * weights["head.w_scale"] - embedding).abs() <= weights["head.w_scale"]).all())
