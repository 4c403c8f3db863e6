"""The proof fails closed: a wrong file, a wrong number or a missed limit publishes nothing and says where."""

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import stages
from pipeline import validate as module
from pipeline.__main__ import main
from pipeline.backends.eager import open_transformer
from pipeline.errors import UsageFault, ValidationFailed
from pipeline.folder import GOLDEN, MODEL, MODEL_DATA, VALIDATION, canonical_json, read_job
from pipeline.models.checkpoint import Checkpoint, load_model, open_checkpoint
from pipeline.models.tokenizer import read_tokenizer
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe, parse_recipe
from pipeline.runner.settings import Settings
from pipeline.validation import feeds
from pipeline.validation.cached import CacheCheck
from pipeline.validation.forced import Comparison
from pipeline.validation.passes import PassCheck, check_passes
from pipeline.validation.quality import Quality
from tests.conftest import Made
from tests.exports import export
from tests.pipeline.validation.conftest import flip, spoil, swap

Out = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def short_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve passes in place of thirty; the whole sweep runs in every export of test_export.py."""
    monkeypatch.setattr(feeds, "SWEEP_LENGTHS", (1, 33))


@pytest.fixture
def output(stages_done: Path, tmp_path: Path) -> Path:
    shutil.copytree(stages_done, tmp_path / "out.work")
    return tmp_path / "out"


@pytest.fixture
def prove(output: Path, model: Made) -> Callable[..., dict[str, Any]]:
    """Validate the work folder directly, past the hashes that would notice a spoilt file."""
    checkpoint: Checkpoint = open_checkpoint(model("llada", layers=1))
    tokenizer = checkpoint.tokenizer()
    recorded = read_job(output)["recipe"]

    def act(*sets: str) -> dict[str, Any]:
        recipe: Recipe = parse_recipe(recorded, "the recorded recipe", sets)
        work = output.with_name("out.work")
        return module.validate(checkpoint, recipe, work, tokenizer, on_pass=lambda *_: None)

    return act


def nothing_proved(output: Path) -> bool:
    work = output.with_name("out.work")
    return not (work / VALIDATION).exists() and not list((work / GOLDEN).glob("*")) and not output.exists()


def test_a_right_file_is_proved(output: Path, prove: Callable[..., dict[str, Any]]) -> None:
    report = prove()
    work = output.with_name("out.work")
    assert (work / VALIDATION).read_bytes() == canonical_json(report)
    assert [path.name for path in sorted((work / GOLDEN).iterdir())] == ["pass-0.json", "pass-1.json"]
    assert report["nodes"]["checked"] == 10
    assert report["passes"]["passes"] == 12
    assert report["passes"]["not_finite"] == 0
    assert report["passes"]["largest"] <= report["passes"]["tolerance"]
    assert (report["cache"]["passes"], report["cache"]["largest"]) == (9, 0.0)
    assert report["quality"]["tokens"] >= 8
    assert list(report["layers"].values()) == sorted(report["layers"].values(), reverse=True)


def nan_row(view: "np.ndarray[Any, Any]") -> None:
    view[3] = np.nan


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "packed codes": (lambda path: spoil(path, "blocks.0.mlp.down_proj.codes", flip), "node blocks.0.mlp.down_proj "),
    "head codes": (lambda path: spoil(path, "head.codes", flip), "node head "),
    "scale": (
        lambda path: spoil(path, "blocks.0.attn.o_proj.w_scale", lambda v: v.__setitem__(0, v[0] * 1.01), np.float32),
        "node blocks.0.attn.o_proj ",
    ),
    "swapped scales": (
        lambda path: swap(path, "blocks.0.attn.o_proj.w_scale", "blocks.0.mlp.down_proj.w_scale"),
        "node blocks.0.mlp.down_proj ",
    ),
    "swapped norms": (lambda path: swap(path, "blocks.0.attn_norm.weight", "norm.weight"), "DllmcQuantize before"),
    "embedding": (
        lambda path: spoil(path, "embed.weight_half", lambda v: v.__imul__(np.float16(1.5)), np.float16),
        "entered_0",
    ),
    "rotary frequencies": (
        lambda path: spoil(path, "rope_frequencies", lambda v: v.__imul__(np.float32(1.01)), np.float32),
        "entered_1",
    ),
    "NaN in a scale": (
        lambda path: spoil(path, "blocks.0.attn.q_k_v_proj.w_scale", nan_row, np.float32),
        "values are not finite",
    ),
    "NaN in the embedding": (
        lambda path: spoil(path, "embed.weight_half", lambda v: v.fill(np.nan), np.float16),
        "values are not finite",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_spoilt_file_fails(output: Path, prove: Callable[..., dict[str, Any]], fault: str) -> None:
    change, expected = FAULTS[fault]
    change(output.with_name("out.work") / MODEL)
    with pytest.raises(ValidationFailed) as caught:
        prove()
    message = str(caught.value)
    assert expected in message
    assert "Parts whose output moved most" in message
    assert nothing_proved(output)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("validation.min_argmax_agreement=1", "validation.min_argmax_agreement is 1"),
        ("validation.max_nll_increase=0", "validation.max_nll_increase is 0"),
    ],
)
def test_a_missed_limit_fails_and_names_the_worst_layers(
    output: Path,
    prove: Callable[..., dict[str, Any]],
    setting: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "nll" in setting:  # random weights may gain by chance
        true = module.compare
        monkeypatch.setattr(
            module, "compare", lambda *a, **k: Quality(**{**true(*a, **k).__dict__, "nll": 10.0, "reference_nll": 9.0})
        )
    with pytest.raises(ValidationFailed) as caught:
        prove(setting)
    message = str(caught.value)
    assert expected in message
    worst = [word.split(" (")[0] for word in message.split("relative squared error): ")[1].split(";")[0].split(", ")]
    assert len(worst) == 3
    assert all(name.startswith("blocks.0.") for name in worst)
    assert f"--set 'skip=[{', '.join(worst)}]'" in message
    assert "head.bits" not in message
    assert nothing_proved(output)


def advice(recipe: Recipe, model: Made, **errors: float) -> str:
    return module._advice(
        open_checkpoint(model("llada", layers=1)), recipe, {k.replace("__", "."): v for k, v in errors.items()}
    )


def test_advice_names_what_the_recipe_can_keep(model: Made) -> None:
    block = "blocks__0__mlp__down_proj"
    text = advice(load_recipe("rtn-w4a4"), model, head=0.5, **{block: 0.2})
    assert "keep them at 16 bits with --set head.bits=16 --set 'skip=[blocks.0.mlp.down_proj]'" in text
    text = advice(load_recipe("rtn-w4a4"), model, **{block: 0.2}, head=0.1)
    assert "head.bits" not in text
    text = advice(load_recipe("rtn-w4a4", ["skip=['*o_proj']"]), model, blocks__0__attn__o_proj=0.9, **{block: 0.2})
    assert "--set 'skip=[*o_proj, blocks.0.mlp.down_proj]'" in text  # `--set` replaces the list
    text = advice(load_recipe("fp16", ["method=rtn", "head.bits=8"]), model, head=0.5, **{block: 0.2})
    assert "--set head.bits=16" in text
    assert "skip" not in text  # refused where the linears have 16 bits
    assert advice(load_recipe("fp16"), model, head=0.5, **{block: 0.2}) == ""


def test_the_advice_is_taken_by_the_recipe(model: Made) -> None:
    text = advice(load_recipe("rtn-w4a4"), model, head=0.5, blocks__0__mlp__down_proj=0.2)
    sets = [word for word in shlex.split(text.split("16 bits with ")[1].split("]'")[0] + "]'") if word != "--set"]
    recipe = load_recipe("rtn-w4a4", sets)
    assert recipe.head.bits == 16
    assert recipe.skips("blocks.0.mlp.down_proj")
    recipe.check_against(open_checkpoint(model("llada", layers=1)).config)


@pytest.mark.parametrize("field", ["reference_nll", "nll", "agreement"])
def test_nan_is_beyond_every_limit(
    output: Path, prove: Callable[..., dict[str, Any]], field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"tokens": 9, "reference_nll": 1.0, "nll": 1.0, "agreement": 1.0, field: float("nan")}
    monkeypatch.setattr(module, "compare", lambda *a, **k: Quality(**values))
    with pytest.raises(ValidationFailed, match="nan"):
        prove()
    assert nothing_proved(output)


@pytest.mark.parametrize("largest", [1e-7, float("inf"), float("nan")])
def test_a_window_that_differs_from_the_whole_is_a_fault(
    output: Path, prove: Callable[..., dict[str, Any]], largest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "check_cache", lambda *_: CacheCheck(passes=9, largest=largest))
    with pytest.raises(ValidationFailed, match="passes over windows differ from those over whole canvases by"):
        prove()
    assert nothing_proved(output)


class Constant:
    """Stands in for `ForcedModel`: differences as given, pass by pass."""

    def __init__(self, differences: list[float]) -> None:
        self.differences = iter(differences)

    def compare(self, unused: object) -> Comparison:
        return Comparison(largest=next(self.differences), tolerance=1e-6, place="somewhere")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_of_one_pass_is_not_forgotten(place: int, model: Made) -> None:
    """Wherever among the passes it comes."""
    checkpoint = open_checkpoint(model("llada", layers=1))
    session = open_transformer(load_model(checkpoint))
    three = list(feeds.sweep(Settings.of_model(checkpoint.config), 0))[:3]

    def check(differences: list[float]) -> PassCheck:
        return check_passes(session, session, Constant(differences), three, on_pass=lambda *_: None)  # type: ignore[arg-type]

    differences = [1e-7, 3e-7, 2e-7]
    assert check(differences).right
    assert check(differences).largest == 3e-7
    differences[place] = 2e-6
    assert not check(differences).right
    differences[place] = float("nan")
    assert not check(differences).right


def test_what_torch_and_onnx_runtime_decide_freely_must_agree(model: Made) -> None:
    checkpoint = open_checkpoint(model("llada", layers=1))
    exact, other = load_model(checkpoint), load_model(checkpoint)
    other.head.weight.data[:40] *= -3.0
    three = list(feeds.sweep(Settings.of_model(checkpoint.config), 0))[:6]
    sessions = open_transformer(exact), open_transformer(other)
    check = check_passes(*sessions, Constant([0.0] * 6), three, on_pass=lambda *_: None)  # type: ignore[arg-type]
    recipe = load_recipe("fp16")
    quality = Quality(tokens=9, reference_nll=1.0, nll=1.0, agreement=1.0)
    same = CacheCheck(passes=1, largest=0.0)
    proof = module.Proof(nodes=[], passes=check, cache=same, endings={}, quality=quality)
    assert check.right
    assert check.free_agreement < recipe.validation.min_free_agreement
    assert "validation.min_free_agreement is 0.98" in module._faults(recipe, proof)[0]
    loose = load_recipe("fp16", ["validation.min_free_agreement=0"])
    assert module._faults(loose, proof) == []
    broken = replace(check, free_agreement=float("nan"))
    assert len(module._faults(loose, replace(proof, passes=broken))) == 1
    with torch.no_grad():
        other.head.weight.data[:] = float("nan")
    check = check_passes(*sessions, Constant([0.0] * 6), three, on_pass=lambda *_: None)  # type: ignore[arg-type]
    assert check.not_finite > 0
    assert not check.right


def test_ids_that_can_never_be_meant_may_not_fill_the_record(
    output: Path, prove: Callable[..., dict[str, Any]], model: Made
) -> None:
    checkpoint = open_checkpoint(model("llada", layers=1))
    tokenizer = checkpoint.tokenizer()
    meant = feeds.unbanned(module.settings_of(checkpoint, load_recipe("rtn-w4a4"), tokenizer))
    assert meant == read_tokenizer(checkpoint.folder, checkpoint.config).id_limit - 1 < checkpoint.config.vocab_size
    module.settings_of(checkpoint, load_recipe("rtn-w4a4", [f"lowering.top_k={meant}"]), tokenizer)
    with pytest.raises(UsageFault, match=f"lowering.top_k={meant} or less"):
        prove(f"lowering.top_k={meant + 1}")


def test_nodes_are_checked_at_both_ends_and_between(model: Made) -> None:
    settings = Settings.of_model(open_checkpoint(model("llada", layers=1)).config)
    for limit, longest in ((256, 33), (20, 20), (1, 1)):
        chosen = module.node_passes(list(feeds.sweep(replace(settings, max_length=limit), 0)))
        assert chosen[0].input_ids.shape == (1, 1)
        assert chosen[2].input_ids.shape == (3, longest)
        assert len(chosen[1].kv_len) == 3
        noise = [float((one.input_ids == settings.mask_id).mean()) for one in chosen]
        assert noise[0] == noise[2] == 1.0
        assert noise[1] < 1.0


def test_an_export_for_debugging_is_proved(model: Made, tmp_path: Path) -> None:
    """Its logits have two readers, so head and record stay apart."""
    words = ["--set", "lowering.debug_logits=true"]
    assert export(model("llada", layers=1), tmp_path / "out", "rtn-w4a4", *words) == 0
    proof = json.loads((tmp_path / "out" / VALIDATION).read_text())
    assert proof["nodes"]["checked"] == 10
    assert len(list((tmp_path / "out" / GOLDEN).iterdir())) == 2


def test_the_command_publishes_nothing(output: Path, model: Made, monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    """An export whose lowering writes one wrong scale: exit 5, one line, no bundle, and none by the next command."""

    def wrong(job: stages.Job, stage: Any) -> list[str]:
        stage.finish("wrong on purpose")
        spoil(job.work.path / MODEL, "blocks.0.attn.o_proj.w_scale", lambda v: v.__imul__(np.float32(2)), np.float32)
        return [MODEL, MODEL_DATA]

    monkeypatch.setitem(stages.ROAD, "lower", wrong)
    words = [str(output), "--model", str(model("llada", layers=1))]
    recorded = output.with_name("recipe.yaml")
    recorded.write_text(read_job(output)["recipe"])
    assert main(["export", words[2], "-o", words[0], "--recipe", str(recorded), "--from", "lower"]) == 5
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("dllmc: ")]
    assert len(errors) == 1
    assert errors[0] == captured.err.splitlines()[-1]
    assert "node blocks.0.attn.o_proj (DllmcInt4Linear) differs from its reference" in errors[0]
    assert "nothing was published" in errors[0]
    assert nothing_proved(output)
    assert not (output.with_name("out.work") / "validate.done.json").exists()
    assert main(["bundle", str(output)]) == 2
    assert not output.exists()


def test_a_proof_from_before_does_not_outlive_a_failure(output: Path, capsys: Out) -> None:
    assert main(["validate", str(output)]) == 0
    work = output.with_name("out.work")
    assert (work / VALIDATION).exists()
    with pytest.MonkeyPatch.context() as patch:
        values = {"tokens": 9, "reference_nll": 1.0, "nll": 1e9, "agreement": 1.0}
        patch.setattr(module, "compare", lambda *a, **k: Quality(**values))
        assert main(["validate", str(output)]) == 5
    assert nothing_proved(output)
    assert main(["bundle", str(output)]) == 2
