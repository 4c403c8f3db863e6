"""Whole passes on torch's codes: what is left is float rounding, unless a weight anywhere is wrong."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from torch.fx import GraphModule

from pipeline.backends.backend import Feeds
from pipeline.models.checkpoint import open_checkpoint
from pipeline.quantize import Weights, write_weights
from pipeline.recipe_file import read_resolved
from pipeline.runner.loop import BANNED
from pipeline.runner.settings import Settings
from pipeline.validate import torch_session
from pipeline.validation.feeds import sweep
from pipeline.validation.forced import FORCED, Comparison, ForcedModel, _difference
from pipeline.validation.rounding import UNIT
from tests.conftest import Made
from tests.pipeline.validation.conftest import Lowered, flip, spoil

SHAPES = ((1, 1), (3, 33))


def forced_model(path: Path, graph: GraphModule, feeds: list[Feeds]) -> ForcedModel:
    return ForcedModel(path, graph, [one for one in feeds if one.input_ids.shape == (3, 128)], threads=1)


def comparisons(forced: ForcedModel, feeds: list[Feeds]) -> list[Comparison]:
    return [forced.compare(one) for one in feeds if one.input_ids.shape in SHAPES]


def test_a_right_file_differs_by_rounding_only(lowered: Lowered, written: Path) -> None:
    forced = forced_model(written, lowered.graph, lowered.feeds)
    assert not written.with_name(FORCED).exists()
    found = comparisons(forced, lowered.feeds)
    assert len(found) == 6
    assert max(check.share for check in found) <= 0.5  # with room: other machines sum in another order
    assert max(check.largest for check in found) > 0.0  # it does compare two things
    # Around one attention or one norm there are at most some hundred roundings, which grow by its scores.
    assert max(forced.tolerance.values()) <= 1e-4
    assert forced.tolerance["entered_0"] == 4 * UNIT  # the embedding: nothing is computed


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
    feeds = next(one for one in lowered.feeds if one.input_ids.shape == (3, 33))
    comparison = forced_model(written, lowered.graph, lowered.feeds).compare(feeds)
    assert comparison.share > 1.0
    assert comparison.place == place


def test_a_wrong_id_is_found_where_the_logits_are_clear(
    lowered: Lowered, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced = forced_model(written, lowered.graph, lowered.feeds)
    feeds = next(one for one in lowered.feeds if one.input_ids.shape == (3, 33))
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
    found = comparisons(forced_model(written, lowered.graph, lowered.feeds), lowered.feeds)
    assert np.isnan([check.largest for check in found]).all()


def test_ids_and_logits_that_are_banned_are_not_compared(lowered: Lowered, written: Path) -> None:
    """A bias of -1e9 leaves no digits of the logit: what stands there would swallow every difference of the others."""
    feeds = lowered.feeds[0]
    bias = np.full_like(feeds.logit_bias, BANNED)
    bias[:3] = 0.0
    few = replace(feeds, logit_bias=bias)
    forced = forced_model(written, lowered.graph, lowered.feeds)
    assert forced.compare(few).share <= 0.5
    spoil(written, "head.w_scale", lambda view: view.__setitem__(slice(0, 3), view[:3] * 1.001), np.float32)
    comparison = forced_model(written, lowered.graph, lowered.feeds).compare(few)
    assert comparison.share > 1.0
    logits = np.array([[2.0, 1.0, BANNED]], np.float32)
    assert _difference("top_logits", logits * np.array([1, 1.01, 1.0001], np.float32), logits) == pytest.approx(
        0.01 / np.sqrt(2.5), rel=1e-3
    )
    assert _difference("top_logits", np.zeros_like(logits), logits) >= 1.0


def test_small_tensors_are_compared_in_their_own_units() -> None:
    """Not in units of 1."""
    values = np.full((1, 8), 1e-3, np.float32)
    assert _difference("entered_0", values * np.float32(1.01), values) == pytest.approx(1e-2, rel=1e-3)
    small = np.array([[1e-6, 1.0]], np.float32)
    assert _difference("tail", small * np.array([1.01, 1.0], np.float32), small) == pytest.approx(1e-2, rel=1e-3)
    assert np.isnan(_difference("tail", np.array([[np.nan, 1.0]]), small))


def test_nothing_is_left_when_the_session_cannot_be_made(
    lowered: Lowered, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*unused: object, **also: object) -> None:
        raise RuntimeError("no session")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    with pytest.raises(RuntimeError, match="no session"):
        forced_model(written, lowered.graph, lowered.feeds)
    assert not written.with_name(FORCED).exists()


def test_nothing_is_left_after_ctrl_c_while_it_is_written(
    lowered: Lowered, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(model: object, path: Path) -> None:
        path.write_bytes(b"half a model")
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        forced_model(written, lowered.graph, lowered.feeds)
    assert not written.with_name(FORCED).exists()


def test_a_float_graph_is_one_stretch(exported: Made, model: Made, lowered: Lowered, tmp_path: Path) -> None:
    bundle, checkpoint = exported("fp16", "dream"), open_checkpoint(model("dream"))
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(bundle / name, tmp_path / name)
    recipe = read_resolved(bundle / "recipe.yaml")
    write_weights(checkpoint, recipe, tmp_path / "weights", on_piece=lambda _: None)
    reference = torch_session(checkpoint, recipe, Weights(tmp_path / "weights"), lowered=True)
    assert isinstance(reference.graph, GraphModule)
    feeds = list(sweep(Settings.of_model(checkpoint.config), 1))
    forced = forced_model(tmp_path / "model.onnx", reference.graph, feeds)
    assert forced.quantisers == []
    assert max(check.share for check in comparisons(forced, feeds)) <= 0.5
