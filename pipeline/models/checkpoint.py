"""A checkpoint folder: checked whole from its headers at opening, then read one tensor at a time.

Our parameter names are the keys everywhere; the family maps them onto the names in the files.
"""

import difflib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from pipeline.errors import InputRefused
from pipeline.models import FAMILIES, family_of
from pipeline.models.config import ModelConfig
from pipeline.models.family import ModelFamily
from pipeline.models.json_file import read_json
from pipeline.models.shards import Entry, read_headers
from pipeline.models.tokenizer import read_tokenizer
from pipeline.models.transformer import Transformer, rotary_frequencies

log = logging.getLogger(__name__)

DTYPES = ("F32", "F16", "BF16")
EMBED, HEAD = "embed.weight", "head.weight"


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder; `tensor_names` maps our parameter names to the checkpoint's, `entries` say where each lies."""

    folder: Path
    family: ModelFamily
    config: ModelConfig
    tensor_names: dict[str, str]
    entries: dict[str, Entry]

    def tensor(self, name: str) -> Tensor:
        """One tensor by our name, in its stored dtype; raises InputRefused if it holds NaN or infinity."""
        if name == HEAD and self.config.tied_head:
            name = EMBED
        theirs = self.tensor_names[name]
        entry = self.entries[theirs]
        with safe_open(entry.file, framework="pt") as shard:
            tensor: Tensor = shard.get_tensor(theirs)
        finite = torch.isfinite(tensor)
        if not finite.all():
            raise InputRefused(
                f"tensor {theirs} in {entry.file.name} holds {int((~finite).sum())} NaN or infinite values of "
                f"{tensor.numel()}, expected finite weights; the file is damaged, download it again"
            )
        return tensor

    def tokenizer(self) -> Tokenizer:
        """What encodes and decodes the model's text; raises InputRefused."""
        return read_tokenizer(self.folder, self.config).parsed()

    def load(self, module: str = "", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """State dict of one submodule (`blocks.3`; names relative to it) or, with no name, of the whole model."""
        prefix = f"{module}." if module else ""
        tied = [HEAD] if self.config.tied_head else []
        chosen = [name for name in (*self.tensor_names, *tied) if name.startswith(prefix)]
        if not chosen:
            raise KeyError(f"no tensor of this model is under {module!r}")
        return {name.removeprefix(prefix): self.tensor(name).to(dtype) for name in chosen}


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a LLaDA or Dream folder; raises InputRefused unless every tensor is there, whole, and used exactly once."""
    if not folder.is_dir():
        raise InputRefused(f"no model folder at {folder}; expected a folder with config.json and *.safetensors files")
    values = read_json(folder / "config.json")
    family = _family(values.get("model_type"), "auto_map" in values)
    if "auto_map" in values:
        log.warning("%s: auto_map ignored, dllmc never runs code from a model folder", folder / "config.json")
    config = family.read_config(values)
    names = family.tensor_names(config)
    entries = read_headers(folder)
    head = family.top[HEAD]
    spare_head = config.tied_head and head in entries
    _check_names(folder, set(names.values()) | ({head} if spare_head else set()), set(entries))
    shapes = _shapes(config)
    for ours, theirs in (*names.items(), *([(HEAD, head)] if spare_head else [])):
        _check_entry(theirs, entries[theirs], shapes[ours])
    if spare_head:
        _check_same_values(head, entries[head], names[EMBED], entries[names[EMBED]])
    return Checkpoint(folder, family, config, names, entries)


def _family(model_type: object, remote_code: bool) -> ModelFamily:
    family = family_of(model_type) if isinstance(model_type, str) else None
    if family is not None:
        return family
    known = {family.model_type.lower(): family.model_type for family in FAMILIES.values()}
    nearest = difflib.get_close_matches(str(model_type).lower(), known, n=1)
    raise InputRefused(
        f"config.json: model_type is {model_type!r}, expected one of {', '.join(map(repr, known.values()))}"
        + (f"; did you mean {known[nearest[0]]!r}?" if nearest else "")
        + ("; its auto_map points to code in the folder, which dllmc never runs" if remote_code else "")
        + "; `dllmc models` lists what is supported"
    )


def _check_names(folder: Path, expected: set[str], found: set[str]) -> None:
    missing, unused = sorted(expected - found), sorted(found - expected)
    if not missing and not unused:
        return
    parts = [
        f"{len(names)} {kind} ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})"
        for kind, names in (("missing", missing), ("with no place in the model", unused))
        if names
    ]
    raise InputRefused(
        f"the tensors in {folder} are not those that its config.json describes: {' and '.join(parts)}; expected "
        f"{len(expected)}, each used once; check the layer count, biases and tied head in config.json, "
        "or download the folder again"
    )


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by our name, from the modules themselves."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}


def _check_entry(name: str, entry: Entry, shape: tuple[int, ...]) -> None:
    if entry.shape != shape:
        raise InputRefused(
            f"tensor {name} in {entry.file.name} has shape {list(entry.shape)}, expected {list(shape)} from "
            "config.json; correct the sizes in config.json, or download the folder again"
        )
    if entry.dtype not in DTYPES:
        raise InputRefused(
            f"tensor {name} in {entry.file.name} has dtype {entry.dtype}, expected one of {', '.join(DTYPES)}; "
            "start from the unquantised checkpoint"
        )


def _check_same_values(head: str, head_entry: Entry, embed: str, embed_entry: Entry, rows: int = 4096) -> None:
    """A tied head that is stored all the same must be the embedding, or using only one of them would be silent loss."""
    with (
        safe_open(head_entry.file, framework="pt") as head_file,
        safe_open(embed_entry.file, framework="pt") as embed_file,
    ):
        left, right = head_file.get_slice(head), embed_file.get_slice(embed)
        for start in range(0, head_entry.shape[0], rows):
            part = slice(start, start + rows)
            if not torch.equal(left[part].float(), right[part].float()):
                raise InputRefused(
                    f"config.json ties the head to the embedding, but {head} differs from {embed} at row {start} or "
                    f"in the {rows - 1} after it; expected the same values or no head tensor; "
                    "set the tying key to false if the head is its own"
                )


def load_model(checkpoint: Checkpoint) -> Transformer:
    """The whole model in float32, in eval mode, without gradients."""
    with torch.device("meta"):
        model = Transformer(checkpoint.config)
    model.load_state_dict(checkpoint.load(), strict=True, assign=True)
    if checkpoint.config.tied_head:
        model.head.weight = model.embed.weight
    model.rope_frequencies = rotary_frequencies(checkpoint.config)  # a constant, so no file holds it
    return model.requires_grad_(False).eval()


def write_checkpoint(
    folder: Path,
    config: ModelConfig,
    state_dict: dict[str, Tensor],
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
) -> None:
    """Write `config.json` and safetensors in the family's genuine layout, with an index where shards are several."""
    family = FAMILIES[config.family]
    names = family.tensor_names(config)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", family.write_config(config))
    tensors = {theirs: state_dict[ours].detach().to("cpu", dtype).contiguous() for ours, theirs in names.items()}
    if shards == 1:
        _write_shard(folder / "model.safetensors", tensors)
        return
    placed: dict[str, str] = {}
    listed = sorted(tensors)
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = listed[len(listed) * number // shards : len(listed) * (number + 1) // shards]
        _write_shard(folder / file, {name: tensors[name] for name in part})
        placed |= dict.fromkeys(part, file)
    size_bytes = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size_bytes}, "weight_map": dict(sorted(placed.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors leaves 0600


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
