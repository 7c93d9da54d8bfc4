"""What is in a run folder and is not the run's own stays, whatever becomes of the run."""

import json

import pytest

from age_vlm.commands.recipe import DataRecipe, Recipe, TrainingRecipe
from age_vlm.commands.run_files import foreign_files, remove_run, remove_unfinished
from age_vlm.commands.run_folder import run_folder
from age_vlm.commands.train import run_recipe
from age_vlm.errors import UserError


OWN = (
    "recipe.yaml",
    "metrics.json",
    ".log.jsonl.abcd0123.part",
    "checkpoint/model.safetensors",
    "checkpoint/README.md",
    "examples/0.png",
    "tensorboard/events.out.tfevents.1.host",
    "trainer/checkpoint-3/whole",
    ".checkpoint.abcd0123.part/model.safetensors",
)
OTHERS = (
    ".git/config",
    ".env",
    ".recipe.yaml.swp",
    ".film.mkv.abcd0123.part",
    "notes.txt",
    "checkpoint/notes.txt",
    "checkpoint/.git/config",
    "examples/dog.png",
    "trainer/notes.txt",
    "trainer/checkpoint-mine/weights",
    "adapter/data/a.csv",
)


def put(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def content(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_what_is_ours_goes_and_all_else_stays(tmp_path):
    put(tmp_path / "run", (*OWN, *OTHERS))
    remove_run(tmp_path / "run")
    assert set(content(tmp_path / "run")) == set(OTHERS)
    put(tmp_path / "whole", OWN)
    remove_run(tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_with_something_else_in_it_is_not_replaced(tmp_path, name):
    put(tmp_path / "run", (*OWN, name))
    before = content(tmp_path)
    with pytest.raises(UserError, match="also holds '.*', which is no part of a run, and is not replaced even with"):
        with run_folder(tmp_path / "run", overwrite=True):
            pytest.fail("was entered")
    assert content(tmp_path) == before
    (path,) = foreign_files(tmp_path / "run")
    assert name.startswith(str(path.relative_to(tmp_path / "run")))


@pytest.mark.parametrize("earlier", [True, False])
def test_what_is_put_there_while_it_runs_outlasts_its_failure(tmp_path, earlier):
    if earlier:
        put(tmp_path / "run", ("recipe.yaml", "examples/0.png"))
    before = content(tmp_path)
    with pytest.raises(RuntimeError):
        with run_folder(tmp_path / "run", overwrite=earlier) as folder:
            put(folder, ("recipe.yaml", "examples/1.png", "notes.txt", "examples/dog.png"))
            raise RuntimeError
    added = {"run/notes.txt": "notes.txt", "run/examples/dog.png": "examples/dog.png"}
    assert content(tmp_path) == before | added
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_folders_that_are_only_named_alike_are_not_taken_for_earlier_runs(tmp_path):
    names = [".run.earlier-notes/a.txt", ".run.earlier.part/a.txt", ".runs.earlier.abcd0123.part/a.txt"]
    put(tmp_path, [*names, ".run.earlier.abcd0123.part/recipe.yaml", ".run.earlier.abcd4567.part/notes.txt"])
    with run_folder(tmp_path / "run", overwrite=False) as folder:
        put(folder, ["recipe.yaml"])
    assert set(content(tmp_path)) == {*names, ".run.earlier.abcd4567.part/notes.txt", "run/recipe.yaml"}


def test_only_what_was_being_written_is_cleared_away(tmp_path):
    put(tmp_path, (*OWN, *OTHERS))
    remove_unfinished(tmp_path)
    assert set(content(tmp_path)) == {*OWN, *OTHERS} - {name for name in OWN if name.startswith(".")}


def test_a_resumed_run_keeps_what_its_user_put_beside_it(tmp_path):
    recipe = Recipe(
        data=DataRecipe(train=4, validation=1, test=2), training=TrainingRecipe(steps=1, batch_size=2, log_every=1)
    )
    put(tmp_path / "run", [name for name in OTHERS if not name.startswith("adapter")])
    before = content(tmp_path / "run")
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.to_yaml())
    run_recipe(recipe, tmp_path / "run", resume=True, progress=False)
    for _ in range(2):
        after = {name: (tmp_path / "run" / name) for name in before}
        assert {name: path.read_text() for name, path in after.items() if path.is_file()} == before
        run_recipe(recipe, tmp_path / "run", resume=True, progress=False)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"]


def test_a_run_begun_before_a_key_was_new_is_resumed(tmp_path):
    from age_vlm.commands.run_folder import check_same_recipe

    recipe = Recipe()
    lines = [line for line in recipe.to_yaml().splitlines() if "license" not in line]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    check_same_recipe(tmp_path, recipe)
    with pytest.raises(UserError, match="seed: 0 there, 1 here"):
        check_same_recipe(tmp_path, Recipe(seed=1))
