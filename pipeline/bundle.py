"""Stage bundle: the finished files of the work folder, and what a device needs beside them, under one manifest.

Nothing written here names a user, a host or a folder of this machine; the time stands in the manifest, outside the
identity.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from pipeline import folder as names
from pipeline.folder import canonical_json, link_or_copy, make_folder, os_faults, write_bytes
from pipeline.licence import Licence
from pipeline.manifest import Manifest, build_manifest
from pipeline.model_card import write_card
from pipeline.models.config import ModelConfig
from pipeline.models.tokenizer import TokenizerSource
from pipeline.recipe import Recipe
from pipeline.recipe_file import dump_recipe
from pipeline.runner.settings import Settings
from pipeline.version import VERSION

# The packages whose versions decide the bytes of model.onnx.
MADE_WITH = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class FormatSize:
    """One kind of weights: how many tensors, and their bytes here and at 16 bits."""

    part: str  # "linears", "head", "embedding", "norms", ...
    format: str  # "int4 per channel, activations int4 per token", "fp16", ...
    tensors: int
    size_bytes: int
    fp16_bytes: int


@dataclass(frozen=True, kw_only=True)
class BundleParts:
    """All that the stages before leave for the bundle.

    `work` holds model.onnx, model.onnx.data, score.onnx, golden/ and, when validated, validation.json.
    """

    work: Path
    source: str  # as the user named the model; only its last name travels
    config: ModelConfig
    recipe: Recipe
    tokenizer: TokenizerSource
    formats: Sequence[FormatSize]
    tensors_used: int
    tensors_total: int
    linears_quantised: int
    linears_kept: int  # at 16 bits, because the recipe says so
    linears_total: int
    validated: bool
    licence: Licence = field(default_factory=Licence)


def bundle(parts: BundleParts, target: Path) -> Manifest:
    """Assemble the bundle in `target`, which is replaced; `WorkFolder.publish` then gives it its name."""
    _check_complete(parts)
    with os_faults(f"cannot assemble the bundle in {target}"):
        if target.exists():
            shutil.rmtree(target)
        make_folder(target)
        for name in _carried(parts):
            make_folder((target / name).parent)
            link_or_copy(parts.work / name, target / name)
        facts = describe(parts)
        contents = {**_written(parts), names.MODEL_CARD: write_card(facts, parts.work, parts.licence)}
        for name, content in contents.items():
            make_folder((target / name).parent)
            write_bytes(target / name, content)
        manifest, content = build_manifest(target, facts)
        write_bytes(target / names.MANIFEST, content)
    return manifest


def _check_complete(parts: BundleParts) -> None:
    """Whatever the stages skipped in silence would be found here."""
    assert parts.tensors_used == parts.tensors_total, "a tensor of the checkpoint was not used"
    assert parts.linears_quantised + parts.linears_kept == parts.linears_total, "a linear was left out"
    assert parts.linears_kept == 0 or parts.recipe.skip or parts.recipe.linear.w_bits == 16, (
        "a linear was not quantised"
    )
    assert parts.validated == (parts.work / names.VALIDATION).is_file(), "status and validation.json disagree"


def _carried(parts: BundleParts) -> Iterator[str]:
    """Files that the stages before wrote, in the bundle's names."""
    yield from parts.recipe.lowering.files
    if parts.validated:
        yield names.VALIDATION
    for path in sorted((parts.work / names.GOLDEN).rglob("*")):
        if path.is_file():
            yield path.relative_to(parts.work).as_posix()


def _written(parts: BundleParts) -> dict[str, bytes]:
    """Files that the bundle adds."""
    tokenizer = parts.tokenizer
    chat = {"chat_template": tokenizer.chat_template, "special_ids": tokenizer.special_ids}
    return {
        names.CONFIG: canonical_json(settings_of(parts).as_json()),
        names.RECIPE: dump_recipe(parts.recipe).encode(),
        names.TOKENIZER: tokenizer.text.encode(),
        names.TOKENIZER_CONFIG: canonical_json(chat),
        **{f"{names.LICENSES}/{name}": content for name, content in parts.licence.files.items()},
    }


def settings_of(parts: BundleParts) -> Settings:
    """What the runner must know; ids that no token has are banned like those beyond the vocabulary."""
    recipe = parts.recipe
    settings = Settings.of_model(parts.config, top_k=recipe.lowering.top_k, generation=recipe.generation)
    return replace(settings, vocab_size=min(parts.config.vocab_size, parts.tokenizer.id_limit))


def describe(parts: BundleParts) -> dict[str, Any]:
    """The manifest but for its files and digests."""
    return {
        "dllmc_version": VERSION,
        "created": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "status": "validated" if parts.validated else "unvalidated",
        "model": {"source": source_name(parts.source), **asdict(parts.config)},
        "recipe": parts.recipe.name,
        "formats": [asdict(row) for row in parts.formats],
        "completeness": {
            "tensors_used": parts.tensors_used,
            "tensors_total": parts.tensors_total,
            "linears_quantised": parts.linears_quantised,
            "linears_kept": parts.linears_kept,
            "linears_total": parts.linears_total,
        },
        "graph": describe_graph(parts.work / names.MODEL),
        "licence": dict(parts.licence.front_matter),
        "made_with": made_with(),
    }


def source_name(source: str) -> str:
    """The model's own name: a folder's path stays at home."""
    return source if source.startswith("builtin:") else Path(source).resolve().name


def describe_graph(model: Path) -> dict[str, Any]:
    """Inputs, outputs, domains and the number of our nodes, read from the file itself, without its weights."""
    import onnx

    proto = onnx.load(model, load_external_data=False)
    counts: dict[str, int] = {}
    for node in proto.graph.node:
        if node.domain == "dllmc":
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return {
        "inputs": [_signature(value) for value in proto.graph.input],
        "outputs": [_signature(value) for value in proto.graph.output],
        "opsets": {opset.domain: opset.version for opset in proto.opset_import},
        "dllmc_nodes": counts,
    }


def _signature(value: Any) -> dict[str, Any]:
    import onnx

    tensor = value.type.tensor_type
    dims = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return {"name": value.name, "dtype": onnx.TensorProto.DataType.Name(tensor.elem_type).lower(), "shape": dims}


def made_with() -> dict[str, str]:
    """Versions of the packages that decide the bytes of a bundle."""
    return {package: _version(package) for package in MADE_WITH}


def _version(package: str) -> str:
    try:
        return package_version(package)
    except PackageNotFoundError:
        return "absent"
