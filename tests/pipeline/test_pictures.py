"""A picture is the same file from any release, and there whole or as it was."""

from pathlib import Path

import pytest

from pipeline.pictures import new_figure, write_figure

pytest.importorskip("matplotlib")


def test_the_writer_is_not_named(tmp_path: Path) -> None:
    figure, panels = new_figure(2, 3, (3, 2), share_y="row")
    assert [len(row) for row in panels] == [3, 3]
    write_figure(tmp_path / "a.png", figure, dots=50)
    content = (tmp_path / "a.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert int.from_bytes(content[16:20]) == 150  # the width, in pixels
    assert b"Software" not in content


def test_a_picture_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"before")
    figure, panels = new_figure(1, 1, (3, 2))
    panels[0][0].set_xlabel(r"$\frac$")
    with pytest.raises(ValueError, match="frac"):
        write_figure(tmp_path / "a.png", figure, dots=50)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"before"
