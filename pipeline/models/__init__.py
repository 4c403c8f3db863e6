"""Model families and checkpoint folders: from files anyone may have written to a checked `ModelConfig` and tensors.

`open_checkpoint` and `load_model` (which need torch) are in `pipeline.models.checkpoint`; nothing here imports torch.
"""

import difflib
from pathlib import Path

from pipeline.errors import InputRefused
from pipeline.folder import user_path
from pipeline.models.dream import DREAM
from pipeline.models.family import ModelFamily
from pipeline.models.llada import LLADA

FAMILIES: dict[str, ModelFamily] = {"llada": LLADA, "dream": DREAM}

_TINY = Path(__file__).parent.parent / "tiny"
BUILTIN: dict[str, Path] = {"tiny-llada": _TINY / "tiny-llada", "tiny-dream": _TINY / "tiny-dream"}

_SCHEME = "builtin:"


def resolve(model: str) -> Path:
    """The folder that `builtin:NAME` or a path names; raises InputRefused when there is none."""
    if model.startswith(_SCHEME):
        name = model.removeprefix(_SCHEME)
        if name not in BUILTIN:
            nearest = difflib.get_close_matches(name, BUILTIN, n=1, cutoff=0)[0]
            raise InputRefused(
                f"no built-in model {name!r}; there are {', '.join(BUILTIN)}: did you mean {_SCHEME}{nearest}? "
                "(`dllmc models` lists them)"
            )
        return BUILTIN[name]
    folder = user_path(model)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise InputRefused(
            f"no model folder {model!r}: found {found}, expected a folder with config.json, *.safetensors and "
            "tokenizer files; dllmc reads local folders, so download a hub model first "
            "(`hf download NAME --local-dir DIR`), or name a built-in one (`dllmc models` lists them)"
        )
    return folder


def lasting_name(model: str, folder: Path) -> str:
    """What names a model, found in `folder`, from anywhere."""
    return model if model.startswith(_SCHEME) else str(folder.absolute())


def family_of(model_type: str) -> ModelFamily | None:
    """The family whose published `model_type` this is, spelled exactly."""
    return next((family for family in FAMILIES.values() if family.model_type == model_type), None)
