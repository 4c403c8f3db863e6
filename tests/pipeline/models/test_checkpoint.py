"""Folders are written and read back whole; anything wrong with one is refused before a tensor is used."""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pipeline.errors import InputRefused
from pipeline.models import FAMILIES
from pipeline.models.checkpoint import load_model, open_checkpoint, write_checkpoint
from pipeline.models.transformer import Transformer
from tests.pipeline.models.folders import edit_json, make_config, random_state, write_folder

INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00003.safetensors"


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def first_tensor(path: Path) -> str:
    return sorted(load_file(path))[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_written_is_read_back(tmp_path: Path, family: str, shards: int, tied: bool, dtype: torch.dtype) -> None:
    config = make_config(family, tied_head=tied)
    state = random_state(config)
    write_checkpoint(tmp_path, config, state, dtype=dtype, shards=shards)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == config
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in tmp_path.glob("*.safetensors"))
    assert (tmp_path / INDEX).exists() == (shards > 1)
    loaded = load_model(checkpoint)
    assert not loaded.training
    assert (loaded.head.weight is loaded.embed.weight) == tied
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name].to(dtype).float()), name


def test_a_submodule_loads_alone(tmp_path: Path) -> None:
    config = make_config("dream", tied_head=True)
    write_checkpoint(tmp_path, config, random_state(config), dtype=torch.float32, shards=2)
    checkpoint = open_checkpoint(tmp_path)
    whole = checkpoint.load()
    block = Transformer(config).blocks[1]
    block.load_state_dict(checkpoint.load("blocks.1"), strict=True)
    for name, tensor in block.state_dict().items():
        assert torch.equal(tensor, whole[f"blocks.1.{name}"]), name
    assert torch.equal(checkpoint.load("head")["weight"], whole["embed.weight"])
    assert checkpoint.load("embed", torch.bfloat16)["weight"].dtype == torch.bfloat16
    with pytest.raises(KeyError, match=r"blocks\.7"):
        checkpoint.load("blocks.7")


def test_layer_ten_is_not_layer_one(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "llada", num_layers=11)
    assert open_checkpoint(folder).load("blocks.1").keys() == open_checkpoint(folder).load("blocks.10").keys()


def test_one_file_of_any_name_needs_no_index(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "llada", shards=3)
    (folder / INDEX).unlink()
    assert len(open_checkpoint(folder).entries) == 3 + 2 * 9


def test_a_cache_of_links_is_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "blobs", "llada", shards=2)
    links = tmp_path / "snapshot"
    links.mkdir()
    for path in folder.iterdir():
        (links / path.name).symlink_to(path)
    assert open_checkpoint(links).config == make_config("llada")


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_that_is_stored_must_be_the_embedding(tmp_path: Path, same: bool) -> None:
    folder = write_folder(tmp_path, "llada", tied_head=True)

    def add_head(tensors: dict[str, torch.Tensor]) -> None:
        head = tensors["model.transformer.wte.weight"].clone()
        head[-1, -1] += 0.0 if same else 1.0
        tensors["model.transformer.ff_out.weight"] = head

    edit_tensors(folder / "model.safetensors", add_head)
    if same:
        model = load_model(open_checkpoint(folder))
        assert model.head.weight is model.embed.weight
    else:
        with pytest.raises(InputRefused, match=r"ties the head .*ff_out\.weight differs from .*wte\.weight"):
            open_checkpoint(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_refused_when_read(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    folder = write_folder(tmp_path, "dream", dtype=dtype)
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors[name][3].fill_(bad))
    checkpoint = open_checkpoint(folder)
    checkpoint.load("blocks.0")
    with pytest.raises(InputRefused, match=r"layers\.1\.mlp\.up_proj\.weight .* 32 NaN or infinite values of 1536"):
        checkpoint.load("blocks.1")


# What is done to a good folder of three shards, and the words of the refusal.
SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), r"config\.json is missing"),
    "config is a folder": (
        lambda d: ((d / "config.json").unlink(), (d / "config.json").mkdir()),
        r"not a regular file",
    ),
    "config is a pipe": (lambda d: ((d / "config.json").unlink(), os.mkfifo(d / "config.json")), "not a regular file"),
    "config not JSON": (lambda d: (d / "config.json").write_text("{'a': 1}"), r"config\.json is not valid JSON"),
    "config not text": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe{}"), "is not UTF-8 text"),
    "config a list": (lambda d: (d / "config.json").write_text("[]"), "holds a list, expected an object"),
    "config nested": (lambda d: (d / "config.json").write_text("[" * 200_000), "is not valid JSON"),
    "config key twice": (
        lambda d: (d / "config.json").write_text('{"model_type": "llada", "model_type": "Dream"}'),
        "the key 'model_type' stands twice",
    ),
    "no weights": (lambda d: [p.unlink() for p in d.glob("*.safetensors*")], r"found no \*\.safetensors file"),
    "missing shard": (lambda d: (d / SECOND).unlink(), f"shard {SECOND} is named but is no file"),
    "stray file": (
        lambda d: save_file({"a": torch.ones(1)}, d / "adapter.safetensors"),
        r"adapter\.safetensors in .* is not named by",
    ),
    "second index": (
        lambda d: (d / "other.safetensors.index.json").write_text("{}"),
        "has 2 weight indexes",
    ),
    "index not a map": (
        lambda d: edit_json(d / INDEX, lambda v: v.update(weight_map=["a"])),
        "weight_map must map tensor names to file names",
    ),
    "empty index": (lambda d: (d / INDEX).write_text("{}"), "weight_map must map"),
    "truncated": (
        lambda d: (d / SECOND).write_bytes((d / SECOND).read_bytes()[:-7]),
        f"{SECOND} is not a whole safetensors file",
    ),
    "cut in the header": (lambda d: (d / SECOND).write_bytes((d / SECOND).read_bytes()[:100]), "not a whole"),
    "empty file": (lambda d: (d / SECOND).write_bytes(b""), r"not a whole safetensors file \(0 bytes"),
    "corrupt header": (
        lambda d: (d / SECOND).write_bytes((d / SECOND).read_bytes().replace(b'"dtype"', b'"dtypo"', 1)),
        "not a whole",
    ),
    "extra bytes": (lambda d: (d / SECOND).write_bytes((d / SECOND).read_bytes() + b"\0"), "not a whole"),
    "huge header": (lambda d: (d / SECOND).write_bytes(b"\xff" * 8 + b"{}"), "not a whole"),
    "pickle in disguise": (lambda d: (d / SECOND).write_bytes(pickle.dumps({"a": 1})), "is a Python pickle"),
    "zip in disguise": (
        lambda d: zipfile.ZipFile(d / SECOND, "w").writestr("data.pkl", b"x" * 64),
        "is a zip archive",
    ),
    "git-lfs pointer": (
        lambda d: (d / SECOND).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "is a git-lfs pointer",
    ),
    "index against shard": (
        lambda d: edit_json(d / INDEX, lambda v: v["weight_map"].update({first_tensor(d / SECOND): _FIRST})),
        f"tensor .*: {INDEX} says {'model-00001-of-00003.safetensors'}, but it is in {SECOND}",
    ),
    "tensor not in the index": (
        lambda d: edit_json(d / INDEX, lambda v: v["weight_map"].pop(first_tensor(d / SECOND))),
        f"says nothing, but it is in {SECOND}",
    ),
    "tensor in no shard": (
        lambda d: edit_json(d / INDEX, lambda v: v["weight_map"].update(ghost=SECOND)),
        f"tensor ghost: {INDEX} says {SECOND}, but it is in no shard",
    ),
    "fewer layers than tensors": (
        lambda d: edit_json(d / "config.json", lambda v: v.update({"n_layers": 1, "num_hidden_layers": 1})),
        "with no place in the model",
    ),
    "more layers than tensors": (
        lambda d: edit_json(d / "config.json", lambda v: v.update({"n_layers": 3, "num_hidden_layers": 3})),
        r"9 missing|12 missing",
    ),
    "other size": (
        lambda d: edit_json(d / "config.json", lambda v: v.update({"mlp_hidden_size": 50, "intermediate_size": 50})),
        r"has shape \[.*48.*\], expected \[.*50.*\] from config\.json",
    ),
    "tied without being so": (
        lambda d: edit_json(d / "config.json", lambda v: v.update(weight_tying=True, tie_word_embeddings=True)),
        "ties the head to the embedding",
    ),
    "unknown model type": (
        lambda d: edit_json(d / "config.json", lambda v: v.update(model_type="dreem")),
        r"model_type is 'dreem', expected one of 'llada', 'Dream'; did you mean 'Dream'\?",
    ),
    "no model type": (lambda d: edit_json(d / "config.json", lambda v: v.pop("model_type")), "model_type is None"),
    "model type a list": (
        lambda d: edit_json(d / "config.json", lambda v: v.update(model_type=["llada"])),
        r"model_type is \['llada'\]",
    ),
}
_FIRST = "model-00001-of-00003.safetensors"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_folder_is_refused(tmp_path: Path, family: str, case: str) -> None:
    folder = write_folder(tmp_path, family, shards=3)
    open_checkpoint(folder)
    spoil, words = SPOILT[case]
    spoil(folder)
    with pytest.raises(InputRefused, match=words):
        open_checkpoint(folder)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"no model folder at .*absent; expected a folder with config\.json"):
        open_checkpoint(tmp_path / "absent")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.PTH", "weights.ckpt", "model.pkl"])
def test_pickles_alone_are_refused_unopened(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path, "llada")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(InputRefused, match=rf"only as pickles \({name}\).*dllmc reads safetensors only"):
        open_checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.int8])
def test_another_dtype_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_folder(tmp_path, "llada")
    name = "model.transformer.ln_f.weight"
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(InputRefused, match=r"ln_f\.weight .* has dtype .*, expected one of F32, F16, BF16"):
        open_checkpoint(folder)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "llada")
    (folder / "copy.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(InputRefused, match=r"is in copy\.safetensors and in model\.safetensors, expected it once"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "C:model.safetensors",
        "//host/share/model.safetensors",
        "model\0.safetensors",
        "..",
        ".",
        "",
        "pytorch_model.bin",
    ],
)
def test_an_index_that_leaves_the_folder_is_refused(tmp_path: Path, shard: str) -> None:
    folder = write_folder(tmp_path / "model", "llada", shards=2)
    (tmp_path / "model.safetensors").write_bytes(b"")
    edit_json(folder / INDEX, lambda values: values["weight_map"].update({"model.transformer.wte.weight": shard}))
    with pytest.raises(InputRefused, match="so that nothing outside the folder is read"):
        open_checkpoint(folder)


@pytest.fixture(scope="module")
def good_shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("fuzz"), "llada", num_layers=1)


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_bytes_changed_in_a_header_are_refused_or_harmless(good_shard: Path, data: st.DataObject) -> None:
    """Whatever the header says, opening either works or refuses: it never fails in another way."""
    path = good_shard / "model.safetensors"
    good = path.read_bytes()
    size = int.from_bytes(good[:8], "little")
    where = data.draw(st.integers(0, 8 + size - 1))
    patch = data.draw(st.binary(min_size=1, max_size=6))
    try:
        path.write_bytes(good[:where] + patch + good[where + len(patch) :])
        try:
            load_model(open_checkpoint(good_shard))
        except InputRefused as refusal:
            assert len(str(refusal)) > 40
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("name", ["config.json", INDEX])
@given(data=st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_json_is_read_or_refused(tmp_path: Path, name: str, data: st.DataObject) -> None:
    folder = tmp_path / "model"
    if not folder.exists():
        write_folder(folder, "dream", shards=2, num_layers=1)
    good = (folder / name).read_text()
    values = json.loads(good)
    inner = values["weight_map"] if name == INDEX else values
    key = data.draw(st.sampled_from(sorted(inner)))
    leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    inner[key] = data.draw(leaf | st.lists(leaf, max_size=3) | st.dictionaries(st.text(), leaf, max_size=3))
    try:
        (folder / name).write_text(json.dumps(values))
        try:
            open_checkpoint(folder)
        except InputRefused as refusal:
            assert len(str(refusal)) > 40
    finally:
        (folder / name).write_text(good)
