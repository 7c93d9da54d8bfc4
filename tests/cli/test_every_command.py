"""Arguments, faults of ours, and what is printed, whatever the command."""

import re

import pytest

from age_vlm.cli import main


def test_arguments_that_are_missing(capsys):
    stray = [
        ["ground", "data"],
        ["ask", "what ?", "--image", "a.png", "more"],
        ["train", "recipe.yaml", "--outptu", "out"],
    ]
    for arguments in ([], ["ask", "what ?"], ["trian", "recipe.yaml"], *stray):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert "usage:" in capsys.readouterr().err


def test_overrides_may_stand_anywhere(capsys, recipe, refused):
    words = "training.steps: got 0"
    refused(capsys, ["train", recipe, "training.steps=0", "--output", "out"], words)
    refused(capsys, ["train", recipe, "--output", "out", "training.steps=0"], words)
    refused(capsys, ["train", "--output", "out", recipe, "training.steps=0", "--overwrite"], words)
    refused(capsys, ["demo", "--output", "out", "training.steps=0"], words)


@pytest.mark.parametrize("error", [RuntimeError, ValueError, OSError, FileNotFoundError])
def test_a_fault_of_ours_keeps_its_traceback(recipe, monkeypatch, error):
    def broken(options):
        raise error("no error of the user's")

    monkeypatch.setattr("age_vlm.cli._train", broken)
    with pytest.raises(error, match="no error of the user's"):
        main(["train", str(recipe)])


def test_debug_shows_where_an_error_comes_from(capsys):
    for arguments in (
        ["--debug", "train", "none.yaml"],
        ["train", "--debug", "none.yaml"],
        ["train", "none.yaml", "--debug"],
    ):
        assert main(arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith("Traceback") and lines[-1].startswith("age-vlm: recipe: 'none.yaml'")
    assert main(["train", "none.yaml"]) == 2 and "Traceback" not in capsys.readouterr().err


def test_names_are_printed_as_they_are(capsys, scenes, recipe, tmp_path, short):
    name = "[bold]out[1]:smile:"
    assert main(["ground", scenes, "--teacher", "annotated", "--output", name]) == 0
    printed = capsys.readouterr().out
    assert f"Report: {name}/report.html" in printed and f'load_dataset("{name}", split="train")' in printed
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "[red]a.yaml").write_text("name: '[dim]short'\n")
    assert main(["pipeline", "recipes", *short, "--output", name + "2"]) == 0
    printed = capsys.readouterr().out
    assert "[red]a: started" in printed and f"Checkpoint: {name}2/[red]a/checkpoint" in printed
    assert re.search(r"metric .* \[red\]a", printed)
