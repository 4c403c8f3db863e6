"""Whole passes on torch's codes: what is left is float rounding, unless a weight anywhere is wrong."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from pipeline.models.checkpoint import open_checkpoint
from pipeline.quantize import Weights, write_weights
from pipeline.recipe_file import read_resolved
from pipeline.validate import torch_session
from pipeline.validation.feeds import sweep
from pipeline.validation.forced import FORCED, TOLERANCE, ForcedModel
from tests.conftest import Made
from tests.pipeline.validation.conftest import Lowered, flip, spoil

SHAPES = ((1, 1), (3, 33))


def largest(forced: ForcedModel, lowered: Lowered) -> list[float]:
    feeds = [one for one in sweep(lowered.checkpoint.config, 1) if one.input_ids.shape in SHAPES]
    return [forced.compare(one).largest for one in feeds]


def test_a_right_file_differs_by_rounding_only(lowered: Lowered, written: Path) -> None:
    forced = ForcedModel(written, lowered.graph)
    assert not written.with_name(FORCED).exists()
    found = largest(forced, lowered)
    assert len(found) == 6
    assert max(found) <= TOLERANCE / 4  # with room: other machines sum in another order
    assert max(found) > 0.0  # it does compare two things


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("embed.weight_half", "entered_0"),
        ("blocks.0.attn.q_k_v_proj.codes", "entered_1"),
        ("blocks.0.attn.o_proj.codes", "entered_2"),
        ("blocks.0.mlp.gate_up_proj.codes", "entered_3"),
        ("blocks.0.mlp.down_proj.codes", "entered_4"),
    ],
)
def test_a_wrong_weight_is_found_where_it_acts(lowered: Lowered, written: Path, name: str, place: str) -> None:
    if name == "embed.weight_half":
        spoil(written, name, lambda view: view.__imul__(np.float16(1.01)), np.float16)
    else:
        spoil(written, name, flip)
    feeds = next(one for one in sweep(lowered.checkpoint.config, 1) if one.input_ids.shape == (3, 33))
    comparison = ForcedModel(written, lowered.graph).compare(feeds)
    assert comparison.largest > TOLERANCE
    assert comparison.place == place


def test_a_wrong_id_is_found_where_the_logits_are_clear(
    lowered: Lowered, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced = ForcedModel(written, lowered.graph)
    feeds = next(one for one in sweep(lowered.checkpoint.config, 1) if one.input_ids.shape == (3, 33))
    session = forced.session

    class Swapped:
        """Two neighbouring ids of one row change places, their logits do not."""

        def run(self, wanted: list[str], inputs: dict[str, Any]) -> list[Any]:
            results: list[Any] = session.run(wanted, inputs)
            results[0][1, 7, :2] = results[0][1, 7, 1::-1].copy()
            return results

    assert forced.compare(feeds).place != "top_ids"
    monkeypatch.setattr(forced, "session", Swapped())
    comparison = forced.compare(feeds)
    assert (comparison.place, comparison.largest) == ("top_ids", np.inf)


def test_nan_is_the_largest_difference(lowered: Lowered, written: Path) -> None:
    spoil(written, "blocks.0.mlp.gate_up_proj.w_scale", lambda view: view.fill(np.nan), np.float32)
    assert np.isnan(largest(ForcedModel(written, lowered.graph), lowered)).all()


def test_nothing_is_left_when_the_session_cannot_be_made(
    lowered: Lowered, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*unused: object, **also: object) -> None:
        raise RuntimeError("no session")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    with pytest.raises(RuntimeError, match="no session"):
        ForcedModel(written, lowered.graph)
    assert not written.with_name(FORCED).exists()


def test_a_float_graph_is_one_stretch(exported: Made, model: Made, lowered: Lowered, tmp_path: Path) -> None:
    bundle, checkpoint = exported("fp16", "dream"), open_checkpoint(model("dream"))
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(bundle / name, tmp_path / name)
    recipe = read_resolved(bundle / "recipe.yaml")
    write_weights(checkpoint, recipe, tmp_path / "weights", on_piece=lambda _: None)
    reference = torch_session(checkpoint, recipe, Weights(tmp_path / "weights"), lowered=True)
    forced = ForcedModel(tmp_path / "model.onnx", reference.graph)  # type: ignore[arg-type]
    assert forced.quantisers == []
    assert max(largest(forced, lowered)) <= TOLERANCE
