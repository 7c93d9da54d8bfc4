import os
import subprocess
import sys
import textwrap

import pytest
import torch

from age_vlm import hub
from age_vlm.hub import load_checkpoint, save_checkpoint


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_saved_checkpoint_is_whole_and_alone(make_model, processor, tmp_path):
    model = make_model()
    folder = save_checkpoint(model, processor, tmp_path / "deep" / "checkpoint", "# the card")
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]
    assert (folder / "README.md").read_text("utf-8") == "# the card"
    loaded, loaded_processor = load_checkpoint(folder)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert loaded_processor.chat_template == processor.chat_template
    assert os.stat(folder).st_mode & 0o055 == 0o055  # others may read it, as with any folder


def test_a_checkpoint_replaces_the_one_before(make_model, processor, tmp_path):
    save_checkpoint(make_model(seed=1), processor, tmp_path / "checkpoint", "# first")
    first = content(tmp_path)
    (tmp_path / "checkpoint" / "stale.txt").write_text("of the first")
    save_checkpoint(make_model(seed=2), processor, tmp_path / "checkpoint")
    second = content(tmp_path)
    assert "checkpoint/stale.txt" not in second and "checkpoint/README.md" not in second
    assert first["checkpoint/model.safetensors"] != second["checkpoint/model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


FULL = textwrap.dedent(
    """
    import resource, sys
    from age_vlm.hub import load_checkpoint, save_checkpoint

    model, processor = load_checkpoint(sys.argv[1])
    for name in sys.argv[2:]:
        limit, name = name.split(":")
        # Any file that grows beyond this fails to be written, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
        try:
            save_checkpoint(model, processor, name)
        except ValueError as error:
            print(error)
        else:
            print("saved")
    """
)


def test_no_space_left_leaves_the_checkpoint_before_byte_for_byte(make_model, processor, tmp_path):
    save_checkpoint(make_model(), processor, tmp_path / "checkpoint", "# before")
    before = content(tmp_path)
    sizes = sorted(len(data) for data in before.values())
    # The largest file, the weights, does not fit; then hardly any does.
    limits = [sizes[-1] - 1, 500]
    assert before["checkpoint/model.safetensors"] and len(before["checkpoint/model.safetensors"]) == sizes[-1]
    names = [f"{limit}:{tmp_path / name}" for limit in limits for name in ("checkpoint", "another")]
    command = [sys.executable, "-c", FULL, str(tmp_path / "checkpoint"), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line, name in zip(lines, ("checkpoint", "another") * 2):
        assert line.startswith(f"checkpoint: '{tmp_path / name}' could not be written: ")
        assert line.endswith("is unchanged.") == (name == "checkpoint")
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


class Refused:
    """A folder whose move into place fails, as on a file system that went away."""

    def __init__(self, error):
        self.error = error

    def rename(self, target):
        raise self.error


@pytest.mark.parametrize("error", [OSError(5, "went away"), KeyboardInterrupt()])
def test_a_move_that_fails_puts_the_checkpoint_before_back(tmp_path, error):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "weights").write_bytes(b"before")
    with pytest.raises(type(error)):
        hub._swap(Refused(error), folder)
    assert content(tmp_path) == {"checkpoint/weights": b"before"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_place_that_cannot_be_written_is_one_sentence(make_model, processor, tmp_path):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(ValueError, match="^checkpoint: '.*' could not be written: .*[^.][.]$"):
        save_checkpoint(make_model(), processor, tmp_path / "file" / "checkpoint")


def test_other_models_and_broken_files_are_one_sentence(make_model, processor, tmp_path):
    from transformers import LlamaForCausalLM

    model = make_model()
    LlamaForCausalLM(model.config.text_config).save_pretrained(tmp_path / "llama")
    broken = save_checkpoint(model, processor, tmp_path / "broken")
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    for name, words in (("llama", "it holds a model of type 'llama'"), ("broken", ""), ("none", "")):
        with pytest.raises(
            ValueError, match=f"^model: '.*{name}' could not be loaded as an AGE-VLM: .*{words}"
        ) as caught:
            load_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="unknown option"):
        load_checkpoint(tmp_path / "broken", cross_attention_layer=[1])
