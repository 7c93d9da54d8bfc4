"""The ablation on photographs with instances: arms that differ in nothing else, and a table that says what was measured."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from age_vlm.data.questions import EvaluationItem, Question


EXAMPLES = Path(__file__).parents[2] / "examples"
ARMS = ("cross-attention", "alignment", "alignment, masks of others")


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location("ablation_photographs", EXAMPLES / "ablation_photographs.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module


@pytest.fixture
def words(coco_rectangles, tmp_path) -> list[str]:
    """Arguments that name forty photographs and a recipe of a tiny model."""
    recipe = {
        "model": {"preset": "age-vlm-tiny", "image_size": 64},
        "data": {"kind": "coco", "images": "-", "instances": "-", "texts": ["presence"], "held_out": 0.5, "train": 64},
        "training": {
            "steps": 2, "batch_size": 2, "vision": "frozen", "shared_prefix": True, "save_parts": "new", "evaluate_every": 9,
        },
        "alignment": {"layers": [0]},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return [
        *("--images", str(coco_rectangles["images"]), "--instances", str(coco_rectangles["instances"])),
        *(
            "--recipe",
            str(tmp_path / "recipe.yaml"),
            "--work",
            str(tmp_path / "work"),
            "--output",
            str(tmp_path / "out"),
        ),
    ]


def test_all_arms_are_one_table_and_finished_runs_stay(example, words, tmp_path, capsys):
    work = tmp_path / "work"
    work.mkdir()
    for arm in ARMS:
        assert example.main([*words, "--run", str(work / f"{arm.replace(', ', '-').replace(' ', '-')}-3-2.json"),
                             "--arms", arm, "--seeds", "3"]) == 0  # fmt: skip
    written = {path: path.read_bytes() for path in work.glob("*.json")}
    assert len(written) == 3
    # Were one of these not taken for finished, its run would be a process of minutes.
    assert example.main([*words, "--arms", *ARMS, "--seeds", "3"]) == 0
    assert written == {path: path.read_bytes() for path in work.glob("*.json")}
    with next((tmp_path / "out").glob("photographs-2-steps-*.csv")).open(newline="") as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(ARMS)
    for row in rows.values():
        for mode in ("random", "popular", "adversarial"):
            auc, blank = float(row[f"AUC {mode}"]), float(row[f"AUC {mode}, blank image"])
            assert float(row[f"AUC {mode}, drop on a blank image"]) == pytest.approx(auc - blank, abs=2e-4)
            assert 0 < float(row[f"AUC {mode}, 95 % +-"]) < 0.5
            assert row[f"AUC {mode}, validation"]
        assert int(row["trained parameters"]) > 0 and row["pointing"] and row["pointing, chance"]
    records = {path.stem: json.loads(text) for path, text in written.items()}
    assert {record["recipe"]["data"]["masks"] for record in records.values()} == {"own", "other"}
    # All arms of a seed ask the encoder about the same crops.
    assert list((work / "encoder").rglob("*.safetensors"))
    assert "| AUC adversarial |" in capsys.readouterr().out


def test_the_interval_is_of_photographs(example):
    """With one photograph there is nothing to draw; with copies of two that disagree it is wide."""

    def item(**answers):
        asked = (Question(id, "1", f"{id}?", answer, "existence", "random") for id, answer in answers.items())
        return EvaluationItem("1", Image.new("RGB", (4, 4)), tuple(asked))

    one = [item(a="yes", b="no", c="no")]
    assert example.half_interval({"a": 1, "b": 0, "c": 2}, one, "random") == 0
    two = [item(a="yes", b="no"), item(c="yes", d="no")]
    assert example.half_interval({"a": 1, "b": 0, "c": 0, "d": 1}, two, "random") == pytest.approx(0.5)
