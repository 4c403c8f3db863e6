"""Recorded passes: they replay where they were recorded, and say how far another machine may be."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.backends.backend import INPUTS, OUTPUTS
from pipeline.backends.ort import OrtSession, open_session
from pipeline.errors import ValidationFailed
from pipeline.runner.self_test import self_test
from pipeline.validation.golden import SMALLEST_TOLERANCE, golden_feeds, write_golden
from tests.pipeline.validation.conftest import Lowered


@pytest.fixture
def session(lowered: Lowered) -> OrtSession:
    return open_session(lowered.work / "model.onnx", threads=1)


def test_what_is_recorded_replays(lowered: Lowered, session: OrtSession, tmp_path: Path) -> None:
    config = lowered.checkpoint.config
    assert write_golden(tmp_path / "golden", session, lowered.reference, config, 0) == 2
    replays = self_test(session, tmp_path / "golden")
    assert [replay.name for replay in replays] == ["pass-0.json", "pass-1.json"]
    assert all(value == 0.0 for replay in replays for value in replay.differences.values())
    for number, feeds in enumerate(golden_feeds(config, 0)):
        golden = json.loads((tmp_path / "golden" / f"pass-{number}.json").read_text())
        assert golden["inputs"].keys() == set(INPUTS)
        assert golden["record"].keys() == set(OUTPUTS)
        assert golden["inputs"]["input_ids"] == feeds.input_ids.tolist()
        assert golden["tolerance"].keys() == set(OUTPUTS) - {"top_ids"}
        for name, tolerance in golden["tolerance"].items():
            values = np.array(golden["record"][name])
            assert tolerance >= SMALLEST_TOLERANCE * max(1.0, np.abs(values).max())
            assert tolerance <= 0.5 * max(1.0, np.abs(values).max())  # or the test would prove nothing
    torch_too = self_test(lowered.reference, tmp_path / "golden")
    assert all(replay.wrong_ids == 0 for replay in torch_too)


def test_a_changed_record_does_not_replay(lowered: Lowered, session: OrtSession, tmp_path: Path) -> None:
    write_golden(tmp_path, session, lowered.reference, lowered.checkpoint.config, 0)
    golden = json.loads((tmp_path / "pass-1.json").read_text())
    golden["record"]["lse_t"][1][2] += 2 * golden["tolerance"]["lse_t"]
    (tmp_path / "pass-1.json").write_text(json.dumps(golden))
    with pytest.raises(ValidationFailed, match=r"pass-1\.json: lse_t"):
        self_test(session, tmp_path)


def test_the_same_seed_gives_the_same_files(lowered: Lowered, session: OrtSession, tmp_path: Path) -> None:
    for place, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_golden(tmp_path / place, session, lowered.reference, lowered.checkpoint.config, seed)
    for name in ("pass-0.json", "pass-1.json"):
        first, again, other = ((tmp_path / place / name).read_bytes() for place in "abc")
        assert first == again
        assert first != other


@pytest.mark.parametrize("limit", [1, 2, 5, 20, 256])
def test_canvases_fit_the_model(lowered: Lowered, limit: int) -> None:
    config = replace(lowered.checkpoint.config, max_length=limit)
    for feeds in golden_feeds(config, 0):
        batch, length = feeds.input_ids.shape
        assert length <= limit
        assert (feeds.head_index < feeds.kv_len[:, None]).all()
        assert ((feeds.kv_len >= 1) & (feeds.kv_len <= length)).all()
        assert (feeds.input_ids[:, length // 2 :] == config.mask_id).all()
        assert feeds.head_index.shape == (batch, length - length // 2)
