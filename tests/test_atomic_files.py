import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from age_vlm.atomic_files import beside, replaced, unfinished, write_whole


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    with replaced(path) as file:
        file.write(b"one")
        assert not path.exists()
    with pytest.raises(RuntimeError), replaced(path) as file:
        file.write(b"two")
        raise RuntimeError
    assert path.read_bytes() == b"one" and list(tmp_path.iterdir()) == [path]
    write_whole(path, "zwei Hüte")
    assert path.read_text("utf-8") == "zwei Hüte"


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002])
def test_the_mode_is_that_of_any_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "ours", "text")
        (tmp_path / "plain").write_text("text")
        assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
        # One that is there keeps its own, as with `open`.
        (tmp_path / "ours").chmod(0o640)
        write_whole(tmp_path / "ours", "other text")
        assert (tmp_path / "ours").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(name=NAMES.filter(lambda name: name not in (".", "..")), kind=st.sampled_from(["", "old."]), other=NAMES)
def test_what_is_left_of_a_file_is_known_by_its_name(tmp_path_factory, name, kind, other):
    folder = tmp_path_factory.mktemp("files")
    part = beside(folder / name, kind)
    for path in (part, folder / f".{other}", folder / f"{other}.part", folder / f".{other}.part"):
        path.touch()
    assert unfinished(folder, [name], kind) == [part]
    assert not unfinished(folder, [f"{name}x"], kind)
