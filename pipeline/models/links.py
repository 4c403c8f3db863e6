"""Links in a model folder: what is copied into a bundle must not come from elsewhere on the machine."""

import re
from pathlib import Path

from pipeline.errors import InputRefused

BLOB_NAME = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


def check_link(path: Path) -> None:
    """Raise InputRefused for a link that leaves its folder, unless to a blob of the hub cache the folder lies in.

    The cache is `blobs/HASH` beside `snapshots/COMMIT/`, and its files are links from the second to the first.
    """
    if not path.is_symlink():
        return
    try:
        folder, target = path.parent.resolve(strict=True), path.resolve(strict=True)
    except (OSError, RuntimeError) as fault:
        raise InputRefused(f"{path} is a link to nothing; download it again") from fault
    cached = folder.parent.name == "snapshots" and target.parent == folder.parents[1] / "blobs"
    if not (target.is_relative_to(folder) or (cached and BLOB_NAME.fullmatch(target.name))):
        raise InputRefused(
            f"{path} is a link to {target}, outside the model folder; what lies there would travel in the bundle: "
            "put the file itself into the folder, or remove the link"
        )
