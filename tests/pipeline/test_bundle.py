"""The bundle holds all a device needs, tells what it is, and nothing about where it was made."""

import json
import socket
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from pipeline.bundle import BundleParts, FormatSize, bundle, source_name
from pipeline.errors import InputRefused
from pipeline.folder import MANIFEST, write_bytes, write_json
from pipeline.inspection import inspect_bundle, inspection_lines, size_text, table
from pipeline.licence import Licence, read_licence
from pipeline.manifest import build_manifest, verify
from pipeline.models.config import ModelConfig
from pipeline.models.tokenizer import TokenizerSource
from pipeline.recipe_file import load_recipe, read_resolved
from pipeline.runner.settings import GenerateOptions, read_settings

CONFIG = ModelConfig(
    family="dream",
    hidden_size=128,
    intermediate_size=384,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    embedding_size=400,
    vocab_size=384,
    max_length=256,
    rope_theta=1e4,
    norm_eps=1e-6,
    qkv_bias=True,
    tied_head=False,
    shifted_logits=True,
    mask_id=299,
    eos_id=298,
    pad_id=298,
)
FORMATS = (
    FormatSize(part="linears", format="int4 per channel", tensors=14, size_bytes=1_000_000, fp16_bytes=4_000_000),
    FormatSize(part="head", format="int8 per row", tensors=1, size_bytes=500_000, fp16_bytes=1_000_000),
)


def make_parts(work: Path, **changes: Any) -> BundleParts:
    work.mkdir(exist_ok=True)
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "Q"])
    codes = helper.make_tensor_value_info("codes", TensorProto.INT64, ["B", 3])
    nodes = [helper.make_node("DllmcQuantize", ["input_ids"], ["codes"], domain="dllmc")]
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("dllmc", 1)]
    onnx.save(
        helper.make_model(helper.make_graph(nodes, "g", [ids], [codes]), opset_imports=opsets), work / "model.onnx"
    )
    (work / "model.onnx.data").write_bytes(b"weights")
    (work / "score.onnx").write_bytes(b"the same with another ending")
    (work / "golden").mkdir(exist_ok=True)
    (work / "golden" / "0.json").write_bytes(b"{}")
    (work / "stats.safetensors").write_bytes(b"stays")
    write_json(work / "validation.json", {"nll": {"increase": 0.125, "limit": 0.5}, "passed": True})
    parts = BundleParts(
        work=work,
        source="/home/somebody/models/Dream-v0",
        config=CONFIG,
        recipe=load_recipe("rtn-w4a4", ["generation.gen_length=48"]),
        tokenizer=TokenizerSource(
            text='{"model": {}}', special_ids={"eos_token": 298}, chat_template="{{ x }}", id_limit=300
        ),
        formats=FORMATS,
        tensors_used=27,
        tensors_total=27,
        linears_quantised=14,
        linears_kept=0,
        linears_total=14,
        validated=True,
        licence=Licence({"LICENSE": b"do what you like"}, {"license": "mit"}),
    )
    return replace(parts, **changes)


def test_a_bundle_verifies_and_holds_what_a_device_needs(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    manifest = bundle(make_parts(tmp_path / "work"), target)
    assert verify(target) == manifest
    assert [entry.path for entry in manifest.files] == [
        "LICENSES/LICENSE",
        "MODEL_CARD.md",
        "config.json",
        "golden/0.json",
        "model.onnx",
        "model.onnx.data",
        "recipe.yaml",
        "score.onnx",
        "tokenizer.json",
        "tokenizer_config.json",
        "validation.json",
    ]
    assert read_resolved(target / "recipe.yaml") == load_recipe("rtn-w4a4", ["generation.gen_length=48"])
    settings = read_settings(target / "config.json")
    assert (settings.shifted_logits, settings.mask_id, settings.embedding_size) == (True, 299, 400)
    assert (settings.vocab_size, settings.top_k, settings.generation.gen_length) == (300, 8, 48)
    chat = json.loads((target / "tokenizer_config.json").read_bytes())
    assert chat == {"chat_template": "{{ x }}", "special_ids": {"eos_token": 298}}


def test_what_the_recipe_chose_is_what_the_runner_starts_from(tmp_path: Path) -> None:
    """Every option, at a value that is not its default."""
    chosen = GenerateOptions(
        gen_length=40,
        block_length=8,
        steps=20,
        policy="local_leap",
        threshold=0.75,
        factor=2.0,
        entropy_bound=0.5,
        temperature=0.25,
        top_p=0.875,
        seed=7,
        repetition_penalty=1.5,
        eos="last",
        eos_threshold=0.5,
        edit=0.5,
        exact=True,
        refresh_every=3,
        vicinity=(5, 2),
        guidance=1.5,
        stop=("\n\n", "Question: "),
        monitor=True,
    )
    assert not [name for name, value in asdict(GenerateOptions()).items() if value == getattr(chosen, name)]
    sets = [
        "lowering.guidance=true",
        *(f"generation.{name}={json.dumps(value)}" for name, value in asdict(chosen).items()),
    ]
    parts = make_parts(tmp_path / "work", recipe=load_recipe("rtn-w4a4", sets))
    (tmp_path / "work" / "guided.onnx").write_bytes(b"pairs")
    bundle(parts, tmp_path / "bundle")
    assert read_settings(tmp_path / "bundle" / "config.json").generation == chosen
    assert read_resolved(tmp_path / "bundle" / "recipe.yaml").generation == chosen


def test_the_manifest_describes_the_graph_from_the_file(tmp_path: Path) -> None:
    graph = bundle(make_parts(tmp_path / "work"), tmp_path / "bundle").facts["graph"]
    assert graph["inputs"] == [{"name": "input_ids", "dtype": "int64", "shape": ["B", "Q"]}]
    assert graph["outputs"] == [{"name": "codes", "dtype": "int64", "shape": ["B", 3]}]
    assert graph["opsets"] == {"": 24, "dllmc": 1}
    assert graph["dllmc_nodes"] == {"DllmcQuantize": 1}


def test_nothing_tells_where_it_was_made(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    bundle(make_parts(tmp_path / "work"), target)
    written = b"".join(path.read_bytes() for path in target.rglob("*") if path.is_file())
    for private in ("somebody", "/home", str(tmp_path), socket.gethostname()):
        assert private.encode() not in written, private
    assert source_name("builtin:tiny-dream") == "builtin:tiny-dream"
    assert source_name("models/Dream-v0/") == "Dream-v0"


def test_the_identity_does_not_depend_on_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bundle(make_parts(tmp_path / "work"), tmp_path / "one")
    parts = make_parts(tmp_path / "work")
    write_json(tmp_path / "work" / "validation.json", {"seconds": 2})
    second = bundle(parts, tmp_path / "two")
    assert first.identity == second.identity
    assert first.files != second.files


def test_a_bundle_is_assembled_afresh(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "left over").write_bytes(b"x")
    manifest = bundle(make_parts(tmp_path / "work"), target)
    assert "left over" not in {entry.path for entry in manifest.files}
    verify(target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors_used": 26}, "a tensor of the checkpoint was not used"),
        ({"linears_quantised": 13}, "a linear was left out"),
        ({"linears_quantised": 13, "linears_kept": 1}, "a linear was not quantised"),
        ({"validated": False}, r"status and validation\.json disagree"),
    ],
)
def test_what_a_stage_skipped_in_silence_is_found(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        bundle(make_parts(tmp_path / "work", **change), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_an_unvalidated_bundle_says_so(tmp_path: Path) -> None:
    parts = make_parts(tmp_path / "work", validated=False)
    (tmp_path / "work" / "validation.json").unlink()
    manifest = bundle(parts, tmp_path / "bundle")
    assert manifest.facts["status"] == "unvalidated"
    card = (tmp_path / "bundle" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "Status: **unvalidated**" in card
    assert "Not validated" in card


def test_the_card_states_model_numbers_and_licence(tmp_path: Path) -> None:
    bundle(make_parts(tmp_path / "work"), tmp_path / "bundle")
    card = (tmp_path / "bundle" / "MODEL_CARD.md").read_text(encoding="utf-8")
    for part in ("license: mit", "base_model: Dream-v0", "base_model_relation: quantized", "nll.increase | 0.125"):
        assert part in card, part
    assert "14 of 14 linears quantised" in card
    assert "in `LICENSES/`: LICENSE" in card


def test_inspect_reads_the_manifest_only(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    bundle(make_parts(tmp_path / "work", source="evil\x1b[31m"), target)
    for path in target.rglob("*"):
        if path.is_file() and path.name != MANIFEST:
            path.unlink()
    found = inspect_bundle(target)
    assert (found["weights_bytes"], found["fp16_bytes"], found["ratio"]) == (1_500_000, 5_000_000, 3.333)
    text = "\n".join(inspection_lines(target))
    assert "| total   |" in text
    assert "1.50 MB | 5.00 MB | 3.33" in text
    assert "14 of 14 linears quantised (0 kept" in text
    assert "\x1b" not in text


def test_inspect_refuses_a_manifest_of_something_else(tmp_path: Path) -> None:
    write_bytes(tmp_path / MANIFEST, build_manifest(tmp_path, {"formats": []})[1])
    with pytest.raises(InputRefused, match="lacks a field"):
        inspect_bundle(tmp_path)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_501, "1.00 MB"),
        (4_200_000_000, "4.20 GB"),
        (10**16, "10000 TB"),
    ],
)
def test_sizes_have_three_digits(size: int, text: str) -> None:
    assert size_text(size) == text


def test_a_table_cell_cannot_break_its_table() -> None:
    assert table(("a", "b"), [("x|y", "line\nbreak")])[2] == "| x\\|y | line break |"


def test_licences_are_found_and_nothing_else(tmp_path: Path) -> None:
    assert read_licence(tmp_path) == Licence()
    for name in ("LICENSE", "license", "LICENCE.txt", "NOTICE", "USE_POLICY.md", "license_plates.csv.gz", "MY_LICENSE"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "COPYING").mkdir()
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: [x]\nlicense_link: 3\nlanguage:\n- en\ntags: [a]\n---\n# Title\n",
        encoding="utf-8",
    )
    found = read_licence(tmp_path)
    assert set(found.files) == {"LICENSE", "LICENCE.txt", "NOTICE", "USE_POLICY.md", "license_plates.csv.gz"}
    assert found.front_matter == {"license": "other", "license_name": ["x"], "language": ["en"]}


@pytest.mark.parametrize(
    "text", ["", "# Title", "---\nlicense: [\n---\n", "---\n- a\n---\n", "---\nlicense: a\n", "\xff"]
)
def test_a_readme_without_front_matter_gives_no_licence(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
    assert read_licence(tmp_path).front_matter == {}


def test_a_huge_licence_is_not_carried(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "LICENSE").write_bytes(b"x" * ((1 << 20) + 1))
    assert read_licence(tmp_path).files == {}
    assert "is not carried over" in caplog.text
