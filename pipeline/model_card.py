"""MODEL_CARD.md of a bundle: base model, recipe, numbers, licence carried over, limits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.folder import LICENSES, VALIDATION
from pipeline.inspection import size_text, table
from pipeline.licence import Licence

MAX_ROWS = 60


LIMITS = """\
Quantisation changes a model's answers. The numbers above were measured on the inputs they name; measure your own task
with `dllmc eval` before you rely on the model. What the base model must not be used for, this one must not either."""


def write_card(facts: Mapping[str, Any], work: Path, licence: Licence) -> bytes:
    """The card's text; `facts` is the manifest's, numbers come from validation.json in `work`."""
    model = facts["model"]
    lines = [
        "---",
        yaml.safe_dump(_front_matter(facts, licence), sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {_plain(model['source'])}, {facts['recipe']}",
        "",
        f"A diffusion language model of the {model['family']} family, compiled by dllmc {facts['dllmc_version']} "
        f"with the recipe `{facts['recipe']}` (`recipe.yaml`). Status: **{facts['status']}**.",
        "",
        *_weights(facts),
        "",
        "## Validation",
        "",
        *_validation(work / VALIDATION),
        "",
        "## Licence",
        "",
        *_licence(licence),
        "",
        "## Limits",
        "",
        LIMITS,
    ]
    return ("\n".join(lines) + "\n").encode()


def _front_matter(facts: Mapping[str, Any], licence: Licence) -> dict[str, Any]:
    return {
        **licence.front_matter,
        "base_model": facts["model"]["source"],
        **({"base_model_relation": "quantized"} if facts["completeness"]["linears_quantised"] else {}),
        "library_name": "dllmc",
        "pipeline_tag": "text-generation",
        "tags": ["diffusion-language-model", facts["model"]["family"], "onnx"],
    }


def _weights(facts: Mapping[str, Any]) -> list[str]:
    formats, complete = facts["formats"], facts["completeness"]
    rows = [
        (row["part"], row["format"], row["tensors"], size_text(row["size_bytes"]), size_text(row["fp16_bytes"]))
        for row in formats
    ]
    size, fp16 = (sum(row[key] for row in formats) for key in ("size_bytes", "fp16_bytes"))
    return [
        *table(("part", "format", "tensors", "size", "at fp16"), rows),
        "",
        f"Weights: {size_text(size)}, {size_text(fp16)} at fp16. "
        f"{complete['tensors_used']} of {complete['tensors_total']} tensors of the checkpoint used; "
        f"{complete['linears_quantised']} of {complete['linears_total']} linears quantised, "
        f"{complete['linears_kept']} kept at 16 bits by the recipe.",
    ]


def _plain(text: str) -> str:
    """Text of a stranger's folder, without what Markdown or HTML would act on."""
    return "".join(letter if letter.isalnum() or letter in " ._:/+-" else "_" for letter in text)


def _validation(path: Path) -> list[str]:
    if not path.is_file():
        return ["Not validated: the export ran with `--validate off`."]
    report = json.loads(path.read_bytes())
    # What a reader asks first stands first.
    ordered = {key: report[key] for key in sorted(report, key=lambda key: (key != "quality", key == "layers", key))}
    rows = list(_flat(ordered))
    kept = table(("number", "value"), rows[:MAX_ROWS])
    return kept if len(rows) <= MAX_ROWS else [*kept, "", f"{len(rows) - MAX_ROWS} more are in `{VALIDATION}`."]


def _flat(value: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, float):
        yield prefix, f"{value:.6g}"
    elif isinstance(value, int | str):
        yield prefix, str(value)


def _licence(licence: Licence) -> Iterator[str]:
    for key, value in licence.front_matter.items():
        yield f"- {key}: {_plain(value if isinstance(value, str) else ', '.join(value))}"
    if licence.files:
        yield f"- the base model's own texts, unchanged, in `{LICENSES}/`: {', '.join(map(_plain, licence.files))}"
    if not licence.files and not licence.front_matter:
        yield "The base model's folder states no licence; ask its authors."
