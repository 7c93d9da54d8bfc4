import pytest

from age_vlm.whole_files import replaced, write_whole


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    with replaced(path) as file:
        file.write(b"one")
        assert not path.exists()
    with pytest.raises(RuntimeError), replaced(path) as file:
        file.write(b"two")
        raise RuntimeError
    assert path.read_bytes() == b"one" and list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o444 == 0o444
    write_whole(path, "zwei Hüte")
    assert path.read_text("utf-8") == "zwei Hüte"
