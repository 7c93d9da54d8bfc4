import pytest

from age_vlm.atomic_files import replaced
from age_vlm.commands.run_files import last_checkpoint
from age_vlm.commands.run_folder import check_run_folder, check_same_recipe, run_folder
from age_vlm.training.loss_watch import BAD_BATCHES


def earlier_run(folder):
    folder.mkdir()
    (folder / "recipe.yaml").write_text("name: earlier")
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "model.safetensors").write_bytes(b"earlier weights")


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_run_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("new", "deep/new", "empty"):
        with run_folder(tmp_path / name, overwrite=False) as folder:
            (folder / "recipe.yaml").write_text("name: new")
        assert content(tmp_path / name)


def test_an_earlier_run_is_replaced_only_when_asked_and_only_by_a_whole_one(tmp_path):
    earlier_run(tmp_path / "run")
    before = content(tmp_path)
    with pytest.raises(ValueError, match="^run folder: '.*run' exists, expected a new one .or --overwrite"):
        with run_folder(tmp_path / "run", overwrite=False):
            pytest.fail("was entered")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            with run_folder(tmp_path / "run", overwrite=True) as folder:
                (folder / "recipe.yaml").write_text("name: new")
                (folder / "metrics.json").write_text("{}")
                raise error
        assert content(tmp_path) == before
    with run_folder(tmp_path / "run", overwrite=True) as folder:
        assert not content(folder)
        (folder / "recipe.yaml").write_text("name: new")
    assert list(content(tmp_path).values()) == [b"name: new"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_that_can_be_resumed_stays_and_is_continued(tmp_path):
    def begin(step):
        with run_folder(tmp_path / "run", overwrite=False, resume=True) as folder:
            (folder / "recipe.yaml").write_text("name: new")
            whole = folder / "trainer" / f"checkpoint-{step}"
            whole.mkdir(parents=True)
            (whole / "whole").touch()
            raise KeyboardInterrupt

    for step in (2, 10):
        with pytest.raises(KeyboardInterrupt):
            begin(step)
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-10"
    # The run that it was to replace, had it not been killed.
    earlier_run(tmp_path / "earlier")
    (tmp_path / "earlier").rename(tmp_path / ".run.earlier.abcd0123.part")
    with run_folder(tmp_path / "run", overwrite=False, resume=True) as folder:
        assert (folder / "recipe.yaml").read_text() == "name: new"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    with pytest.raises(ValueError, match="exists, expected a new one .or --overwrite to replace it, --resume to cont"):
        check_run_folder(tmp_path / "run", overwrite=False)
    (tmp_path / "thesis").mkdir()
    # What a process leaves that was killed while it wrote the first file of a run.
    with pytest.raises(KeyboardInterrupt), replaced(tmp_path / "thesis" / "recipe.yaml"):
        (unfinished,) = (tmp_path / "thesis").iterdir()
        raise KeyboardInterrupt
    unfinished.touch()
    check_run_folder(tmp_path / "thesis", overwrite=False, resume=True)
    (tmp_path / "thesis" / "draft.txt").touch()
    with pytest.raises(ValueError, match="holds no run, expected one to resume"):
        check_run_folder(tmp_path / "thesis", overwrite=False, resume=True)


def test_what_is_no_run_is_never_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "draft.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    before = content(tmp_path)
    for name in ("thesis", "file"):
        with pytest.raises(ValueError, match="holds no earlier run, and is not replaced even with --overwrite"):
            with run_folder(tmp_path / name, overwrite=True):
                pytest.fail("was entered")
    assert content(tmp_path) == before


def test_the_ids_of_a_bad_batch_outlast_the_run_that_failed_of_it(tmp_path):
    for overwrite in (False, True):
        with pytest.raises(ValueError):
            with run_folder(tmp_path / "run", overwrite=overwrite) as folder:
                (folder / "recipe.yaml").write_text("name: later" if overwrite else "name: first")
                (folder / BAD_BATCHES).write_text(str(overwrite))
                raise ValueError
        assert (tmp_path / "run" / "recipe.yaml").read_text() == "name: first"
        assert (tmp_path / "run" / BAD_BATCHES).read_text() == str(overwrite)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_that_failed_early_leaves_nothing_a_later_one_its_metrics(tmp_path):
    for done, left in (([], []), (["metrics.json"], ["metrics.json", "recipe.yaml"])):
        with pytest.raises(RuntimeError):
            with run_folder(tmp_path / "run", overwrite=False) as folder:
                for name in ("recipe.yaml", *done):
                    (folder / name).write_text("{}")
                raise RuntimeError
        assert sorted(path.name for path in tmp_path.rglob("*.*") if path.is_file()) == left


def test_a_run_may_be_resumed_with_another_answer_to_bad_steps(tmp_path, recipe_of):
    begun = recipe_of(training={"non_finite": "stop"})
    (tmp_path / "recipe.yaml").write_text(begun.to_yaml())
    check_same_recipe(tmp_path, recipe_of(training={"non_finite": "skip", "spike_threshold": 3.0}))
    with pytest.raises(ValueError, match=r"belongs to a different recipe \(training.packing: False there, True here\)"):
        check_same_recipe(tmp_path, recipe_of(training={"packing": True, "non_finite": "skip"}))
