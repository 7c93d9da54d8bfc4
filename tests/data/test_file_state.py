"""Whether files have changed."""

import os

import pytest

from age_vlm.data.file_state import files_state


@pytest.fixture
def folder(tmp_path):
    for name in ("a.json", "images/1.jpg", "images/in/2.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    (tmp_path / "images/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/3.jpg").write_text("old")
    (tmp_path / "images/up").symlink_to(tmp_path / "images")
    (tmp_path / "images/nowhere").symlink_to(tmp_path / "none")
    return tmp_path


def rewritten(path, text):
    state = path.stat()
    path.write_text(text)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


CHANGES = {
    "other content": lambda folder: rewritten(folder / "images/in/2.jpg", "longer"),
    "other content of the same size": lambda folder: rewritten(folder / "images/1.jpg", "new"),
    "of the annotations": lambda folder: rewritten(folder / "a.json", "new"),
    "behind a link": lambda folder: rewritten(folder / "elsewhere/3.jpg", "new"),
    "time": lambda folder: os.utime(folder / "images/1.jpg", ns=(0, 0)),
    "one more": lambda folder: (folder / "images/in/4.jpg").touch(),
    "one less": lambda folder: (folder / "images/in/2.jpg").unlink(),
    "another name": lambda folder: (folder / "images/1.jpg").rename(folder / "images/5.jpg"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_of_a_file_is_noticed(folder, change):
    paths = [folder / "a.json", folder / "images"]
    before = files_state(paths)
    assert files_state(reversed(paths)) == before == files_state(map(str, paths))
    CHANGES[change](folder)
    assert files_state(paths) != before


def test_what_is_not_there_has_a_state():
    assert files_state(["nowhere/at/all"]) == files_state(["nowhere/at/all"])
