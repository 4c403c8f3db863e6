"""Links in a model folder: those of a hub cache are followed, those that fetch other files of the machine are not."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import InputRefused
from pipeline.licence import read_licence
from pipeline.models.links import check_link
from pipeline.models.tokenizer import _chat_template

HASH = "0123456789abcdef" * 4
SECRET = "-----BEGIN PRIVATE KEY-----"
NAMES = ("LICENSE", "README.md", "chat_template.jinja")


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A folder in the layout of the hub cache, with a private file elsewhere on the machine."""
    folder = tmp_path / "hub" / "models--x" / "snapshots" / "c0ffee"
    folder.mkdir(parents=True)
    (tmp_path / "hub" / "models--x" / "blobs").mkdir()
    (tmp_path / "id_rsa").write_text(SECRET)
    return folder


def blob(snapshot: Path, name: str = HASH, content: str = "mine") -> Path:
    path = snapshot.parents[1] / "blobs" / name
    path.write_text(content)
    return path


def linked(snapshot: Path, name: str) -> None:
    (snapshot / name).symlink_to(Path("..", "..", "blobs", HASH))


def inside(snapshot: Path, name: str) -> None:
    (snapshot / "text").write_text("mine")
    (snapshot / name).symlink_to("text")


def plain(snapshot: Path, name: str) -> None:
    (snapshot / name).write_text("mine")


def read(folder: Path, name: str) -> object:
    return _chat_template(folder, {}) if name == "chat_template.jinja" else read_licence(folder)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [plain, linked, inside])
def test_files_of_the_folder_are_read(snapshot: Path, name: str, make: Callable[[Path, str], None]) -> None:
    blob(snapshot)
    make(snapshot, name)
    check_link(snapshot / name)
    found = read(snapshot, name)
    assert found == "mine" or name != "chat_template.jinja"
    assert read_licence(snapshot).files == ({"LICENSE": b"mine"} if name == "LICENSE" else {})


def test_a_folder_may_itself_be_a_link(snapshot: Path, tmp_path: Path) -> None:
    blob(snapshot)
    linked(snapshot, "LICENSE")
    (tmp_path / "model").symlink_to(snapshot)
    assert read_licence(tmp_path / "model").files == {"LICENSE": b"mine"}


def absolute(snapshot: Path, secret: Path) -> Path:
    return secret


def relative(snapshot: Path, secret: Path) -> Path:
    return Path(os.path.relpath(secret, snapshot))


def through_a_link(snapshot: Path, secret: Path) -> Path:
    (snapshot / "step").symlink_to(secret)
    return Path("step")


def through_a_folder(snapshot: Path, secret: Path) -> Path:
    (snapshot / "up").symlink_to(secret.parent)
    return Path("up", secret.name)


def through_a_blob(snapshot: Path, secret: Path) -> Path:
    (snapshot.parents[1] / "blobs" / HASH).symlink_to(secret)
    return Path("..", "..", "blobs", HASH)


def through_all_blobs(snapshot: Path, secret: Path) -> Path:
    (snapshot.parents[1] / "blobs").rmdir()
    (snapshot.parents[1] / "blobs").symlink_to(secret.parent)
    secret.rename(secret.with_name(HASH))
    return Path("..", "..", "blobs", HASH)


def beside_the_blobs(snapshot: Path, secret: Path) -> Path:
    return blob(snapshot, "id_rsa", SECRET)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "aim",
    [absolute, relative, through_a_link, through_a_folder, through_a_blob, through_all_blobs, beside_the_blobs],
)
def test_a_link_out_of_the_folder_is_refused_by_name(
    snapshot: Path, name: str, aim: Callable[[Path, Path], Path], tmp_path: Path
) -> None:
    (snapshot / name).symlink_to(aim(snapshot, tmp_path / "id_rsa"))
    assert SECRET in (snapshot / name).read_text()
    with pytest.raises(InputRefused, match="is a link to") as found:
        read(snapshot, name)
    assert str(snapshot / name) in str(found.value)
    assert SECRET not in str(found.value)


def test_blobs_beside_any_other_folder_are_refused(snapshot: Path) -> None:
    blob(snapshot)
    other = snapshot.parents[1] / "other" / "c0ffee"
    other.mkdir(parents=True)
    linked(other, "LICENSE")
    with pytest.raises(InputRefused, match="outside the model folder"):
        read_licence(other)


def test_a_link_to_nothing_is_refused_when_asked(snapshot: Path) -> None:
    (snapshot / "LICENSE").symlink_to("LICENSE")
    with pytest.raises(InputRefused, match="is a link to nothing"):
        check_link(snapshot / "LICENSE")
    assert read_licence(snapshot).files == {}  # no file, so nothing to carry
