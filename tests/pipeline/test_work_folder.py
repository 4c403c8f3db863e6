"""The work folder: nothing of the user's is ever replaced, and what is published is whole, whenever a run is killed."""

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from pipeline import folder
from pipeline.backends.precheck import precheck
from pipeline.errors import EnvironmentFault, UsageFault, WillNotFit
from pipeline.folder import MANIFEST, WorkFolder, read_job, write_bytes, write_json
from pipeline.manifest import build_manifest, verify
from tests.pipeline.test_folder import everything


def seal(bundle: Path) -> None:
    write_bytes(bundle / MANIFEST, build_manifest(bundle, {})[1])


def make_bundle(path: Path, content: bytes = b"old") -> Path:
    path.mkdir()
    write_bytes(path / "model.onnx", content)
    seal(path)
    return path


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


def replaceable(output: Path, **options: Path) -> None:
    with WorkFolder(output, force=True, **options):
        pass


@pytest.mark.parametrize("damage", ["no manifest", "foreign", "damaged", "more files", "a link", "hidden folder"])
def test_force_replaces_nothing_but_a_bundle(tmp_path: Path, damage: str) -> None:
    output = make_bundle(tmp_path / "out")
    replaceable(output)
    if damage == "no manifest":
        (output / MANIFEST).unlink()
    elif damage == "foreign":
        (output / MANIFEST).write_text('{"name": "an app"}')
    elif damage == "damaged":
        (output / MANIFEST).write_bytes((output / MANIFEST).read_bytes().replace(b"{", b"{ ", 1))
    elif damage == "more files":
        (output / "thesis.txt").write_text("years of work")
    elif damage == "a link":
        (output / "thesis").symlink_to(tmp_path)
    else:
        (output / ".git").mkdir()
        (output / ".git" / "HEAD").write_text("ref")
    shutil.rmtree(tmp_path / "out.work")
    before = everything(tmp_path)
    with pytest.raises(UsageFault, match="so --force does not replace it; pass another with -o DIR"):
        WorkFolder(output, force=True)
    assert everything(tmp_path) == before


def test_an_output_filled_while_working_is_kept(tmp_path: Path) -> None:
    """What was free, or a bundle, when the work began may be something else when it ends."""
    output = tmp_path / "out"
    for force in (False, True):
        with pytest.raises(UsageFault, match=r"exists|no bundle of ours"), WorkFolder(output, force=force) as work:
            assemble(work, b"new")
            output.mkdir()
            (output / "mine").write_bytes(b"mine")
            work.publish()
        assert everything(tmp_path) == {"out": None, "out/mine": b"mine"}
        shutil.rmtree(output)


@pytest.mark.parametrize("place", ["model", "model/out", "model/a/b", ".", "link", "link/out"])
def test_the_model_is_never_the_output(tmp_path: Path, place: str) -> None:
    model = make_bundle(tmp_path / "model")  # even where it could be taken for a bundle
    (tmp_path / "link").symlink_to(model)
    refuse_model_as_output(tmp_path, tmp_path / place, model)


def test_the_model_is_never_in_the_work_folder(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "out") as work:
        model = make_bundle(work.path / "model")
    refuse_model_as_output(tmp_path, tmp_path / "out", model)


def refuse_model_as_output(root: Path, output: Path, model: Path) -> None:
    before = everything(root)
    for force in (False, True):
        with pytest.raises(UsageFault, match=r"model folder .*-o DIR"):
            WorkFolder(output, force=force, model=model)
    assert everything(root) == before


def test_an_output_beside_the_model_is_free(tmp_path: Path) -> None:
    model = make_bundle(tmp_path / "model")
    for name in ("model-rtn", "out", "mode"):
        replaceable(tmp_path / name, model=model)


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_a_work_folder_of_somebody_else_is_kept(tmp_path: Path, kind: str) -> None:
    output, work = tmp_path / "out", tmp_path / "out.work"
    elsewhere = tmp_path / "elsewhere"
    if kind == "file":
        work.write_bytes(b"mine")
    elif kind == "folder":
        (work / "bundle").mkdir(parents=True)
        (work / "bundle" / "mine").write_bytes(b"mine")
    else:
        elsewhere.mkdir()
        work.symlink_to(elsewhere)
    before = everything(tmp_path)
    for force in (False, True):
        with pytest.raises(UsageFault, match="not a work folder of dllmc"), WorkFolder(output, force=force):
            pytest.fail("entered")
    assert everything(tmp_path) == before


def test_an_empty_work_folder_is_taken(tmp_path: Path) -> None:
    """A run that is killed before it takes the lock leaves one."""
    (tmp_path / "out.work").mkdir()
    with WorkFolder(tmp_path / "out") as work:
        assert (work.path / "lock").is_file()


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
    seal(work.bundle)


def test_publishing_is_one_rename(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with WorkFolder(output) as work:
        assemble(work, b"one")
        assert work.publish() == output
    verify(output)
    assert set(everything(tmp_path)) == {"out", "out/golden", "out/model.onnx", "out/manifest.json"}
    assert (output / "model.onnx").read_bytes() == b"one"
    assert (output / "model.onnx").stat().st_nlink == 1
    with WorkFolder(output, force=True) as work:
        assemble(work, b"two")
        work.publish()
    assert set(everything(tmp_path)) == {"out", "out/golden", "out/model.onnx", "out/manifest.json"}
    assert (output / "model.onnx").read_bytes() == b"two"


def test_a_failed_publication_keeps_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = make_bundle(tmp_path / "out")
    before = everything(output)
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
    assert everything(output) == before


def test_a_bundle_moved_aside_by_a_killed_run_comes_back(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with WorkFolder(output) as work:
        work.mark_done("lower", "x", [])
        make_bundle(work.path / "replaced")
    with pytest.raises(UsageFault, match="exists; pass --force"), WorkFolder(output):
        pytest.fail("entered: this run was not told to replace it")
    verify(output)
    with WorkFolder(output, force=True):
        verify(output)


KILLED = """
import os, sys
from pathlib import Path
from pipeline import folder
from pipeline.manifest import build_manifest

steps = 0
def count(function):
    def call(*arguments, **options):
        global steps
        steps += 1
        if steps == int(sys.argv[2]):
            os._exit(9)
        return function(*arguments, **options)
    return call

for name in ("fsync", "unlink", "rmdir"):
    setattr(os, name, count(getattr(os, name)))
for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
    setattr(Path, name, count(getattr(Path, name)))
with folder.WorkFolder(Path(sys.argv[1]), force=len(sys.argv) > 4) as work:
    folder.make_folder(work.bundle)
    for name in "abcdefgh":  # whichever comes first when the folder is removed
        (work.path / name).write_bytes(b"stats")
    for name in ("model.onnx", "model.onnx.data"):
        folder.write_bytes(work.path / name, Path(sys.argv[3], name).read_bytes())
        folder.link_or_copy(work.path / name, work.bundle / name)
    folder.write_bytes(work.bundle / "manifest.json", build_manifest(work.bundle, {})[1])
    work.publish()
print(steps)
"""


def write_model(folder: Path) -> None:
    """An ONNX model whose one tensor lies in a file of its own."""
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "model.onnx.data"), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], initializer=[tensor]))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (folder / "model.onnx.data").write_bytes(bytes(16))


@pytest.mark.parametrize("forced", [False, True])
def test_killed_at_any_step_there_is_a_whole_bundle_or_none(tmp_path: Path, forced: bool) -> None:
    """Which opens; and the next run may go on."""
    write_model(tmp_path)
    before = make_bundle(tmp_path / "old", b"before")

    def run(number: int) -> subprocess.CompletedProcess[str]:
        output = tmp_path / str(number)
        if forced:
            shutil.copytree(before, output)
        command = [sys.executable, "-c", KILLED, str(output), str(number), str(tmp_path), *["force"] * forced]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])

    whole = run(0)
    assert whole.returncode == 0, whole.stderr
    published = 0
    for number in range(1, int(whole.stdout) + 1):
        output = tmp_path / str(number)
        assert run(number).returncode == 9
        if output.exists():
            verify(output)
            if (output / "model.onnx").read_bytes() != b"before":
                published += 1
                precheck(output / "model.onnx")
        with WorkFolder(output, force=True):
            assert output.exists() or not forced, f"killed at step {number}, the old bundle is gone"
    assert published >= 3  # kills between the rename and the end of the work folder
