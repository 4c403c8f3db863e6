"""Files that are whole or absent: names, atomic writes, the work folder, and its publication by rename.

A run writes under `DIR.work`, beside `DIR`. The bundle is assembled in `DIR.work/bundle` and becomes `DIR` by one
rename, so a crash, Ctrl-C or a full disk leaves either no `DIR` or a whole one. Standard library only.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import DllmcError, EnvironmentFault, InputRefused, UsageFault, WillNotFit

if TYPE_CHECKING:
    from typing_extensions import Self

STAGES = ("calibrate", "quantize", "lower", "validate", "build", "bundle")

MANIFEST = "manifest.json"
MODEL = "model.onnx"
MODEL_DATA = "model.onnx.data"
SCORE = "score.onnx"
GUIDED = "guided.onnx"
CONFIG = "config.json"
RECIPE = "recipe.yaml"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
VALIDATION = "validation.json"
MODEL_CARD = "MODEL_CARD.md"
GOLDEN = "golden"
LICENSES = "LICENSES"
LOCK = "lock"  # in a work folder; a folder without it is not ours to remove

FILE_MODE = 0o644
FOLDER_MODE = 0o755
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def os_faults(what: str, *, reads: Path | None = None, writes: Path | None = None) -> Iterator[None]:
    """Turn an OSError into WillNotFit (disk full) or EnvironmentFault; `what` is the act that failed.

    With `reads` and `writes`, a file inside the first cannot be read (InputRefused), and `what` is said only of one
    inside the second.
    """
    try:
        yield
    except OSError as fault:
        why = fault.strerror or str(fault)
        # numpy tells of a short write in words, without a number.
        if fault.errno in NO_SPACE or (fault.errno is None and re.fullmatch(r"\d+ requested and \d+ written", why)):
            raise WillNotFit(f"{what}: the disk is full ({why}); free some space and repeat") from fault
        if reads is not None and _concerns(fault, reads):
            raise InputRefused(
                f"{fault.filename or reads} cannot be read: {why}; check that the folder is whole and still there"
            ) from fault
        if writes is not None and not _concerns(fault, writes):
            where = f"{fault.filename} cannot be used" if fault.filename else f"{what}, or read what it needs"
            raise EnvironmentFault(f"{where}: {why}; check disk and permissions, and repeat") from fault
        raise EnvironmentFault(f"{what}: {why}; choose another place with -o DIR") from fault


def _concerns(fault: OSError, folder: Path) -> bool:
    """Whether the fault names a file in the folder; libraries in Rust name it in the text alone."""
    inside = os.path.join(os.path.abspath(folder), "")
    if isinstance(fault.filename, str | bytes | os.PathLike):
        return os.path.join(os.path.abspath(os.fsdecode(fault.filename)), "").startswith(inside)
    return inside in str(fault) or os.path.join(folder, "") in str(fault)


def user_path(text: str) -> Path:
    """The path that a user wrote, `~` expanded; raises InputRefused where no file system could have it."""
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as fault:
        shown = text if len(text) <= 80 else f"{text[:80]}..."
        why = fault.strerror if isinstance(fault, OSError) else fault
        raise InputRefused(f"{shown!r} cannot be opened: {why}; expected the path of a folder") from fault
    return path


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


def hash_file(path: Path, *, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, in hexadecimal; `on_bytes` gets the size of each part that was read."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))
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


def take_lock(folder: Path, what: str) -> int:
    """An open handle that locks `folder` until it is closed; UsageFault while another `what` works there."""
    import fcntl

    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, FILE_MODE)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as fault:
        os.close(handle)
        raise UsageFault(f"another {what} is working in {folder}; wait for it, or pass another -o DIR") from fault
    return handle


class WorkFolder:
    """`DIR.work`: locked while in use, remembers finished stages, disappears once published.

    Use as a context manager. Entering it is the dry write that finds an unwritable place before any work begins;
    leaving it with an error removes it when no stage was finished.
    Raises UsageFault when `DIR` exists (under `force`: and is no bundle), lies in, holds or is the folder `model`, when
    `DIR.work` is not ours, and when another run holds it.
    """

    def __init__(self, output: Path, *, force: bool = False, model: Path | None = None) -> None:
        self.output = Path(os.path.abspath(output))
        self.force = force
        if not self.output.name:
            raise UsageFault(f"{output} cannot be an output folder; pass another with -o DIR")
        self.path = self.output.with_name(self.output.name + ".work")
        self.bundle = self.path / "bundle"
        if model is not None:
            self._check_apart(model)
        self._check_output()

    def _check_apart(self, model: Path) -> None:
        source = Path(os.path.realpath(model))
        for place in (Path(os.path.realpath(self.output)), Path(os.path.realpath(self.path))):
            if place == source or place in source.parents or source in place.parents:
                raise UsageFault(
                    f"{self.output} is, holds or lies in the model folder {model}, where nothing is written; "
                    "pass a folder apart from it with -o DIR"
                )

    def _check_output(self) -> None:
        """UsageFault unless `DIR` is free, or may be replaced: nothing but an empty folder or a bundle ever is."""
        if not os.path.lexists(self.output):
            return
        if not self.force:
            raise UsageFault(f"{self.output} exists; pass --force to replace it, or another folder with -o DIR")
        kept = "so --force does not replace it; pass another with -o DIR"
        if self.output.is_symlink():
            raise UsageFault(f"{self.output} is a link, {kept} (or the folder itself)")
        if not self.output.is_dir():
            raise UsageFault(f"{self.output} is not a folder, {kept}")
        from pipeline.manifest import list_files, read_manifest  # which stands on this module

        try:
            if not any(self.output.iterdir()):
                return
            named = {entry.path for entry in read_manifest(self.output).files}
            others = [name for name in list_files(self.output) if name not in named]
        except (DllmcError, OSError) as fault:
            raise UsageFault(f"{self.output} is not empty and no bundle of ours ({fault}), {kept}") from fault
        if others:
            raise UsageFault(f"{self.output} holds {others[0]}, which is no part of its bundle, {kept}")

    def __enter__(self) -> Self:
        with os_faults(f"cannot write beside {self.output}"):
            self._check_ours()
            make_folder(self.path)
            self._lock = take_lock(self.path, "dllmc")
            try:
                write_bytes(self.path / "probe", b"dry write")
                (self.path / "probe").unlink()
                self._restore()
                self._check_output()
            except BaseException:
                self._leave(failed=True)
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
        self._leave(failed=kind is not None)

    def _leave(self, *, failed: bool) -> None:
        try:
            if failed and not any(self.path.glob("*.done.json")):
                self._remove()  # nothing to resume from
        except OSError:
            pass  # what led here says more
        finally:
            os.close(self._lock)

    def _check_ours(self) -> None:
        """UsageFault where something else has the work folder's name."""
        if not os.path.lexists(self.path):
            return
        plain = self.path.is_dir() and not self.path.is_symlink()
        if not plain or (any(self.path.iterdir()) and not (self.path / LOCK).is_file()):
            raise UsageFault(
                f"{self.path} is not a work folder of dllmc, and an export to {self.output} would use that name; "
                "move it away, or pass another folder with -o DIR"
            )

    def _remove(self) -> None:
        """Remove the work folder, its lock last: what a kill leaves is known by it."""
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
        (self.path / LOCK).unlink()
        self.path.rmdir()

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
                self._check_output()
                self._drop_second_names()
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
                self._remove()
        return self.output

    def _drop_second_names(self) -> None:
        """Leave each file of the bundle one name: after a kill in `_remove` nobody would open one that has two."""
        touched = set()
        for level, _, files in os.walk(self.bundle):
            for path in (Path(level, name) for name in files):
                twin = self.path / path.relative_to(self.bundle)
                if twin.exists() and twin.samefile(path):
                    twin.unlink()
                    touched.add(twin.parent)
        for folder in touched:
            sync_folder(folder)


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
