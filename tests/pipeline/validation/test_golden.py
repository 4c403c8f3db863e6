"""Recorded passes: they replay where they were recorded, and say how far another machine may be."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.fx import GraphModule

from passes.graph import set_attributes
from pipeline.backends.backend import INPUTS, OUTPUTS, Feeds, FullPasses, Record
from pipeline.backends.ort import OrtSession, open_session
from pipeline.errors import ValidationFailed
from pipeline.runner.loop import BANNED
from pipeline.runner.self_test import self_test
from pipeline.validate import torch_session
from pipeline.validation import golden
from pipeline.validation.golden import SMALLEST_TOLERANCE, TRIES, _bounds, golden_feeds, roundings, write_golden
from pipeline.validation.rounding import Rounded
from tests.pipeline.validation.conftest import Lowered


@pytest.fixture
def session(lowered: Lowered) -> OrtSession:
    return open_session(lowered.work / "model.onnx", threads=1)


def test_what_is_recorded_replays(lowered: Lowered, session: OrtSession, tmp_path: Path) -> None:
    settings = lowered.settings
    assert write_golden(tmp_path / "golden", session, lowered.graph, settings, 0) == 2
    replays = self_test(session, tmp_path / "golden")
    assert [replay.name for replay in replays] == ["pass-0.json", "pass-1.json"]
    assert all(value == 0.0 for replay in replays for value in replay.differences.values())
    for number in range(2):
        written = json.loads((tmp_path / "golden" / f"pass-{number}.json").read_text())
        assert written["inputs"].keys() == set(INPUTS)
        assert written["record"].keys() == set(OUTPUTS)
        tried = [golden_feeds(settings, attempt)[number] for attempt in range(TRIES)]
        assert written["inputs"]["input_ids"] in [feeds.input_ids.tolist() for feeds in tried]
        assert written["tolerance"].keys() == set(OUTPUTS) - {"top_ids"}
        for name, tolerance in written["tolerance"].items():
            values = np.array(written["record"][name])
            assert tolerance >= SMALLEST_TOLERANCE * max(1.0, np.abs(values).max())
            assert tolerance <= 1e-3 * max(1.0, np.abs(values).max())  # no code was near a half
    torch_too = self_test(lowered.reference, tmp_path / "golden")
    assert all(replay.wrong_ids == 0 for replay in torch_too)


class OtherMachine(FullPasses):
    """Torch, rounding otherwise on every operation, as much as ours is taken to."""

    top_k = 8

    def __init__(self, graph: GraphModule, seed: int, scale: float) -> None:
        self.graph, self.seed, self.scale = graph, seed, scale

    @torch.no_grad()
    def full_pass(self, feeds: Feeds) -> Record:
        draw = torch.Generator().manual_seed(self.seed)
        inputs = [torch.from_numpy(array) for array in feeds.as_dict().values()]
        outputs = Rounded(self.graph, draw=draw, scale=self.scale).run(*inputs)
        return Record(**{name: tensor.numpy() for name, tensor in zip(OUTPUTS, outputs, strict=True)})

    def close(self) -> None:
        return None


def test_another_machine_passes_and_damage_fails(lowered: Lowered, session: OrtSession, tmp_path: Path) -> None:
    write_golden(tmp_path / "golden", session, lowered.graph, lowered.settings, 0)
    for seed in range(1000, 1010):
        self_test(OtherMachine(lowered.graph, seed, 1.0), tmp_path / "golden")
    weights = lowered.weights.all()
    damaged = weights["blocks.0.mlp.down_proj.w_scale"] * 1.01
    graph = torch_session(lowered.checkpoint, lowered.recipe, lowered.weights, lowered=True).graph
    assert isinstance(graph, GraphModule)
    set_attributes(graph, weights | {"blocks.0.mlp.down_proj.w_scale": damaged})
    with pytest.raises(ValidationFailed):
        self_test(OtherMachine(graph, 0, 1.0), tmp_path / "golden")


def test_a_canvas_with_a_code_near_a_half_is_passed_over(
    lowered: Lowered, session: OrtSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no other, the tolerance holds what the code moves."""

    def logit_tolerance() -> float:
        write_golden(tmp_path, session, lowered.graph, lowered.settings, 0)
        return float(json.loads((tmp_path / "pass-0.json").read_text())["tolerance"]["top_logits"])

    calls = 0

    def restless(graph: GraphModule, feeds: Feeds, seed: int) -> list[Record]:
        nonlocal calls
        calls += 1
        records = roundings(graph, feeds, seed)
        if calls == 1:
            records[-1].top_logits[0, 0, 0] += 0.5
        return records

    monkeypatch.setattr(golden, "roundings", restless)
    assert logit_tolerance() <= 1e-2
    assert calls >= 3
    calls = 0
    monkeypatch.setattr(golden, "TRIES", 1)
    assert logit_tolerance() >= 2.0


def test_a_banned_logit_does_not_widen_the_tolerance(lowered: Lowered, session: OrtSession) -> None:
    record = session.run(golden_feeds(lowered.settings, 0)[0])
    record.top_logits[..., -1] = BANNED
    assert max(_bounds("top_logits", record, [record, record])) <= 1e-3


def test_a_changed_record_does_not_replay(lowered: Lowered, session: OrtSession, tmp_path: Path) -> None:
    write_golden(tmp_path, session, lowered.graph, lowered.settings, 0)
    content = json.loads((tmp_path / "pass-1.json").read_text())
    content["record"]["lse_t"][1][2] += 2 * content["tolerance"]["lse_t"]
    (tmp_path / "pass-1.json").write_text(json.dumps(content))
    with pytest.raises(ValidationFailed, match=r"pass-1\.json: lse_t"):
        self_test(session, tmp_path)


def test_the_same_seed_gives_the_same_files(lowered: Lowered, session: OrtSession, tmp_path: Path) -> None:
    for place, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_golden(tmp_path / place, session, lowered.graph, lowered.settings, seed)
    for name in ("pass-0.json", "pass-1.json"):
        first, again, other = ((tmp_path / place / name).read_bytes() for place in "abc")
        assert first == again
        assert first != other


@pytest.mark.parametrize("limit", [1, 2, 5, 20, 256])
def test_canvases_fit_the_model(lowered: Lowered, limit: int) -> None:
    config = replace(lowered.settings, max_length=limit)
    for feeds in golden_feeds(config, 0):
        batch, length = feeds.input_ids.shape
        assert length <= limit
        assert (feeds.head_index < feeds.kv_len[:, None]).all()
        assert ((feeds.kv_len >= 1) & (feeds.kv_len <= length)).all()
        assert (feeds.input_ids[:, length // 2 :] == config.mask_id).all()
        assert feeds.head_index.shape == (batch, length - length // 2)
