"""Which safetensors files make up a checkpoint and which tensors they hold, from headers alone.

Nothing but safetensors is opened as weights: a pickle, whatever its name, is refused before any reader sees it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from safetensors import SafetensorError, safe_open

from pipeline.errors import InputRefused
from pipeline.models.json_file import read_json

PICKLES = (".bin", ".pt", ".pth", ".pt2", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
MAGIC = {
    b"\x80": "a Python pickle",
    b"PK\x03\x04": "a zip archive (torch.save writes these)",
    b"version https://git-lfs": "a git-lfs pointer, not the weights (run `git lfs pull` in the folder)",
    b"GGUF": "a GGUF file",
}
INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """Where one tensor of a checkpoint lies; `dtype` as safetensors spells it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_headers(folder: Path) -> dict[str, Entry]:
    """Every tensor of the checkpoint by its name; raises InputRefused for anything but whole, consistent shards."""
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    indexes = sorted(folder.glob(f"*{INDEX}"))
    if not present and not indexes:
        raise _no_weights(folder)
    if len(indexes) > 1:
        raise InputRefused(
            f"{folder} has {len(indexes)} weight indexes ({_names(p.name for p in indexes)}), expected one; "
            "remove those of other checkpoints"
        )
    placed = _read_index(indexes[0]) if indexes else None
    if placed is None:
        shards = present
    else:
        shards = sorted(set(placed.values()))
        if stray := sorted(set(present) - set(shards)):
            raise InputRefused(
                f"{_names(stray)} in {folder} is not named by {indexes[0].name}; every tensor of a checkpoint is used, "
                "so move the file elsewhere or add it to the index"
            )
    entries: dict[str, Entry] = {}
    for shard in shards:
        for name, entry in _read_shard(folder / shard).items():
            if name in entries:
                raise InputRefused(
                    f"tensor {name} is in {entries[name].file.name} and in {shard}, expected it once; "
                    "remove the file that does not belong to this checkpoint"
                )
            entries[name] = entry
    if placed is not None:
        _check_index(indexes[0].name, placed, entries)
    return entries


def _no_weights(folder: Path) -> InputRefused:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICKLES)
    if pickles:
        return InputRefused(
            f"{folder} has its weights only as pickles ({_names(pickles)}), which can run code when they are opened; "
            "dllmc reads safetensors only: convert them on a machine you can spare "
            "(transformers: model.save_pretrained(DIR)), or download the safetensors version"
        )
    return InputRefused(f"{folder} has no weights: found no *.safetensors file; download the whole model folder")


def _read_index(path: Path) -> dict[str, str]:
    """`weight_map` of an index, each value a plain file name: a name that leaves the folder is refused."""
    placed = read_json(path).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(shard, str) for shard in placed.values()):
        raise InputRefused(f"{path}: weight_map must map tensor names to file names; download the index again")
    for shard in sorted(set(placed.values())):
        plain = shard == PurePosixPath(shard).name == PureWindowsPath(shard).name and "\0" not in shard
        if not plain or not shard.endswith(".safetensors"):
            raise InputRefused(
                f"{path} names the shard {shard!r}; expected the plain name of a .safetensors file beside the index, "
                "so that nothing outside the folder is read; correct the index or download it again"
            )
    return placed


def _read_shard(path: Path) -> dict[str, Entry]:
    """Names, dtypes and shapes in one file; the reader itself refuses gaps, overlaps and a wrong length."""
    if not path.is_file():  # a link is followed: a hub cache is made of links
        raise InputRefused(
            f"shard {path.name} is named but is no file in {path.parent}; download the missing shard "
            "(`hf download NAME --local-dir DIR` continues where it stopped)"
        )
    try:
        with path.open("rb") as stream:
            head = stream.read(32)
        for magic, kind in MAGIC.items():
            if head.startswith(magic) and not _looks_like_header(head):
                raise InputRefused(f"{path} is {kind}, expected safetensors whatever its name says; it was not opened")
        with safe_open(path, framework="pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 (a shard is not a dict)
            return {name: Entry(path, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except SafetensorError as error:
        raise InputRefused(
            f"{path} is not a whole safetensors file ({path.stat().st_size} bytes: {error}); "
            "it is truncated or corrupt, download it again"
        ) from error
    except OSError as error:
        raise InputRefused(f"{path} cannot be read ({error}); check the file and its permissions") from error


def _looks_like_header(head: bytes) -> bool:
    """A safetensors file opens with its header's length (8 bytes, at most 100 MB) and a brace; 128 may be its first."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100 * 2**20


def _check_index(index: str, placed: dict[str, str], entries: dict[str, Entry]) -> None:
    """The index and the shards must tell the same story."""
    for name in sorted(placed.keys() | entries.keys()):
        found = entries[name].file.name if name in entries else "no shard"
        if placed.get(name) != found:
            raise InputRefused(
                f"tensor {name}: {index} says {placed.get(name, 'nothing')}, but it is in {found}; "
                "index and shards are of different checkpoints, download both again"
            )


def _names(names: Iterable[str], limit: int = 4) -> str:
    listed = list(names)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")
