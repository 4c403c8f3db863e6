"""Results are made again by other code, but not by other words about them."""

from pathlib import Path

import pytest

import pipeline.fingerprint as fingerprint
from pipeline.study.measure import PRESENTATION, measuring_code

ROOT = Path(__file__).parents[2]


def test_every_pattern_names_files() -> None:
    for pattern in PRESENTATION:
        assert list(ROOT.glob(pattern)), pattern


@pytest.mark.parametrize(
    ("name", "decides"),
    [
        ("pipeline/study/table.py", False),
        ("pipeline/cli/study.py", False),
        ("pipeline/study/tasks.py", True),
        ("pipeline/metrics/masked_nll.py", True),
        ("passes/solvers/gptq.py", True),
    ],
)
def test_only_code_that_measures_is_in_a_cell_s_fingerprint(
    name: str, decides: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = [fingerprint.code_digest(), measuring_code()]
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path == ROOT / name))
    fingerprint.code_digest.cache_clear()
    changed = [fingerprint.code_digest(), measuring_code()]
    monkeypatch.undo()
    fingerprint.code_digest.cache_clear()
    assert changed[0] != digests[0]
    assert (changed[1] != digests[1]) == decides
