import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from PIL import Image

from age_vlm.cli import main


@pytest.mark.parametrize(
    "override, words",
    [
        ("model.preset=age-vlm-tinny", "model.preset: got 'age-vlm-tinny', .*nearest: 'age-vlm-tiny'"),
        ("alignment.form=nil", "alignment.form: got 'nil', .*nearest: 'nll'"),
        ("training.learning_rat=1", "training.learning_rat: unknown key, .*nearest: 'learning_rate'"),
        ("alignment.layers=[7]", "alignment.layers: got 7"),
        ("model.config={cross_attention_layer: [1]}", "cross_attention_layer: unknown option"),
        ("model.checkpoint=previous", "model.checkpoint: got 'previous', expected a folder or Hub id"),
        (
            "data={kind: dataset, path: nowhere}",
            "data.path: 'nowhere' .a Hub id, and no folder here. cannot be loaded as a data set",
        ),
        ("model.checkpoint=nowhere", "model.checkpoint: 'nowhere' could not be loaded"),
        ("data.kind=label_maps", "data: kind 'label_maps' needs images, labels and classes"),
        ("seed", "override: got 'seed'"),
    ],
)
def test_train_refuses_and_leaves_nothing(capsys, recipe, tmp_path, override, words, short, files, refused):
    refused(capsys, ["train", recipe, *short, override], words)
    assert list(files(tmp_path)) == [tmp_path / "recipe.yaml"]


def test_a_device_that_is_too_small(capsys, recipe, monkeypatch, refused):
    def train(options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 1 GiB.")

    monkeypatch.setattr("age_vlm.cli._train", train)
    refused(
        capsys, ["train", str(recipe)], "CUDA out of memory; expected less than the device has: .*training.batch_size"
    )


def test_train_without_a_recipe(capsys, refused):
    refused(capsys, ["train", "none.yaml"], "recipe: 'none.yaml' is not a file")


def test_label_maps_of_another_size(capsys, recipe, tmp_path, refused):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for number in range(4):
        Image.new("RGB", (64, 48)).save(tmp_path / "images" / f"{number}.png")
        Image.new("L", (48, 64)).save(tmp_path / "labels" / f"{number}.png")
    data = ["data.kind=label_maps", "data.images=images", "data.labels=labels", "data.classes=[sky, road]"]
    refused(capsys, ["train", recipe, *data], "48")


def test_a_run_folder_is_only_replaced_when_asked(capsys, recipe, tmp_path, short, files, refused):
    arguments = ["train", recipe, *short, "--output", "out"]
    assert main([*arguments, "--resume"]) == 0  # there is nothing to resume yet: it starts
    printed = capsys.readouterr().out
    assert "Report: out/report.html" in printed and "pope/adversarial/accuracy" in printed
    before = files(tmp_path / "out")
    assert main([*arguments, "--resume"]) == 0
    assert printed.endswith(capsys.readouterr().out)
    refused(
        capsys,
        [*arguments, "--resume", "seed=1"],
        "run folder: 'out' belongs to a different recipe .seed: 0 there, 1 here.",
    )
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--resume", "--overwrite"])
    assert ended.value.code == 2 and "not allowed with argument" in capsys.readouterr().err
    refused(capsys, arguments, "run folder: 'out' exists")
    # One that fails on its way, however far it came, leaves the earlier one.
    refused(capsys, [*arguments, "alignment.layers=[9]", "--overwrite"], "alignment.layers: got 9")
    assert files(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml"]


FULL = textwrap.dedent(
    """
    import resource, sys
    from age_vlm.cli import main

    # Files that grow beyond this fail to be written, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
    sys.exit(main(sys.argv[2:]))
    """
)


def test_no_space_left_keeps_the_earlier_run(recipe, checkpoint, tmp_path, short, files):
    earlier = tmp_path / "out"
    earlier.mkdir()
    (earlier / "recipe.yaml").write_text("name: earlier\n")
    os.rename(checkpoint, earlier / "checkpoint")
    try:
        before = files(earlier)
        size = (earlier / "checkpoint" / "model.safetensors").stat().st_size
        arguments = ["train", recipe, *short, "--output", "out", "--overwrite"]
        done = subprocess.run(
            [sys.executable, "-c", FULL, str(size // 2), *arguments],
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert re.match("age-vlm: checkpoint: .* could not be written: ", done.stderr.splitlines()[-1])
        assert files(earlier) == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml"]
    finally:
        os.rename(earlier / "checkpoint", checkpoint)
