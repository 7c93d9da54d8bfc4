"""Every example that is a command ends as `age-vlm` does: one sentence for its user, a traceback for a fault of ours."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from age_vlm.errors import UserError


EXAMPLES = Path(__file__).parents[2] / "examples"
COMMANDS = [path.stem for path in sorted(EXAMPLES.glob("*.py")) if "ArgumentParser(" in path.read_text("utf-8")]
ARGUMENTS = {
    "ablation_label_maps": ["--images", "a", "--labels", "b", "--classes", "sky"],
    "ablation_photographs": ["--images", "a", "--instances", "b"],
    "offline_parts": ["components"],
    "train_tiny_sam": ["--output", "out"],
}


@pytest.fixture(params=COMMANDS)
def command(request, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    yield importlib.import_module(request.param)
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == EXAMPLES:
            del sys.modules[name]


def test_there_are_some():
    assert {"lora_finetune", "stages", "teacher_masks", "train_tiny_sam"} <= set(COMMANDS)


def test_errors_of_its_user_and_of_ours(command, monkeypatch, capsys):
    def raising(error):
        def run(options):
            raise error

        return run

    arguments = ARGUMENTS.get(command.__name__, [])
    monkeypatch.setattr(command, "run", raising(UserError("--work: got x,\nexpected y.")))
    assert command.main(arguments) == 2
    assert capsys.readouterr().err == f"{command.__name__}: --work: got x, expected y.\n"
    for error in (ValueError, OSError, RuntimeError):
        monkeypatch.setattr(command, "run", raising(error("a fault")))
        with pytest.raises(error, match="a fault"):
            command.main(arguments)
    monkeypatch.setattr(command, "run", lambda options: None)
    assert command.main(arguments) == 0


def test_what_an_example_tells_its_user_is_a_user_error():
    for path in EXAMPLES.glob("*.py"):
        assert not re.search(r"raise (ValueError|SystemExit)|except ValueError", path.read_text("utf-8")), path
