"""What the reference models must do as bundles: score like the checkpoint, and generate what the simulation does."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from bench.parity import MAX_MARGIN, MIN_SAME, partings
from pipeline.backends.backend import Session
from pipeline.backends.eager import EagerSession, open_transformer
from pipeline.backends.ort import open_session
from pipeline.evaluation import evaluate, read_task
from pipeline.folder import MODEL
from pipeline.lower import write_onnx
from pipeline.models import BUILTIN
from pipeline.models.checkpoint import Checkpoint, load_model, open_checkpoint
from pipeline.quantize import Weights, write_weights
from pipeline.recipe_file import load_recipe
from pipeline.runner import GenerateOptions, Settings, TextModel
from pipeline.validate import settings_of, torch_session

TASK = Path(__file__).parent.parent / "pipeline" / "tiny" / "held_out.jsonl"
ONE_POINT = 0.01
PROMPTS = 200


@dataclass(frozen=True)
class Int8:
    """One reference model under rtn-w8a8: in ONNX Runtime, and simulated in torch."""

    checkpoint: Checkpoint
    settings: Settings
    tokenizer: Tokenizer
    runtime: Session
    simulated: EagerSession

    def text(self, session: Session) -> TextModel:
        return TextModel(session, self.settings, self.tokenizer)


@pytest.fixture(scope="module", params=sorted(BUILTIN))
def int8(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Int8]:
    work = tmp_path_factory.mktemp("int8")
    checkpoint, recipe = open_checkpoint(BUILTIN[request.param]), load_recipe("rtn-w8a8")
    tokenizer = checkpoint.tokenizer()
    write_weights(checkpoint, recipe, work / "weights", on_piece=lambda _: None)
    weights = Weights(work / "weights")
    write_onnx(checkpoint.config, recipe, weights, work / MODEL, on_weight=lambda _: None)
    yield Int8(
        checkpoint,
        settings_of(checkpoint, recipe, tokenizer),
        tokenizer,
        open_session(work / MODEL, threads=1),
        torch_session(checkpoint, recipe, weights, lowered=False),
    )


def test_the_int8_bundle_scores_like_the_checkpoint(int8: Int8) -> None:
    items = read_task(TASK)
    exact = open_transformer(load_model(int8.checkpoint))
    full, small = (evaluate(int8.text(s), items, GenerateOptions()).exact_match for s in (exact, int8.runtime))
    assert abs(full - small) <= ONE_POINT


def test_onnx_runtime_and_the_simulation_generate_the_same_ids(int8: Int8) -> None:
    prompts = [int8.text(int8.runtime).encode(item.prompt) for item in read_task(TASK, PROMPTS)]
    found = partings(int8.simulated, int8.runtime, int8.settings, prompts, GenerateOptions(exact=True))
    assert PROMPTS - len(found) >= MIN_SAME * PROMPTS
    assert all(one.margin < MAX_MARGIN for one in found)
