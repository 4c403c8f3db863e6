"""Turn trained weights into a checkpoint folder in its family's genuine layout, with a model card of measured scores.

`python -m pipeline.tiny.publish tiny-llada WEIGHTS -o DIR`. Scores are exact match on the held-out problems, at full
precision and round-to-nearest in torch; how it was trained is read from the header of the weights.
"""

import argparse
import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from safetensors.torch import load_file
from tokenizers import Tokenizer

from pipeline.backends.backend import Session
from pipeline.backends.eager import open_transformer
from pipeline.models.checkpoint import load_model, open_checkpoint, write_checkpoint
from pipeline.models.tokenizer import read_tokenizer
from pipeline.quantize import Weights, write_weights
from pipeline.recipe_file import load_recipe
from pipeline.runner import GenerateOptions, Settings, generate
from pipeline.tiny.problems import KINDS, Problem, fingerprint, held_out, problems
from pipeline.tiny.reference import REFERENCES, Reference
from pipeline.tiny.train import history
from pipeline.validate import torch_session

RECIPES = ("rtn-w8a8", "rtn-w4a16", "rtn-w4a4")
COUNT = 500
CALIBRATION = 2000


def write_tokenizer(folder: Path, family: str, tokenizer: Tokenizer, specials: Sequence[str]) -> None:
    """tokenizer.json for LLaDA; vocab.json, merges.txt and added tokens for Dream, as each is published."""
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    ids = {text: tokenizer.token_to_id(text) for text in specials}
    settings = {
        "added_tokens_decoder": {str(i): {"content": text, "special": True, **token} for text, i in ids.items()},
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 256,
    }
    if family == "llada":
        tokenizer.save(str(folder / "tokenizer.json"))
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|startoftext|>"}
    else:
        tokenizer.model.save(str(folder))
        _write_json(folder / "added_tokens.json", ids)
        settings |= {"tokenizer_class": "DreamTokenizer", "mask_token": "<|mask|>", "unk_token": None}
    _write_json(folder / "tokenizer_config.json", settings)


def exact_match(session: Session, settings: Settings, tokenizer: Tokenizer, asked: list[Problem]) -> dict[str, float]:
    """Share of exactly right answers, in all and by kind."""
    prompts = [tokenizer.encode(p.prompt, add_special_tokens=False).ids for p in asked]
    results = generate(session, settings, prompts, GenerateOptions(), batch_size=64)
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for problem, result in zip(asked, results, strict=True):
        good = tokenizer.decode(result.ids) == problem.answer
        for key in ("all", problem.kind):
            right[key] += good
            total[key] += 1
    return {key: right[key] / total[key] for key in total}


def measure(folder: Path, asked: list[Problem], scratch: Path) -> dict[str, dict[str, float]]:
    """Scores by recipe; `fp` is the model at full precision."""
    checkpoint = open_checkpoint(folder)
    source = read_tokenizer(folder, checkpoint.config)
    tokenizer = source.parsed()
    settings = Settings.of_model(checkpoint.config)
    settings = replace(settings, vocab_size=min(settings.vocab_size, source.id_limit))  # as `dllmc eval` has it
    scores = {"fp": exact_match(open_transformer(load_model(checkpoint)), settings, tokenizer, asked)}
    for recipe in map(load_recipe, RECIPES):
        weights = scratch / recipe.name
        weights.mkdir(parents=True, exist_ok=True)
        write_weights(checkpoint, recipe, weights, on_piece=lambda _: None)
        session = torch_session(checkpoint, recipe, Weights(weights), lowered=False)
        scores[recipe.name] = exact_match(session, settings, tokenizer, asked)
    return scores


def write_card(
    folder: Path, reference: Reference, scores: dict[str, dict[str, float]], phases: Sequence[Mapping[str, object]]
) -> None:
    """README.md: what the model is, how it was trained, what it scores."""
    config = open_checkpoint(folder).config
    kinds = list(scores["fp"])
    rows = [f"| {recipe} | " + " | ".join(f"{by[kind]:.3f}" for kind in kinds) + " |" for recipe, by in scores.items()]
    trained = [f"| {' | '.join(map(str, phase.values()))} |" for phase in phases]
    (folder / "README.md").write_text(
        f"""---
license: apache-2.0
language: en
pipeline_tag: text-generation
tags: [diffusion-language-model, {config.family}]
---

# {folder.name}

A masked-diffusion language model of the {config.family} family, small enough for tests and trained for them:
{config.num_layers} blocks, width {config.hidden_size}, {config.num_heads} heads over {config.num_kv_heads} key/value
heads, {config.embedding_size} embedding rows, {_parameters(folder):,} parameters in bfloat16.

{_data(reference)}
## Training

`python -m pipeline.tiny.train {folder.name}`, one row a run, each from the weights of the one before:

| {" | ".join(phases[0])} |
|{"---|" * len(phases[0])}
{chr(10).join(trained)}

The loss masks a uniform number of answer tokens and averages the cross-entropy over them: the masked-diffusion
objective in its any-order form. A pressure towards token-dependent activation outliers (`pipeline/tiny/outliers.py`)
makes the model as hard to quantise as large ones are.

## Scores

Exact match on {COUNT} held-out problems, threshold 0.9, one block of 32. Quantised rows are round to nearest, in torch.

| recipe | {" | ".join(kinds)} |
|---|{"---|" * len(kinds)}
"""
        + "\n".join(rows)
        + "\n",
        encoding="utf-8",
    )


def _data(reference: Reference) -> str:
    return f"""## Data

Generated problems {reference.about}. Answers are worked step by step. One prompt in sixteen, by its
hash, is held out and never trained on; `held_out.jsonl` beside this folder has {reference.held_out} of them. This set
of generators has the fingerprint {fingerprint(reference.kinds)}; runs on another set have another one in the table
below.
"""


def _parameters(folder: Path) -> int:
    return sum(math.prod(entry.shape) for entry in open_checkpoint(folder).entries.values())


def write_problems(path: Path, chosen: Iterable[Problem]) -> None:
    """A task file, on which a model can be calibrated, too."""
    lines = [json.dumps({"prompt": p.prompt, "answer": p.answer, "kind": p.kind}) for p in chosen]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=REFERENCES)
    parser.add_argument("weights", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder; its name must be the model's")
    options = parser.parse_args()
    reference = REFERENCES[options.name]
    tokenizer = reference.tokenizer()
    write_checkpoint(options.output, reference.config(tokenizer), load_file(options.weights))
    write_tokenizer(options.output, reference.family, tokenizer, reference.specials)
    asked = held_out(reference.held_out, kinds=reference.kinds)
    write_problems(options.output.parent / "held_out.jsonl", asked)
    if reference.kinds is not KINDS:  # whose problems are the built-in text to calibrate on
        drawn = problems(0, held_out=False, kinds=reference.kinds)
        write_problems(options.output.parent / "calibration.jsonl", islice(drawn, CALIBRATION))
    with tempfile.TemporaryDirectory() as scratch:
        scores = measure(options.output, asked[:COUNT], Path(scratch))
    print(json.dumps(scores, indent=2))  # noqa: T201
    write_card(options.output, reference, scores, history(options.weights))


if __name__ == "__main__":
    main()
