"""Files are whole or absent, whatever goes wrong and whenever the run is killed."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import folder
from pipeline.errors import EnvironmentFault, UsageFault, WillNotFit
from pipeline.folder import WorkFolder, atomic, canonical_json, os_faults, read_job, write_bytes, write_json


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


@pytest.mark.parametrize("place", ["/proc/nowhere/out", "file/out", "file/deeper/out"])
def test_an_unwritable_place_is_found_at_once(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(EnvironmentFault, match=r"cannot write beside .*-o DIR"), WorkFolder(tmp_path / place):
        pytest.fail("entered")
    assert everything(tmp_path) == {"file": b"x"}


def test_a_place_without_room_for_a_byte_is_found_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(WillNotFit, match="the disk is full"), WorkFolder(tmp_path / "out"):
        pytest.fail("entered")
    assert everything(tmp_path) == {}


def test_an_existing_output_is_kept_unless_forced(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with pytest.raises(UsageFault, match="exists; pass --force"):
        WorkFolder(output)
    WorkFolder(output, force=True)
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(UsageFault, match="is not a folder"):
        WorkFolder(tmp_path / "file", force=True)
    (tmp_path / "link").symlink_to(output)
    with pytest.raises(UsageFault, match="is a link"):
        WorkFolder(tmp_path / "link", force=True)
    with pytest.raises(UsageFault, match="cannot be an output folder"):
        WorkFolder(Path("/"), force=True)


def test_an_error_before_any_stage_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), WorkFolder(tmp_path / "out") as work:
        work.record_job("model", "recipe")
        (work.path / "half").write_bytes(b"x")
        raise ZeroDivisionError
    assert everything(tmp_path) == {}


def test_finished_stages_outlive_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), WorkFolder(tmp_path / "out") as work:
        write_bytes(work.path / "model.onnx", b"graph")
        work.mark_done("lower", "recipe-1", ["model.onnx"])
        raise KeyboardInterrupt
    assert not (tmp_path / "out").exists()
    with WorkFolder(tmp_path / "out") as work:
        assert work.is_done("lower", "recipe-1")
        assert not work.is_done("lower", "recipe-2")
        assert not work.is_done("validate", "recipe-1")
        (work.path / "model.onnx").write_bytes(b"graphs")
        assert not work.is_done("lower", "recipe-1")
        write_bytes(work.path / "model.onnx", b"graph")
        assert work.is_done("lower", "recipe-1")
        (work.path / "lower.done.json").write_bytes(b"[]")
        assert not work.is_done("lower", "recipe-1")
        work.mark_done("lower", "recipe-1", ["model.onnx"])
        work.forget(["lower", "bundle"])
        assert not work.is_done("lower", "recipe-1")


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "out") as first:
        second = WorkFolder(tmp_path / "out")
        with pytest.raises(UsageFault, match="another dllmc is working in"):
            second.__enter__()
        assert first.path.is_dir()
    with WorkFolder(tmp_path / "out"):
        pass


def test_a_job_is_remembered(tmp_path: Path) -> None:
    with pytest.raises(UsageFault, match="holds no export in progress"):
        read_job(tmp_path / "out")
    with WorkFolder(tmp_path / "out") as work:
        work.record_job("builtin:tiny-llada", "name: x\n")
        assert read_job(tmp_path / "out") == {"model": "builtin:tiny-llada", "recipe": "name: x\n"}
        write_json(work.path / "job.json", {"model": 1})
        with pytest.raises(UsageFault, match="is damaged"):
            read_job(tmp_path / "out")


def assemble(work: WorkFolder, content: bytes) -> None:
    work.bundle.mkdir()
    (work.bundle / "golden").mkdir()
    write_bytes(work.path / "model.onnx", content)
    folder.link_or_copy(work.path / "model.onnx", work.bundle / "model.onnx")


def test_publishing_is_one_rename(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with WorkFolder(output) as work:
        assemble(work, b"one")
        assert work.publish() == output
    assert everything(tmp_path) == {"out": None, "out/golden": None, "out/model.onnx": b"one"}
    assert (output / "model.onnx").stat().st_nlink == 1
    with WorkFolder(output, force=True) as work:
        assemble(work, b"two")
        work.publish()
    assert everything(tmp_path) == {"out": None, "out/golden": None, "out/model.onnx": b"two"}


def test_a_failed_publication_keeps_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_bytes(b"old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "bundle":
            raise OSError(errno.EACCES, "Permission denied")
        return rename(self, target)

    with WorkFolder(output, force=True) as work:
        assemble(work, b"new")
        work.mark_done("lower", "x", [])
        monkeypatch.setattr(Path, "rename", refuse)
        with pytest.raises(EnvironmentFault, match="cannot publish"):
            work.publish()
    assert everything(output) == {"old": b"old"}


def test_a_bundle_moved_aside_by_a_killed_run_comes_back(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with WorkFolder(output) as work:
        work.mark_done("lower", "x", [])
        (work.path / "replaced").mkdir()
        (work.path / "replaced" / "old").write_bytes(b"old")
    with WorkFolder(output):
        assert everything(output) == {"old": b"old"}


KILLED = """
import os, sys
from pathlib import Path
from pipeline import folder

steps = 0
def count(function):
    def call(*arguments, **options):
        global steps
        steps += 1
        if steps == int(sys.argv[2]):
            os._exit(9)
        return function(*arguments, **options)
    return call

os.fsync = count(os.fsync)
Path.rename = count(Path.rename)
Path.replace = count(Path.replace)
with folder.WorkFolder(Path(sys.argv[1])) as work:
    folder.make_folder(work.bundle)
    for name in ("model.onnx", "manifest.json"):
        folder.write_bytes(work.bundle / name, b"x" * 1000)
    work.publish()
print(steps)
"""


def test_killed_at_any_write_there_is_no_half_bundle(tmp_path: Path) -> None:
    def run(number: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", KILLED, str(tmp_path / str(number)), str(number)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])

    whole = run(0)
    assert whole.returncode == 0, whole.stderr
    for number in range(1, int(whole.stdout) + 1):
        assert run(number).returncode == 9
        output = tmp_path / str(number)
        if output.exists():
            names = {"model.onnx": b"x" * 1000, "manifest.json": b"x" * 1000}
            assert everything(output) == names, f"killed at write {number}"
