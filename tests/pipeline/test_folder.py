"""Files are whole or absent, whatever goes wrong and whenever the run is killed."""

import errno
import os
import stat
from pathlib import Path

import pytest

from pipeline import folder
from pipeline.errors import DllmcError, EnvironmentFault, InputRefused, WillNotFit
from pipeline.folder import atomic, canonical_json, os_faults, user_path, write_bytes


def everything(root: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else None for path in root.rglob("*")
    }


def test_a_write_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_bytes(target, b"old")
    with pytest.raises(KeyboardInterrupt), atomic(target) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert everything(tmp_path) == {"file": b"old"}
    write_bytes(target, b"new")
    assert everything(tmp_path) == {"file": b"new"}


def test_files_are_synced_before_they_get_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    fsync, replace = os.fsync, Path.replace
    kind = {True: "folder", False: "file"}
    monkeypatch.setattr(
        os, "fsync", lambda handle: (seen.append(kind[stat.S_ISDIR(os.fstat(handle).st_mode)]), fsync(handle))[1]
    )
    monkeypatch.setattr(Path, "replace", lambda self, target: (seen.append("rename"), replace(self, target))[1])
    write_bytes(tmp_path / "file", b"x")
    assert seen == ["file", "rename", "folder"]


def test_modes_do_not_depend_on_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        folder.make_folder(tmp_path / "a" / "b")
        write_bytes(tmp_path / "a" / "b" / "file", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "a" / "b" / "file").stat().st_mode) == 0o644


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.ENOSPC, WillNotFit),
        (errno.EDQUOT, WillNotFit),
        (errno.EACCES, EnvironmentFault),
        (errno.EROFS, EnvironmentFault),
        (errno.EIO, EnvironmentFault),
    ],
)
def test_faults_of_the_file_system_have_their_codes(code: int, expected: type[Exception]) -> None:
    with pytest.raises(expected, match="cannot write x: ") as fault, os_faults("cannot write x"):
        raise OSError(code, os.strerror(code))
    assert ("free some space" if expected is WillNotFit else "-o DIR") in str(fault.value)


@pytest.mark.parametrize(
    ("fault", "expected", "words"),
    [
        (OSError(errno.EIO, "Input/output error", "{work}/weights/a"), EnvironmentFault, "cannot write x: Input"),
        (OSError(errno.EIO, "Input/output error", "{model}/a.safetensors"), InputRefused, "a.safetensors cannot be"),
        (FileNotFoundError("No such file or directory: {model}/a.safetensors"), InputRefused, "cannot be read: No"),
        (FileNotFoundError("No such file or directory: {work}/a.safetensors"), EnvironmentFault, "cannot write x: No"),
        (OSError(errno.EIO, "Input/output error", "{model}s/a"), EnvironmentFault, "models/a cannot be used"),
        (OSError(errno.EIO, "Input/output error"), EnvironmentFault, "cannot write x, or read what it needs: Input"),
        (OSError(errno.ENOSPC, "No space left", "{work}/a"), WillNotFit, "cannot write x: the disk is full"),
        (OSError("22528 requested and 16368 written"), WillNotFit, "cannot write x: the disk is full"),  # numpy
    ],
)
def test_a_file_that_cannot_be_read_is_not_one_that_cannot_be_written(
    fault: OSError, expected: type[DllmcError], words: str, tmp_path: Path
) -> None:
    model, work = tmp_path / "model", tmp_path / "work"
    places = {"{model}": str(model), "{work}": str(work)}
    for key, place in places.items():
        fault.args = tuple(part.replace(key, place) if isinstance(part, str) else part for part in fault.args)
        if isinstance(fault.filename, str):
            fault.filename = fault.filename.replace(key, place)
    with pytest.raises(expected) as found, os_faults("cannot write x", reads=model, writes=work):
        raise fault
    assert words in str(found.value)


@pytest.mark.parametrize("name", ["~nobody_of_this_name/x", "a" * 300, "a/" * 3000])
def test_a_path_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(InputRefused, match=r"cannot be opened: .*expected the path of a folder") as found:
        user_path(name)
    assert len(str(found.value)) <= 300
    assert user_path("~/x") == Path.home() / "x"


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes(tmp_path / "file", b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WillNotFit, match="the disk is full"):
        write_bytes(tmp_path / "file", b"new")
    assert everything(tmp_path) == {"file": b"old"}


def test_numbers_that_are_none_are_not_written() -> None:
    assert canonical_json({"b": 1, "a": [1.5, "é"]}) == '{\n  "a": [\n    1.5,\n    "é"\n  ],\n  "b": 1\n}\n'.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"loss": float("nan")})
