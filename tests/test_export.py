"""The two commands on folders that transformers saved: export, then verify, inspect, run; and every bad input."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.__main__ import main
from pipeline.backends.backend import Feeds
from pipeline.models.checkpoint import open_checkpoint
from pipeline.quantize import Weights, write_weights
from pipeline.recipe_file import read_resolved
from pipeline.runner import Runner
from pipeline.runner.loop import generate
from pipeline.runner.settings import GenerateOptions
from pipeline.validate import torch_session
from tests.exports import export, saved_model

ROOT = Path(__file__).parents[1]
Made = Callable[..., Path]
Out = pytest.CaptureFixture[str]

# recipe, family, choices: each recipe, each family tied and untied, each head layout, sharded bfloat16 throughout.
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("fp16", "dream", {}),
    ("rtn-w8a8", "dream", {}),
    ("rtn-w4a4", "dream", {"layers": 1, "tied": True}),
    ("rtn-w8a8", "llada", {"layers": 1, "kv_heads": 4}),
    ("rtn-w4a16", "llada", {"tied": True}),
    ("rtn-w4a4", "llada", {"tied": True}),
]
NODES = {
    "fp16": {},
    "rtn-w8a8": {"DllmcQuantize": 4, "DllmcInt8Linear": 4},
    "rtn-w4a16": {"DllmcQuantize": 2},  # keys and values
    "rtn-w4a4": {"DllmcQuantize": 4, "DllmcInt4Linear": 4},
}


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, (*case[:2], *case[2]))))
def case(request: pytest.FixtureRequest, exported: Made) -> tuple[str, dict[str, Any], Path]:
    recipe, family, choices = request.param
    return recipe, choices, exported(recipe, family, **choices)


def test_a_saved_folder_becomes_a_bundle_that_runs(
    case: tuple[str, dict[str, Any], Path], capsys: Out, tmp_path: Path
) -> None:
    recipe, choices, bundle = case
    assert main(["verify", str(bundle)]) == 0
    assert main(["inspect", str(bundle), "--json"]) == 0
    words = capsys.readouterr().out
    facts = json.loads(words[words.index("{") :])
    layers = choices.get("layers", 2)
    head = {} if recipe == "fp16" else {"DllmcQuantize": 1, "DllmcHead": 1}
    per_block = NODES[recipe]
    expected = {name: head.get(name, 0) + layers * per_block.get(name, 0) for name in head.keys() | per_block.keys()}
    assert facts["status"] == "validated"
    assert facts["graph"]["dllmc_nodes"] == expected
    cache = json.loads((bundle / "validation.json").read_text())["cache"]
    assert (cache["passes"], cache["largest"]) == (9, 0.0)
    complete = facts["completeness"]
    assert complete["tensors_used"] == complete["tensors_total"]
    assert complete["linears_total"] == 4 * layers
    assert complete["linears_quantised"] == (0 if recipe == "fp16" else 4 * layers)
    assert facts["ratio"] == pytest.approx({"fp16": 1.0}.get(recipe, facts["ratio"]), abs=0.01)
    assert facts["ratio"] >= 1.0 - 0.01
    assert main(["run", str(bundle), "--self-test", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passes"] == 2
    assert main(["run", str(bundle), "--prompt", "sort 3 1 2:", "--json", "--threads", "1"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["nfe"] >= 1
    assert len(answer["ids"]) <= 12
    assert not list(bundle.parent.glob(f"{bundle.name}.work"))


def test_onnx_runtime_and_torch_generate_the_same_ids(model: Made, exported: Made, tmp_path: Path) -> None:
    """The bundle against the simulated graph, both running freely."""
    bundle = exported("rtn-w4a4", "llada", tied=True)
    checkpoint = open_checkpoint(model("llada", tied=True))
    recipe = read_resolved(bundle / "recipe.yaml")
    write_weights(checkpoint, recipe, tmp_path, on_piece=lambda _: None)
    simulated = torch_session(checkpoint, recipe, Weights(tmp_path), lowered=False)
    runner = Runner(bundle, threads=1)
    options = GenerateOptions(gen_length=8, block_length=8, policy="quota", steps=4, exact=True)
    prompts = [runner.encode(text) for text in ("sort 3 1 2:", "12+30=", "copy abc:", "")]
    found = generate(runner.session, runner.settings, prompts, options)
    expected = generate(simulated, runner.settings, prompts, options)
    assert [result.ids for result in found] == [result.ids for result in expected]


def test_the_float_bundle_computes_what_transformers_computes(exported: Made) -> None:
    """From `save_pretrained` to ONNX Runtime, against the module that was saved, on the same bfloat16 weights."""
    theirs = saved_model("dream", layers=2, kv_heads=2, tied=False)
    for parameter in theirs.parameters():  # one by one: `.to` would round its rotary frequencies as well
        parameter.data = parameter.data.bfloat16().float()
    runner = Runner(exported("fp16", "dream"), threads=1)
    vocabulary = theirs.config.vocab_size
    ids = torch.randint(0, vocabulary, (3, 19), generator=torch.Generator().manual_seed(0))
    places = np.broadcast_to(np.arange(19), (3, 19)).copy()
    feeds = Feeds(
        input_ids=ids.numpy(),
        position_ids=places,
        kv_len=np.full(3, 19),
        head_index=places,
        logit_bias=np.zeros(vocabulary, np.float32),
        inv_temp=np.ones(3, np.float32),
    )
    with torch.no_grad():
        logits = theirs(input_ids=ids, attention_mask=torch.zeros(3, 1, 19, 19), use_cache=False).logits
    expected = logits.sort(descending=True).values[..., :8].numpy()
    record = runner.session.run(feeds)
    # Only weights below 2^-14, of which float16 keeps fewer places, and the order of float32 sums differ.
    assert np.abs(record.top_logits - expected).max() <= 1e-4
    assert np.abs(record.lse_t - logits.logsumexp(-1).numpy()).max() <= 1e-4


RUN = """
import json, sys
from pipeline.__main__ import main
code = main(["run", sys.argv[1], "--prompt", "12+30=", "--json", "--threads", "1"])
print(json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def test_running_needs_no_torch(exported: Made) -> None:
    bundle = exported("rtn-w4a4", "llada", tied=True)
    command = [sys.executable, "-c", RUN, str(bundle)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    heavy = {"torch", "onnx", "onnx_ir", "onnxscript", "pydantic", "yaml", "transformers", "safetensors"}
    assert heavy & set(modules) == set()
    assert {"onnxruntime", "tokenizers", "numpy"} <= set(modules)


def test_a_prompt_beyond_the_limit_is_a_usage_fault(exported: Made, capsys: Out) -> None:
    bundle = exported("rtn-w4a4", "llada", tied=True)
    assert main(["run", str(bundle), "--prompt", "12+30=" * 60]) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert "128" in error  # the model's limit


@pytest.mark.parametrize(
    "name", ["model.onnx", "model.onnx.data", "config.json", "golden/pass-0.json", "manifest.json"]
)
def test_one_changed_byte_is_found(exported: Made, name: str, tmp_path: Path, capsys: Out) -> None:
    bundle = Path(shutil.copytree(exported("rtn-w4a4", "llada", tied=True), tmp_path / "bundle"))
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    for words in (["verify", str(bundle)], ["run", str(bundle), "--prompt", "x"]):
        assert main(words) == 7
        error = capsys.readouterr().err.strip()
        assert error.count("\n") == 0
        assert name in error


# Bad checkpoint folders --------------------------------------------------------------------------------------------


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_index(folder: Path, change: Callable[[str, str], str]) -> None:
    (path,) = folder.glob("*.index.json")
    values = json.loads(path.read_text())
    values["weight_map"] = {name: change(name, file) for name, file in values["weight_map"].items()}
    path.write_text(json.dumps(values))


def edit_tensor(folder: Path, part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if part in name:
                tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, path, metadata={"format": "pt"})


def only_pickles(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save({"a": torch.zeros(2)}, folder / "pytorch_model.bin")


def unsupported_with_code(folder: Path) -> None:
    edit_config(folder, model_type="mystery", auto_map={"AutoModel": "modeling.Model"})
    (folder / "modeling.py").write_text("raise SystemExit('this code ran')")


def truncate(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-100])


def lose_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[-1].unlink()


def lose_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"):
        (folder / name).unlink(missing_ok=True)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[5] = float("nan")
    return tensor


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing folder": (shutil.rmtree, "no model folder"),
    "only pickles": (only_pickles, "only as pickles"),
    "auto_map, unsupported type": (unsupported_with_code, "model_type is 'mystery'"),
    "unknown type": (lambda folder: edit_config(folder, model_type="lada"), "did you mean 'llada'"),
    "alibi switched on": (lambda folder: edit_config(folder, alibi=True), "alibi"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "truncated shard": (truncate, "truncated or corrupt"),
    "missing shard": (lose_shard, "download the missing shard"),
    "escaping index": (lambda folder: edit_index(folder, lambda name, file: f"../{file}"), "beside the index"),
    "wrong shape": (lambda folder: edit_tensor(folder, "0.q_proj", lambda t: t[:-1]), "q_proj"),
    "wrong dtype": (lambda folder: edit_tensor(folder, "0.q_proj", torch.Tensor.double), "q_proj"),
    "NaN weights": (lambda folder: edit_tensor(folder, "0.ff_out", poison), "ff_out"),
    "NaN in the head": (lambda folder: edit_tensor(folder, "transformer.ff_out", poison), "ff_out"),
    "too large for 16 bits": (lambda folder: edit_tensor(folder, "wte", lambda t: t * 1e7), "embed.weight"),
    "no tokenizer": (lose_tokenizer, "tokenizer"),
    "tokenizer is no JSON": (lambda folder: (folder / "tokenizer.json").write_text("{]"), "tokenizer files"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_refused_in_one_line(model: Made, name: str, tmp_path: Path, capsys: Out) -> None:
    folder = Path(shutil.copytree(model("llada", layers=1, kv_heads=4), tmp_path / "model"))
    spoil, expected = BAD[name]
    spoil(folder)
    (tmp_path / "new").mkdir()
    assert export(folder, tmp_path / "new" / "out", "rtn-w4a4") == 4
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("dllmc: ")]
    assert len(errors) == 1
    assert expected in errors[0]
    assert errors[0] == captured.err.splitlines()[-1]
    assert captured.out == ""
    left = sorted(path.name for path in (tmp_path / "new").iterdir())
    # Half precision is met in the second stage: what calibrate finished may be resumed from.
    assert left == (["out.work"] if name == "too large for 16 bits" else [])


# Bad recipes and places --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--set", "linear.w_bit=4"], "linear.w_bits"),
        (["--set", "linear.w_bits=four"], "linear.w_bits"),
        (["--set", "linear.w_bits=4", "--set", "linear.a_bits=16", "--set", "linear.a_group=16"], "a_group"),
        (["--set", "linear.w_group=48"], "does not divide"),
        (["--set", "lowering.top_k=1024"], "exceeds the vocabulary"),
        (["--set", "generation.gen_length=500"], "maximum length"),
        (["--set", "skip=[blocks.0.atn.*]"], "matches no linear"),
        (["--recipe", "nothing"], "nothing"),
    ],
)
def test_a_bad_recipe_is_a_usage_fault(
    model: Made, words: list[str], expected: str, tmp_path: Path, capsys: Out
) -> None:
    command = ["export", str(model("llada", layers=1, kv_heads=4)), "-o", str(tmp_path / "out"), *words]
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dllmc: ")
    assert expected in error
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_kept(model: Made, tmp_path: Path, capsys: Out) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    assert export(model("llada", layers=1, kv_heads=4), tmp_path / "out", "fp16") == 2
    assert "--force" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "out" / "mine").read_text() == "keep"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_in_the_way_is_an_unwritable_place(model: Made, tmp_path: Path, capsys: Out) -> None:
    """Root may write anywhere, so a file stands where a folder has to be."""
    (tmp_path / "file").write_text("mine")
    assert export(model("llada", layers=1, kv_heads=4), tmp_path / "file" / "out", "fp16") == 8
    assert "-o DIR" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def full_disk(*unused: object, **also: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk_in_words(*unused: object, **also: object) -> Any:
    """How safetensors, written in Rust, says it."""
    from safetensors import SafetensorError

    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("place", "fault", "work"),
    [
        ("pipeline.stages.save_file", full_disk_in_words, False),
        ("pipeline.quantize.save_file", full_disk_in_words, True),
        ("pipeline.folder.write_bytes", full_disk, False),
    ],
)
def test_a_full_disk_will_not_fit(
    model: Made,
    place: str,
    fault: Callable[..., Any],
    work: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Out,
) -> None:
    monkeypatch.setattr(place, fault)
    assert export(model("llada", layers=1, kv_heads=4), tmp_path / "out", "rtn-w4a4") == 3
    assert "the disk is full" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == (["out.work"] if work else [])
