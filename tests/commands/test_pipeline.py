from pathlib import Path

import pytest
import torch

from age_vlm.commands.pipeline import load_stages, run_stages
from age_vlm.commands.recipe_file import load_recipe
from age_vlm.modeling_agevlm.components_agevlm import COMPONENTS


RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
PATHS = {f"stage{n}:data.path": f"some/data{n}" for n in (1, 2, 3, 4)}
PATHS |= {f"stage{n}:mix.0.path": "some/captions" for n in (2, 3, 4)}
SHORT = """
data: {train: 4, validation: 1, test: 1, texts: [caption, existence]}
training: {steps: 2, batch_size: 2, save_every: 1}
"""


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """With several, the same sums may come out differently from one time to the next on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "b.yaml").write_text(f"name: second\nmodel: {{checkpoint: previous}}\n{SHORT}")
    (folder / "a.yml").write_text(f"name: first\n{SHORT}")
    (folder / "notes.txt").write_text("not a recipe")
    return folder


def test_the_stages_of_the_1b_model_are_those_of_the_paper():
    stages = load_stages(RECIPES / "age-vlm-1b", [f"{key}={value}" for key, value in PATHS.items()])
    assert list(stages) == ["stage1", "stage2", "stage3", "stage4"]
    trained = [{part for part in COMPONENTS if recipe.training.modes[part] != "frozen"} for recipe in stages.values()]
    assert trained[0] == trained[1] == {"projector", "cross_attention"}
    assert trained[2] == {*trained[0], "vision"} and trained[3] == set(COMPONENTS)
    assert [recipe.alignment.weight > 0 for recipe in stages.values()] == [False, True, True, True]
    assert stages["stage4"].training.language_model == "lora"
    for number, (name, recipe) in enumerate(stages.items(), start=1):
        assert (recipe.model.checkpoint == "previous") == (number > 1)
        assert (recipe.data.kind, recipe.data.path) == ("dataset", f"some/data{number}"), name
        assert [part.path for part in recipe.mix] == ["some/captions"] * (number > 1)
        assert recipe.training.precision == "bf16" and recipe.training.gradient_checkpointing
    first = stages["stage1"].model
    assert (first.text, first.dtype) == ("meta-llama/Llama-3.2-1B", "float32")
    with pytest.raises(ValueError, match="^stage1.yaml: data.path: got none"):
        load_stages(RECIPES / "age-vlm-1b")


def test_the_stages_of_the_default_come_in_order_and_keep_captions():
    stages = load_stages(RECIPES / "scenes", ["stage2:training.steps=7", "training.batch_size=3"])
    assert list(stages) == ["stage1", "stage2", "stage3", "stage4"]
    assert [recipe.warm_start.steps > 0 for recipe in stages.values()] == [True, False, False, False]
    assert all("caption" in recipe.data.texts for recipe in stages.values())
    assert stages["stage2"].training.steps == 7 != stages["stage3"].training.steps
    assert {recipe.training.batch_size for recipe in stages.values()} == {3}


@pytest.mark.parametrize(
    "name, text, overrides, words",
    [
        ("c.yaml", "training: {step: 1}", [], "^c.yaml: training.step: unknown key"),
        ("c.yaml", "", ["d:seed=1"], "^override: 'd:seed=1' is for 'd', expected one of a, b, c"),
        ("c.yaml", "", ["c:seed"], "^c.yaml: override: got 'seed', expected section.key=value"),
        ("a.yaml", "", [], "has two files of one name"),
        (
            "0.yaml",
            "model: {checkpoint: previous}",
            [],
            "^0.yaml: model.checkpoint: got 'previous', .*no recipe is before",
        ),
    ],
)
def test_all_recipes_are_checked_before_the_first_starts(folder, name, text, overrides, words):
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        load_stages(folder, overrides)
    assert "\n" not in str(caught.value)


def test_folders_without_recipes(tmp_path):
    with pytest.raises(ValueError, match="has no YAML files"):
        load_stages(tmp_path)
    with pytest.raises(ValueError, match="is not a folder, expected one with a YAML file for each stage"):
        load_stages(tmp_path / "none")


def test_stages_go_on_from_one_another_and_from_where_they_stopped(folder, tmp_path):
    stages, output, told = load_stages(folder), tmp_path / "out", []

    def run(stages, **options):
        told.clear()
        return run_stages(stages, output, on_stage=lambda *news: told.append(news), progress=False, **options)

    metrics = run(stages)
    assert told == [("a", "started"), ("b", "started")] and list(metrics) == ["a", "b"]
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert run(stages) == metrics
    assert told == [("a", "complete already"), ("b", "complete already")]
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before

    # As if the second had been stopped at its end.
    weights = (output / "b" / "checkpoint" / "model.safetensors").read_bytes()
    (output / "b" / "report.html").unlink()
    assert run(stages) == metrics
    assert told == [("a", "complete already"), ("b", "resumed")]
    assert (output / "b" / "checkpoint" / "model.safetensors").read_bytes() == weights
    # Wherever the folder is moved to.
    assert load_recipe(output / "b" / "recipe.yaml").to_yaml() == stages["b"].to_yaml()

    changed = load_stages(folder, ["b:training.steps=3"])
    with pytest.raises(
        ValueError, match=r"^b: run folder: '.*b' belongs to a different recipe .training.steps: 2 there, 3 here"
    ):
        run(changed)
    (output / "a" / "report.html").unlink()
    with pytest.raises(ValueError, match="^b: '.*b' was not made from '.*a', which is not complete"):
        run(stages)
    missing = load_stages(folder, ["b:data.kind=dataset", "b:data.path=x/y/z", "b:data.texts=null"])
    with pytest.raises(ValueError, match="^b: data.path: 'x/y/z' is not a folder"):
        run_stages(missing, tmp_path / "other", progress=False)
    assert not told and not (tmp_path / "other").exists()
