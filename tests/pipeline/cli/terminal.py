"""A command whose standard error is a terminal, to see what it draws there."""

import os
import pty
import select
import subprocess
from collections.abc import Mapping, Sequence

PATIENCE_SECONDS = 60


def on_a_terminal(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, typed: bytes = b""
) -> tuple[bytes, str]:
    """What the terminal was shown, and standard output; `typed` makes the terminal standard input, too."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command,
        stdin=theirs if typed else None,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "PYTHONUTF8": "1", **(env or {})},
    )
    os.close(theirs)
    os.write(ours, typed)
    shown = b""
    while select.select([ours], [], [], PATIENCE_SECONDS)[0]:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # Linux says EIO when the last writer has gone
            break
        if not chunk:
            break
        shown += chunk
    text, _ = process.communicate(timeout=PATIENCE_SECONDS)
    os.close(ours)
    assert process.returncode == 0
    return shown, text.decode()
