"""No Python in a model folder ever runs, whatever its files say."""

import json
import logging
import sys
from pathlib import Path

import pytest

from pipeline.errors import InputRefused
from pipeline.models import FAMILIES
from pipeline.models.checkpoint import load_model, open_checkpoint
from pipeline.models.tokenizer import read_tokenizer
from tests.pipeline.models.folders import PUBLISHED, edit_json, write_folder
from tests.pipeline.models.test_tokenizer import dream_files

MODULES = [
    "configuration_llada",
    "modeling_llada",
    "configuration_dream",
    "modeling_dream",
    "tokenization_dream",
    "__init__",
    "sitecustomize",
]


def plant(folder: Path) -> Path:
    """Modules by every name that `auto_map` uses; each leaves a file behind when it runs."""
    proof = folder / "it-ran"
    for module in MODULES:
        (folder / f"{module}.py").write_text(f"open({str(proof)!r}, 'w').close()\n")
    return proof


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_map_is_ignored_with_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str) -> None:
    rows = {"embedding_size": 600, "vocab_size": 600}
    folder = write_folder(tmp_path, family, **rows)
    dream_files(folder)
    proof = plant(folder)
    values = json.loads((folder / "config.json").read_text())
    with caplog.at_level(logging.DEBUG, logger="pipeline"):
        open_checkpoint(folder)
    assert not caplog.records
    (folder / "config.json").write_text(json.dumps(values | {"auto_map": PUBLISHED[family]["auto_map"]}))
    with caplog.at_level(logging.DEBUG, logger="pipeline"):
        checkpoint = open_checkpoint(folder)
        load_model(checkpoint)
        read_tokenizer(folder, checkpoint.config)
    assert [r.message for r in caplog.records if "auto_map" in r.message] == [
        f"{folder / 'config.json'}: auto_map ignored, dllmc never runs code from a model folder"
    ]
    assert not proof.exists()
    assert not any(module.partition(".")[0] in MODULES[:5] for module in sys.modules)


def test_auto_map_of_another_model_type_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "llada")
    proof = plant(folder)
    edit_json(
        folder / "config.json",
        lambda values: values.update(model_type="sdar", auto_map={"AutoModel": "modeling_llada.LLaDAModelLM"}),
    )
    with pytest.raises(
        InputRefused, match=r"model_type is 'sdar'.*auto_map points to code in the folder, which dllmc never"
    ):
        open_checkpoint(folder)
    assert not proof.exists()


def test_the_canary_would_sing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted modules do leave their file when something imports one."""
    proof = plant(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__("modeling_llada")
    monkeypatch.delitem(sys.modules, "modeling_llada")
    assert proof.exists()
