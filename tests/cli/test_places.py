"""Every option that names a file or folder: missing, of the other kind, unreadable, not to be written."""

import os
import shlex
import shutil
import tempfile
from pathlib import Path

import pytest

from age_vlm.data.scene_datasets import to_dataset


@pytest.fixture
def places(tmp_path, image, recipe, checkpoint, monkeypatch):
    # pytest's own folder may be looked into by nobody but its owner.
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(tmp_path, folder, dirs_exist_ok=True)
        shutil.copytree(checkpoint, Path(folder) / "model")
        Path(folder).chmod(0o777)
        monkeypatch.chdir(folder)
        yield from _places(Path(folder))
        monkeypatch.chdir(tmp_path)


def _places(tmp_path):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "only.yaml").write_text("name: short\n")
    to_dataset("train", 3).save_to_disk(tmp_path / "scenes")
    for name in ("secret.yaml", "secret.png"):
        (tmp_path / name).write_text("name: short\n")
        (tmp_path / name).chmod(0)
    for name in ("secret", "locked"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.yaml").write_text("name: short\n")
    (tmp_path / "secret").chmod(0)
    (tmp_path / "locked").chmod(0o555)
    yield
    (tmp_path / "secret").chmod(0o755)
    (tmp_path / "locked").chmod(0o755)


PLACES = [
    ("train folder", "recipe: 'folder' is not a file"),
    ("train secret.yaml", "recipe: 'secret.yaml' could not be read: Permission denied"),
    ("train secret/a.yaml", "recipe: 'secret/a.yaml' could not be read: Permission denied"),
    ("train recipe.yaml --output file", "run folder: 'file' exists"),
    ("train recipe.yaml --output file/new", "run folder: 'file/new' cannot be a folder: .*file' is a file"),
    ("train recipe.yaml --output locked/new", "run folder: 'locked/new' cannot be written: .* does not allow it"),
    ("train recipe.yaml --output secret/new", "run folder: 'secret/new' could not be read: Permission denied"),
    ("demo --output locked/new", "run folder: 'locked/new' cannot be written"),
    ("demo --output file/new --resume", "run folder: 'file/new' cannot be a folder"),
    ("train recipe.yaml model.checkpoint=folder", "model.checkpoint: 'folder' could not be loaded"),
    ("train recipe.yaml model.checkpoint=file", "model.checkpoint: 'file' could not be loaded"),
    ("train recipe.yaml model.checkpoint=secret", "model.checkpoint: 'secret' could not be loaded"),
    ("train recipe.yaml 'model={text: none/here, vision: none/here}'", "text: 'none/here' could not be loaded"),
    ("train recipe.yaml 'model={text: folder, vision: folder}'", "text: 'folder' could not be loaded"),
    ("train recipe.yaml 'data={kind: dataset, path: file}'", "data.path: 'file' .*cannot be loaded"),
    ("train recipe.yaml 'data={kind: dataset, path: folder}'", "data.path: 'folder' .*cannot be loaded"),
    ("train recipe.yaml 'data={kind: dataset, path: secret}'", "data.path: 'secret' .*cannot be loaded"),
    (
        "train recipe.yaml 'data={kind: label_maps, images: file, labels: folder, classes: [a]}'",
        "images: got .*, expected a folder",
    ),
    (
        "train recipe.yaml 'data={kind: label_maps, images: folder, labels: none, classes: [a]}'",
        "labels: got .*, expected a folder",
    ),
    (
        "train recipe.yaml 'data={kind: label_maps, images: secret, labels: folder, classes: [a]}'",
        "images: 'secret' could not be read",
    ),
    ("train recipe.yaml 'model.config={image_visibility: all}'", "image_visibility: got 'all'"),
    ("pipeline none --output new", "recipes: 'none' is not a folder"),
    ("pipeline file --output new", "recipes: 'file' is not a folder"),
    ("pipeline secret --output new", "recipes: 'secret' could not be read: Permission denied"),
    ("pipeline recipes --output file", "only: run folder: 'file/only' cannot be a folder"),
    ("pipeline recipes --output locked", "only: run folder: 'locked/only' cannot be written"),
    ("plan none.yaml", "recipe: 'none.yaml' is not a file"),
    ("plan folder", "recipes: 'folder' has no YAML files"),
    ("plan secret", "recipes: 'secret' could not be read"),
    ("plan secret.yaml", "recipe: 'secret.yaml' could not be read"),
    ("plan recipe.yaml --json none/plan.json", "--json: 'none/plan.json' is not in a folder that exists"),
    ("plan recipe.yaml --json folder", "--json: 'folder' is a folder"),
    ("plan recipe.yaml --json locked/plan.json", "--json: 'locked/plan.json' cannot be written"),
    ("plan recipe.yaml model.checkpoint=file", "model.checkpoint: 'file' could not be read"),
    ("plan recipe.yaml 'model={text: none/here, vision: none/here}'", "model.text: 'none/here' could not be loaded"),
    ("plan recipe.yaml 'model.config={image_visibility: all}'", "image_visibility: got 'all'"),
    ("ground none --teacher annotated", "data: 'none' .* cannot be loaded"),
    ("ground file --teacher annotated", "data: 'file' .* cannot be loaded"),
    ("ground secret --teacher annotated", "data: 'secret' .* cannot be loaded"),
    ("ground scenes --teacher sam2-transformers --model secret", "model: 'secret' cannot be loaded"),
    ("ground scenes --teacher sam2-transformers --model file", "model: 'file' cannot be loaded"),
    ("ground scenes --teacher annotated --output file", "output: 'file' cannot be a folder"),
    ("ground scenes --teacher annotated --output file/new", "output: 'file/new' cannot be a folder"),
    ("ground scenes --teacher annotated --output locked/new", "output: 'locked/new' cannot be written"),
    ("ask x --image folder", "images: 'folder' is not a file"),
    ("ask x --image secret.png", "images: 'secret.png' .*Permission denied"),
    ("ask x --image image.png --model file", "model: 'file' could not be loaded"),
    ("ask x --image image.png --model secret", "model: 'secret' could not be loaded"),
    ("ask x --image image.png --overlay folder", "--overlay: 'folder' is a folder"),
    ("ask x --image image.png --overlay locked/o.png", "--overlay: 'locked/o.png' cannot be written"),
    ("ask x --image image.png --overlay o.txt", "--overlay: got 'o.txt', expected the name of an image"),
]


@pytest.mark.parametrize("line, words", PLACES)
def test_what_is_wrong_with_a_place_is_one_sentence(capsys, places, line, words, refused):
    arguments = shlex.split(line)
    if arguments[0] == "ask" and "--model" not in arguments:
        arguments += ["--model", "model"]
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)  # what is not to be read is read by root
    try:
        refused(capsys, arguments, words)
    finally:
        if root:
            os.seteuid(0)
