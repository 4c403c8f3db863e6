"""Options that every ONNX Runtime session of ours gets, and what decides folding."""

from pathlib import Path

import pytest

from pipeline.backends import ort
from pipeline.backends.ort import folds, session_options


def test_only_the_model_and_its_data_decide_folding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "FOLD_BELOW_BYTES", 100)
    model = tmp_path / "model.onnx"
    model.write_bytes(b"m" * 40)
    (tmp_path / "model.onnx.data").write_bytes(b"d" * 40)
    assert folds(model)
    (tmp_path / "tokenizer.json").write_bytes(b"t" * 1000)
    (tmp_path / "engines").mkdir()
    assert folds(model)
    (tmp_path / "model.onnx.data").write_bytes(b"d" * 60)
    assert not folds(model)
    (tmp_path / "model.onnx.data").unlink()
    assert folds(model)


def test_options_of_every_session() -> None:
    options = session_options(3)
    assert options.intra_op_num_threads == 3
    assert options.log_severity_level == 3
    assert options.get_session_config_entry("session.qdq_matmulnbits_accuracy_level") == "0"
