"""A bundle is what its manifest names, to the byte, or it is refused."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import HashMismatch, InputRefused
from pipeline.folder import MANIFEST, canonical_json, write_bytes
from pipeline.manifest import build_manifest, read_manifest, verify

FILES = {
    "model.onnx": b"graph",
    "model.onnx.data": bytes(range(256)),
    "golden/0.json": b"{}",
    "validation.json": b'{"seconds": 1}',
    "empty": b"",
}


def make_bundle(folder: Path, files: dict[str, bytes] = FILES, **facts: Any) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    _, text = build_manifest(folder, {"recipe": "fp16", **facts})
    write_bytes(folder / MANIFEST, text)
    return folder


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


def test_a_whole_bundle_verifies(whole: Path) -> None:
    manifest = verify(whole)
    assert [entry.path for entry in manifest.files] == sorted(FILES)
    assert manifest.size_bytes == sum(map(len, FILES.values()))
    assert manifest.facts == {"recipe": "fp16"}


def test_checking_counts_the_bytes_it_reads(whole: Path) -> None:
    seen: list[tuple[int, int]] = []
    manifest = verify(whole, on_bytes=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (manifest.size_bytes, manifest.size_bytes)


def test_the_identity_is_what_sha256sum_says_and_leaves_measurements_out(tmp_path: Path) -> None:
    one = verify(make_bundle(tmp_path / "one", created="today"))
    two = verify(make_bundle(tmp_path / "two", {**FILES, "validation.json": b"{}"}, created="tomorrow"))
    other = verify(make_bundle(tmp_path / "other", {**FILES, "model.onnx": b"graphs"}))
    assert one.identity == two.identity != other.identity
    names = sorted(set(FILES) - {"validation.json"})
    printed = "".join(f"{hashlib.sha256(FILES[name]).hexdigest()}  {name}\n" for name in names)
    assert one.identity == hashlib.sha256(printed.encode()).hexdigest()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(data=st.data())
def test_one_changed_byte_anywhere_is_found(whole: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*(name for name in FILES if FILES[name]), MANIFEST]))
    path = whole / name
    before = path.read_bytes()
    place = data.draw(st.integers(0, len(before) - 1))
    flipped = before[place] ^ data.draw(st.integers(1, 255))
    path.write_bytes(before[:place] + bytes([flipped]) + before[place + 1 :])
    try:
        with pytest.raises(HashMismatch, match=name):
            verify(whole)
    finally:
        path.write_bytes(before)
    verify(whole)


@pytest.mark.parametrize("spelling", [(b"\n", b" "), (b'"fp16"', b'"\\u0066p16"'), (b'"recipe": ', b'"recipe":')])
def test_the_same_json_in_other_bytes_is_found(whole: Path, spelling: tuple[bytes, bytes]) -> None:
    content = (whole / MANIFEST).read_bytes()
    (whole / MANIFEST).write_bytes(content.replace(*spelling, 1))
    assert json.loads((whole / MANIFEST).read_bytes()) == json.loads(content)
    with pytest.raises(HashMismatch, match=r"manifest\.json is damaged"):
        verify(whole)


def test_changed_missing_and_extra_files_are_all_named(whole: Path) -> None:
    (whole / "model.onnx").write_bytes(b"longer graph")
    (whole / "golden" / "0.json").unlink()
    (whole / "golden" / "1.json").write_bytes(b"{}")
    with pytest.raises(HashMismatch) as found:
        verify(whole)
    for part in ("model.onnx has 12 bytes, expected 5", "golden/0.json is missing", "golden/1.json is extra"):
        assert part in str(found.value)


def test_another_case_is_another_file(whole: Path) -> None:
    (whole / "model.onnx").rename(whole / "Model.onnx")
    with pytest.raises(HashMismatch, match=r"model\.onnx is missing; Model\.onnx is extra"):
        verify(whole)


@pytest.mark.parametrize("kind", ["link", "folder link", "pipe"])
def test_only_files_and_folders_belong_in_a_bundle(whole: Path, tmp_path: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(whole / "pipe")
    elif kind == "link":
        (whole / "model.onnx").unlink()
        (tmp_path / "elsewhere").write_bytes(FILES["model.onnx"])
        (whole / "model.onnx").symlink_to(tmp_path / "elsewhere")
    else:
        (whole / "extra").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(HashMismatch, match="neither a file nor a folder"):
        verify(whole)


def test_what_is_no_bundle_is_refused(tmp_path: Path, whole: Path) -> None:
    with pytest.raises(InputRefused, match="is not a folder"):
        verify(tmp_path / "nowhere")
    with pytest.raises(InputRefused, match="cannot be read: File name too long"):
        verify(tmp_path / ("a" * 300))
    with pytest.raises(InputRefused, match=r"holds no manifest\.json"):
        verify(tmp_path)
    content = (whole / MANIFEST).read_bytes()
    (tmp_path / "copy").write_bytes(content)
    (whole / MANIFEST).unlink()
    (whole / MANIFEST).symlink_to(tmp_path / "copy")
    with pytest.raises(InputRefused, match=r"holds no manifest\.json"):
        verify(whole)


def rewrite(folder: Path, change: dict[str, Any]) -> None:
    """A manifest whose checksum is right and whose content is not."""
    body = json.loads((folder / MANIFEST).read_bytes())
    del body["checksum"]
    body.update(change)
    checksum = hashlib.sha256(canonical_json(body)).hexdigest()
    (folder / MANIFEST).write_bytes(canonical_json({**body, "checksum": checksum}))


@pytest.mark.parametrize(
    "path",
    [
        "../model.onnx",
        "/etc/passwd",
        "a//b",
        "./a",
        "a/..",
        "",
        "a\\b",
        "a\0b",
        "c:a",
        "e\u0301",
        "manifest.json",
        "MANIFEST.JSON",
        "a\x1b[31m",
        "a\nb",
    ],
)
def test_paths_that_leave_the_folder_or_look_alike_are_refused(whole: Path, path: str) -> None:
    rewrite(whole, {"files": [{"path": path, "sha256": "0" * 64, "size_bytes": 1, "in_identity": False}]})
    with pytest.raises(InputRefused, match="not a plain relative path"):
        read_manifest(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "has schema 2, this dllmc reads 1; install a newer dllmc"),
        ({"files": 3}, "lacks or misspells a field"),
        ({"files": [{"path": "a"}]}, "lacks or misspells a field"),
        ({"files": [{"path": 1, "sha256": "", "size_bytes": 1, "in_identity": True}]}, "lacks or misspells a field"),
        ({"files": [{"path": "a", "sha256": "0", "size_bytes": 1, "in_identity": True}]}, "is malformed"),
        ({"files": [{"path": "a", "sha256": "0" * 64, "size_bytes": -1, "in_identity": True}]}, "is malformed"),
        ({"files": [{"path": "a", "sha256": "0" * 64, "size_bytes": 1.0, "in_identity": True}]}, "is malformed"),
    ],
)
def test_a_foreign_manifest_is_refused(whole: Path, change: dict[str, Any], message: str) -> None:
    rewrite(whole, change)
    with pytest.raises(InputRefused, match=message):
        read_manifest(whole)


def test_two_names_that_a_file_system_may_join_are_refused(whole: Path) -> None:
    entry = {"sha256": "0" * 64, "size_bytes": 1, "in_identity": False}
    rewrite(whole, {"files": [{"path": "a", **entry}, {"path": "A", **entry}]})
    with pytest.raises(InputRefused, match="stands twice"):
        read_manifest(whole)


def test_the_identity_must_be_that_of_the_files(whole: Path) -> None:
    rewrite(whole, {"identity": "0" * 64})
    with pytest.raises(HashMismatch, match="the identity is not that of its files"):
        read_manifest(whole)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200) | st.text().map(str.encode))
def test_any_bytes_as_a_manifest_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises((HashMismatch, InputRefused)):
        verify(tmp_path)


def test_verifying_needs_the_standard_library_only(whole: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.manifest import verify; verify(Path(sys.argv[1]));"
        "found = {name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names);"
        "sys.exit(repr(found - {'pipeline', '__main__'}) if found - {'pipeline', '__main__'} else 0)"
    )
    command = [sys.executable, "-S", "-c", code, str(whole)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
