"""The ablation on photographs with masks: runs, and a table for each length of training with a column for each arm."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


EXAMPLES = Path(__file__).parents[2] / "examples"
CLASSES = ("sky", "road", "car")


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location("ablation_label_maps", EXAMPLES / "ablation_label_maps.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """Arguments that name twenty frames, sky over road with a car on it, and a recipe of few of their crops."""
    folder = tmp_path_factory.mktemp("maps")
    rng = np.random.default_rng(0)
    for part in ("images", "labels"):
        (folder / part).mkdir()
    for number in range(20):
        labels = np.zeros((60, 80), np.uint8)
        labels[30:] = 1
        labels[36:50, 10 + number : 30 + number] = 2
        image = 80 * labels[..., None] + rng.integers(0, 60, (60, 80, 3))
        Image.fromarray(image.astype(np.uint8)).save(folder / "images" / f"{number:02}.png")
        Image.fromarray(labels).save(folder / "labels" / f"{number:02}.png")
    overrides = ["data.crop=[64,48]", "model.image_size=[48,64]", "data.validation=4", "data.crops_per_frame=4"]
    return [
        *("--images", str(folder / "images"), "--labels", str(folder / "labels"), "--classes", *CLASSES),
        *("--small", "Car", "--set", *overrides, "training.batch_size=2"),
    ]


def test_each_length_has_a_table_and_finished_runs_stay(example, words, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ablation_label_maps.py", *words, *map(str, arguments)])
        assert example.main() == 0

    work, output = tmp_path / "work", tmp_path / "output"
    work.mkdir()
    for arm in ("cross-attention", "alignment"):
        for steps in (1, 2):
            run("--run", work / f"{arm}-3-{steps}.json", "--arms", arm, "--seeds", 3, "--steps", steps)
    written = {path: path.read_bytes() for path in work.glob("*.json")}
    assert len(written) == 4
    # Were one of these not taken for finished, its run would be a process of minutes.
    run("--work", work, "--output", output, "--arms", "cross-attention", "alignment", "--seeds", 3, "--steps", 1, 2)
    assert written == {path: path.read_bytes() for path in work.glob("*.json")}

    for steps in (1, 2):
        with next(output.glob(f"label-maps-{steps}-steps-*.csv")).open(newline="") as file:
            rows = {row["arm"]: row for row in csv.DictReader(file)}
        prior = rows.pop("text-only class prior")
        assert list(rows) == ["cross-attention", "alignment"]
        for arm, row in rows.items():
            record = json.loads((work / f"{arm}-3-{steps}.json").read_text())
            assert record["recipe"]["training"]["steps"] == steps
            assert (record["recipe"]["alignment"]["weight"] > 0) == (arm == "alignment")
            assert float(row["macro AUC"]) == pytest.approx(record["test"]["macro AUC"], abs=1e-4)
            pointing = record["test"]["pointing by class"]["car"]
            assert float(row["pointing, mean over small classes"]) == pytest.approx(pointing, abs=1e-4)
            assert 0 < float(row["minutes"]) < 5
    # Within a class the prior is one number: it orders nothing.
    assert float(prior["macro AUC"]) == 0.5
    assert "| macro AUC |" in capsys.readouterr().out


def test_seeds_are_paired(example, words):
    """Arms of one seed see the same crops, and differ in the weight of the alignment or whose masks they get."""
    images, labels = words[1], words[3]
    folders = [f"data.images={images}", f"data.labels={labels}", f"data.classes={json.dumps(CLASSES)}"]
    recipe = example.load_recipe(EXAMPLES / "recipes" / "label_maps.yaml", folders + words[words.index("--set") + 1 :])
    arms = {arm: example.arm_recipe(recipe, arm, 5) for arm in example.ARMS[1:]}
    first = [example.load_source(arm.data, arm.seed).train[7] for arm in arms.values()]
    assert len(first) == 3
    for sample in first[1:]:
        assert sample["messages"] == first[0]["messages"]
        assert np.array_equal(sample["images"][0], first[0]["images"][0])
    masks = [[grounding["mask"] for grounding in sample["groundings"]] for sample in first]
    assert masks[0] == masks[1] != masks[2]
    assert {arm.alignment.weight for arm in arms.values()} == {0.0, recipe.alignment.weight}
