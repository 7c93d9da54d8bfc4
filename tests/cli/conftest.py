"""What every command is given, and how it refuses."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from age_vlm.cli import main
from age_vlm.commands.build import build_model
from age_vlm.commands.recipe import DataRecipe, ModelRecipe
from age_vlm.commands.sources import load_source
from age_vlm.data.scene_datasets import to_dataset
from age_vlm.hub import save_checkpoint


SHORT = [
    "data.train=4",
    "data.validation=1",
    "data.test=2",
    "warm_start.steps=0",
    "training.steps=1",
    "training.batch_size=2",
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model, processor = build_model(ModelRecipe(), load_source(DataRecipe(train=1, validation=1, test=1), 0))
    return str(save_checkpoint(model, processor, tmp_path_factory.mktemp("model") / "checkpoint"))


@pytest.fixture
def image(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "image.png")
    return "image.png"


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: short\n")
    return "recipe.yaml"


@pytest.fixture
def scenes(tmp_path):
    to_dataset("train", 3).save_to_disk(tmp_path / "scenes")
    return "scenes"


def _files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def files():
    return _files


def _refused(capsys, arguments, words):
    """One sentence on standard error, exit code 2."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("age-vlm: ")]
    assert len(lines) == 1 and printed.err.splitlines()[-1] == lines[0]
    assert "Traceback" not in printed.err
    assert re.search(words, lines[0]), lines[0]
    assert lines[0].endswith(".") and not lines[0].endswith("..")
    return printed


@pytest.fixture(scope="session")
def refused():
    return _refused


@pytest.fixture(scope="session")
def short():
    """Overrides that make a run short."""
    return SHORT
