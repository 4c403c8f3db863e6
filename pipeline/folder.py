"""Files that are whole or absent: names, atomic writes, the work folder, and its publication by rename.

A run writes under `DIR.work`, beside `DIR`. The bundle is assembled in `DIR.work/bundle` and becomes `DIR` by one
rename, so a crash, Ctrl-C or a full disk leaves either no `DIR` or a whole one. Standard library only.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import EnvironmentFault, UsageFault, WillNotFit

if TYPE_CHECKING:
    from typing_extensions import Self

STAGES = ("calibrate", "quantize", "lower", "validate", "build", "bundle")

MANIFEST = "manifest.json"
MODEL = "model.onnx"
MODEL_DATA = "model.onnx.data"
CONFIG = "config.json"
RECIPE = "recipe.yaml"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
VALIDATION = "validation.json"
MODEL_CARD = "MODEL_CARD.md"
GOLDEN = "golden"
LICENSES = "LICENSES"

FILE_MODE = 0o644
FOLDER_MODE = 0o755
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def os_faults(what: str) -> Iterator[None]:
    """Turn an OSError into WillNotFit (disk full) or EnvironmentFault; `what` is the act that failed."""
    try:
        yield
    except OSError as fault:
        if fault.errno in NO_SPACE:
            raise WillNotFit(f"{what}: the disk is full ({fault.strerror}); free some space and repeat") from fault
        raise EnvironmentFault(f"{what}: {fault.strerror or fault}; choose another place with -o DIR") from fault


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, mode 0755 whatever the umask."""
    missing = [folder, *folder.parents]
    for level in reversed(missing[: next((i for i, level in enumerate(missing) if level.is_dir()), len(missing))]):
        level.mkdir(exist_ok=True)
        level.chmod(FOLDER_MODE)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed, on failure removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with os_faults(f"cannot write {path}"):
        try:
            yield temporary
            with temporary.open("rb+") as stream:
                os.fsync(stream.fileno())
            temporary.chmod(FILE_MODE)
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write one file atomically."""
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically, in the one form that `canonical_json` gives."""
    write_bytes(path, canonical_json(value))


def canonical_json(value: object) -> bytes:
    """Bytes that are equal for equal values; NaN and infinity raise ValueError."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """Give a finished file a second name, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        with atomic(target) as temporary:
            shutil.copyfile(source, temporary)


def sync_tree(folder: Path) -> None:
    """Fix the modes of a folder and all that is in it, and make it durable, files before folders."""
    for level, folders, files in os.walk(folder, topdown=False):
        for name in files:
            path = Path(level, name)
            path.chmod(FILE_MODE)
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        for name in folders:
            Path(level, name).chmod(FOLDER_MODE)
        sync_folder(Path(level))
    folder.chmod(FOLDER_MODE)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM for the few renames that belong together."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WorkFolder:
    """`DIR.work`: locked while in use, remembers finished stages, disappears once published.

    Use as a context manager. Entering it is the dry write that finds an unwritable place before any work begins;
    leaving it with an error removes it when no stage was finished.
    Raises UsageFault when `DIR` exists (unless `force`) or another run holds the folder.
    """

    def __init__(self, output: Path, *, force: bool = False) -> None:
        self.output = Path(os.path.abspath(output))
        if not self.output.name:
            raise UsageFault(f"{output} cannot be an output folder; pass another with -o DIR")
        self.path = self.output.with_name(self.output.name + ".work")
        self.bundle = self.path / "bundle"
        if os.path.lexists(self.output) and not force:
            raise UsageFault(f"{output} exists; pass --force to replace it, or another folder with -o DIR")
        if self.output.exists() and not self.output.is_dir():
            raise UsageFault(f"{output} is not a folder, so --force does not replace it; pass another with -o DIR")
        if self.output.is_symlink():
            raise UsageFault(f"{output} is a link, so --force does not replace it; pass the folder itself with -o DIR")

    def __enter__(self) -> Self:
        with os_faults(f"cannot write beside {self.output}"):
            make_folder(self.path)
            self._lock = self._take_lock()
            try:
                write_bytes(self.path / "probe", b"dry write")
                (self.path / "probe").unlink()
                self._restore()
            except BaseException:
                self._leave(failed=True)
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
        self._leave(failed=kind is not None)

    def _leave(self, *, failed: bool) -> None:
        os.close(self._lock)
        if failed and not any(self.path.glob("*.done.json")):
            shutil.rmtree(self.path, ignore_errors=True)  # nothing to resume from

    def _take_lock(self) -> int:
        import fcntl

        handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, FILE_MODE)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as fault:
            os.close(handle)
            raise UsageFault(f"another dllmc is working in {self.path}; wait for it, or pass another -o DIR") from fault
        return handle

    def _restore(self) -> None:
        """Put an old bundle back that a killed `--force` had moved aside."""
        replaced = self.path / "replaced"
        if replaced.exists() and not self.output.exists():
            replaced.rename(self.output)
        shutil.rmtree(replaced, ignore_errors=True)

    def record_job(self, model: str, recipe: str) -> None:
        """Remember what `dllmc STAGE DIR` works on; `recipe` is the resolved YAML."""
        write_json(self.path / "job.json", {"model": model, "recipe": recipe})

    def mark_done(self, stage: str, fingerprint: str, files: Iterable[str]) -> None:
        """Record a finished stage: what it was made from and the SHA-256 of what it left in the folder."""
        hashes = {name: hash_file(self.path / name) for name in files}
        write_json(self.path / f"{stage}.done.json", {"fingerprint": fingerprint, "files": hashes})

    def is_done(self, stage: str, fingerprint: str) -> bool:
        """Whether this stage finished with this fingerprint and its files are still what it wrote."""
        try:
            record = json.loads((self.path / f"{stage}.done.json").read_bytes())
            return record["fingerprint"] == fingerprint and all(
                hash_file(self.path / name) == expected for name, expected in record["files"].items()
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return False  # an unreadable record is a stage to repeat

    def forget(self, stages: Iterable[str]) -> None:
        """Make these stages run again."""
        for stage in stages:
            (self.path / f"{stage}.done.json").unlink(missing_ok=True)

    def publish(self) -> Path:
        """Turn `DIR.work/bundle` into `DIR`, remove `DIR.work`; an old `DIR` is replaced only under `force`."""
        with os_faults(f"cannot publish {self.output}"):
            sync_tree(self.bundle)
            with uninterrupted():
                replaced = self.path / "replaced"
                if self.output.exists():
                    self.output.rename(replaced)
                try:
                    self.bundle.rename(self.output)
                except OSError:
                    if replaced.exists():
                        replaced.rename(self.output)
                    raise
                sync_folder(self.output.parent)
                shutil.rmtree(self.path)
        return self.output


def read_job(output: Path) -> Mapping[str, Any]:
    """What `record_job` left beside this output: `model` and `recipe`; UsageFault when there is none."""
    work = output.with_name(output.name + ".work")
    try:
        job = json.loads((work / "job.json").read_bytes())
    except (OSError, ValueError) as fault:
        raise UsageFault(
            f"{work} holds no export in progress; start one with `dllmc export MODEL -o {output} --until STAGE`, "
            f"or name the model with --model"
        ) from fault
    if not isinstance(job, dict) or not all(isinstance(job.get(key), str) for key in ("model", "recipe")):
        raise UsageFault(f"{work / 'job.json'} is damaged; remove {work} and export again")
    return job
