import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import datasets
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


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys, arguments, words):
    """One sentence on standard error, exit code 2."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("age-vlm: ")]
    assert len(lines) == 1 and printed.err.splitlines()[-1] == lines[0]
    assert "Traceback" not in printed.err
    assert re.search(words, lines[0]), lines[0]
    assert lines[0].endswith(".") and not lines[0].endswith("..")
    return printed


# ask


def test_ask_prints_the_answer_and_paints_where_it_looked(capsys, checkpoint, image, tmp_path):
    arguments = ["ask", "--model", checkpoint, "--image", image, "is there a red circle ?"]
    assert main([*arguments, "--overlay", "overlay.png", "--max-new-tokens", "3"]) == 0
    printed = capsys.readouterr()
    assert printed.out.endswith("\n") and printed.out.count("\n") == 1
    with Image.open(tmp_path / "overlay.png") as sheet:
        assert sheet.width > 224


def broken_images(folder, image):
    whole = (folder / image).read_bytes()
    (folder / "text.png").write_text("no image at all")
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    Image.open(folder / image).save(folder / "whole.jpg")
    jpeg = (folder / "whole.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "empty.png").write_bytes(b"")


@pytest.mark.parametrize(
    "name, words",
    [
        ("none.png", "'none.png' is not a file"),
        (".", "'.' is not a file"),
        ("text.png", "'text.png' is not an image"),
        ("empty.png", "'empty.png' is not an image"),
        ("truncated.png", "'truncated.png' is damaged"),
        ("truncated.jpg", "'truncated.jpg' is damaged"),
    ],
)
def test_ask_about_a_broken_image(capsys, checkpoint, image, tmp_path, name, words):
    broken_images(tmp_path, image)
    assert refused(capsys, ["ask", "--model", checkpoint, "--image", name, "a dog ?"], words).out == ""


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["ask", "--model", "MODEL", "--image", "IMAGE", "  "], "question: got an empty text"),
        (
            ["ask", "--model", "MODEL", "--image", "IMAGE", "x", "--overlay", "no/o.png"],
            "'no/o.png' is not in a folder",
        ),
        (["ask", "--model", ".", "--image", "IMAGE", "x"], "model: '.' could not be loaded as an AGE-VLM"),
        (["ask", "--model", "MODEL", "--image", "IMAGE", "x", "--max-new-tokens", "0"], "max_new_tokens"),
    ],
)
def test_ask_refuses(capsys, checkpoint, image, arguments, words):
    swap = {"MODEL": checkpoint, "IMAGE": image}
    refused(capsys, [swap.get(argument, argument) for argument in arguments], words)


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


# ground


@pytest.fixture
def scenes(tmp_path):
    to_dataset("train", 3).save_to_disk(tmp_path / "scenes")
    return "scenes"


def test_ground_says_what_it_made_and_where(capsys, scenes, tmp_path):
    arguments = ["ground", scenes, "--teacher", "annotated", "--max-area", "0.06", "--output", "out"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "phrases left out: its mask covers more than 0.06 of the image" in printed
    assert "Report: out/report.html" in printed and 'load_dataset("out", split="train")' in printed
    before = files(tmp_path / "out")
    assert main(arguments) == 0
    assert files(tmp_path / "out") == before
    refused(
        capsys,
        [*arguments, "--min-area", "0.01"],
        "output: 'out' holds a run with settings.min_area 0.0, this one has 0.01",
    )
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["scenes", "--teacher", "sam4"], "teacher: got 'sam4', expected one of annotated, sam2"),
        (["scenes", "--teacher", "sam3", "--model", "huge"], "model: got 'huge', expected one of large"),
        (["scenes", "--teacher", "sam3"], "model: 'facebook/sam3' is not in the cache and the Hub cannot be reached"),
        (["scenes", "--teacher", "sam2-transformers", "--model", "scenes"], "model: 'scenes' cannot be loaded"),
        (["scenes", "--teacher", "annotated", "--device", "cuda:77"], "device: 'cuda:77' cannot be used"),
        (["scenes", "--teacher", "annotated", "--dtype", "int4"], "dtype: got 'int4'"),
        (["scenes", "--teacher", "annotated", "--min-score", "2"], "min_score: got 2.0, expected 0 to 1"),
        (["scenes", "--teacher", "annotated", "--batch-size", "0"], "batch_size: got 0"),
        (
            ["scenes", "--teacher", "annotated", "--output", "scenes"],
            "output: 'scenes' is not a folder of `age-vlm ground`",
        ),
        (["nowhere", "--teacher", "annotated"], "data: 'nowhere' .a Hub id, and no folder here. cannot be loaded"),
        (["images", "--teacher", "annotated"], "data: got the columns image, expected those of the schema"),
    ],
)
def test_ground_refuses_and_leaves_nothing(capsys, scenes, tmp_path, arguments, words):
    datasets.Dataset.from_dict({"image": [1]}).save_to_disk(tmp_path / "images")
    before = files(tmp_path)
    refused(capsys, ["ground", *arguments], words)
    assert files(tmp_path) == before


# train


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
def test_train_refuses_and_leaves_nothing(capsys, recipe, tmp_path, override, words):
    refused(capsys, ["train", recipe, *SHORT, override], words)
    assert list(files(tmp_path)) == [tmp_path / "recipe.yaml"]


def test_overrides_may_stand_anywhere(capsys, recipe):
    words = "training.steps: got 0"
    refused(capsys, ["train", recipe, "training.steps=0", "--output", "out"], words)
    refused(capsys, ["train", recipe, "--output", "out", "training.steps=0"], words)
    refused(capsys, ["train", "--output", "out", recipe, "training.steps=0", "--overwrite"], words)
    refused(capsys, ["demo", "--output", "out", "training.steps=0"], words)


def test_a_device_that_is_too_small(capsys, recipe, monkeypatch):
    def train(options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 1 GiB.")

    monkeypatch.setattr("age_vlm.cli._train", train)
    refused(
        capsys, ["train", str(recipe)], "CUDA out of memory; expected less than the device has: .*training.batch_size"
    )


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


# Every option that names a file or folder: missing, of the other kind, unreadable, not to be written.


@pytest.fixture
def places(tmp_path, image, recipe, checkpoint, monkeypatch):
    # pytest's own folder may be looked into by nobody but its owner.
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(tmp_path, folder, dirs_exist_ok=True)
        shutil.copytree(checkpoint, Path(folder) / "model")
        Path(folder).chmod(0o777)
        monkeypatch.chdir(folder)
        yield from _places(Path(folder))
        monkeypatch.chdir(tmp_path)


def _places(tmp_path):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "only.yaml").write_text("name: short\n")
    to_dataset("train", 3).save_to_disk(tmp_path / "scenes")
    for name in ("secret.yaml", "secret.png"):
        (tmp_path / name).write_text("name: short\n")
        (tmp_path / name).chmod(0)
    for name in ("secret", "locked"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.yaml").write_text("name: short\n")
    (tmp_path / "secret").chmod(0)
    (tmp_path / "locked").chmod(0o555)
    yield
    (tmp_path / "secret").chmod(0o755)
    (tmp_path / "locked").chmod(0o755)


PLACES = [
    ("train folder", "recipe: 'folder' is not a file"),
    ("train secret.yaml", "recipe: 'secret.yaml' could not be read: Permission denied"),
    ("train secret/a.yaml", "recipe: 'secret/a.yaml' could not be read: Permission denied"),
    ("train recipe.yaml --output file", "run folder: 'file' exists"),
    ("train recipe.yaml --output file/new", "run folder: 'file/new' cannot be a folder: .*file' is a file"),
    ("train recipe.yaml --output locked/new", "run folder: 'locked/new' cannot be written: .* does not allow it"),
    ("train recipe.yaml --output secret/new", "run folder: 'secret/new' could not be read: Permission denied"),
    ("demo --output locked/new", "run folder: 'locked/new' cannot be written"),
    ("demo --output file/new --resume", "run folder: 'file/new' cannot be a folder"),
    ("train recipe.yaml model.checkpoint=folder", "model.checkpoint: 'folder' could not be loaded"),
    ("train recipe.yaml model.checkpoint=file", "model.checkpoint: 'file' could not be loaded"),
    ("train recipe.yaml model.checkpoint=secret", "model.checkpoint: 'secret' could not be loaded"),
    ("train recipe.yaml 'model={text: none/here, vision: none/here}'", "text: 'none/here' could not be loaded"),
    ("train recipe.yaml 'model={text: folder, vision: folder}'", "text: 'folder' could not be loaded"),
    ("train recipe.yaml 'data={kind: dataset, path: file}'", "data.path: 'file' .*cannot be loaded"),
    ("train recipe.yaml 'data={kind: dataset, path: folder}'", "data.path: 'folder' .*cannot be loaded"),
    ("train recipe.yaml 'data={kind: dataset, path: secret}'", "data.path: 'secret' .*cannot be loaded"),
    (
        "train recipe.yaml 'data={kind: label_maps, images: file, labels: folder, classes: [a]}'",
        "images must be a folder",
    ),
    (
        "train recipe.yaml 'data={kind: label_maps, images: folder, labels: none, classes: [a]}'",
        "labels must be a folder",
    ),
    (
        "train recipe.yaml 'data={kind: label_maps, images: secret, labels: folder, classes: [a]}'",
        "images: 'secret' could not be read",
    ),
    ("train recipe.yaml 'model.config={image_visibility: all}'", "image_visibility: got 'all'"),
    ("pipeline none --output new", "recipes: 'none' is not a folder"),
    ("pipeline file --output new", "recipes: 'file' is not a folder"),
    ("pipeline secret --output new", "recipes: 'secret' could not be read: Permission denied"),
    ("pipeline recipes --output file", "only: run folder: 'file/only' cannot be a folder"),
    ("pipeline recipes --output locked", "only: run folder: 'locked/only' cannot be written"),
    ("plan none.yaml", "recipe: 'none.yaml' is not a file"),
    ("plan folder", "recipes: 'folder' has no YAML files"),
    ("plan secret", "recipes: 'secret' could not be read"),
    ("plan secret.yaml", "recipe: 'secret.yaml' could not be read"),
    ("plan recipe.yaml --json none/plan.json", "--json: 'none/plan.json' is not in a folder that exists"),
    ("plan recipe.yaml --json folder", "--json: 'folder' is a folder"),
    ("plan recipe.yaml --json locked/plan.json", "--json: 'locked/plan.json' cannot be written"),
    ("plan recipe.yaml model.checkpoint=file", "model.checkpoint: 'file' could not be read"),
    ("plan recipe.yaml 'model={text: none/here, vision: none/here}'", "model.text: 'none/here' could not be loaded"),
    ("plan recipe.yaml 'model.config={image_visibility: all}'", "image_visibility: got 'all'"),
    ("ground none --teacher annotated", "data: 'none' .* cannot be loaded"),
    ("ground file --teacher annotated", "data: 'file' .* cannot be loaded"),
    ("ground secret --teacher annotated", "data: 'secret' .* cannot be loaded"),
    ("ground scenes --teacher sam2-transformers --model secret", "model: 'secret' cannot be loaded"),
    ("ground scenes --teacher sam2-transformers --model file", "model: 'file' cannot be loaded"),
    ("ground scenes --teacher annotated --output file", "output: 'file' cannot be a folder"),
    ("ground scenes --teacher annotated --output file/new", "output: 'file/new' cannot be a folder"),
    ("ground scenes --teacher annotated --output locked/new", "output: 'locked/new' cannot be written"),
    ("ask x --image folder", "images: 'folder' is not a file"),
    ("ask x --image secret.png", "images: 'secret.png' .*Permission denied"),
    ("ask x --image image.png --model file", "model: 'file' could not be loaded"),
    ("ask x --image image.png --model secret", "model: 'secret' could not be loaded"),
    ("ask x --image image.png --overlay folder", "--overlay: 'folder' is a folder"),
    ("ask x --image image.png --overlay locked/o.png", "--overlay: 'locked/o.png' cannot be written"),
    ("ask x --image image.png --overlay o.txt", "--overlay: got 'o.txt', expected the name of an image"),
]


@pytest.mark.parametrize("line, words", PLACES)
def test_what_is_wrong_with_a_place_is_one_sentence(capsys, places, line, words):
    arguments = shlex.split(line)
    if arguments[0] == "ask" and "--model" not in arguments:
        arguments += ["--model", "model"]
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)  # what is not to be read is read by root
    try:
        refused(capsys, arguments, words)
    finally:
        if root:
            os.seteuid(0)


def test_names_are_printed_as_they_are(capsys, scenes, recipe, tmp_path):
    name = "[bold]out[1]:smile:"
    assert main(["ground", scenes, "--teacher", "annotated", "--output", name]) == 0
    printed = capsys.readouterr().out
    assert f"Report: {name}/report.html" in printed and f'load_dataset("{name}", split="train")' in printed
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "[red]a.yaml").write_text("name: '[dim]short'\n")
    assert main(["pipeline", "recipes", *SHORT, "--output", name + "2"]) == 0
    printed = capsys.readouterr().out
    assert "[red]a: started" in printed and f"Checkpoint: {name}2/[red]a/checkpoint" in printed
    assert re.search(r"metric .* \[red\]a", printed)


def test_train_without_a_recipe(capsys):
    refused(capsys, ["train", "none.yaml"], "recipe: 'none.yaml' is not a file")


def test_label_maps_of_another_size(capsys, recipe, tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for number in range(4):
        Image.new("RGB", (64, 48)).save(tmp_path / "images" / f"{number}.png")
        Image.new("L", (48, 64)).save(tmp_path / "labels" / f"{number}.png")
    data = ["data.kind=label_maps", "data.images=images", "data.labels=labels", "data.classes=[sky, road]"]
    refused(capsys, ["train", recipe, *data], "48")


def test_a_run_folder_is_only_replaced_when_asked(capsys, recipe, tmp_path):
    arguments = ["train", recipe, *SHORT, "--output", "out"]
    assert main([*arguments, "--resume"]) == 0  # there is nothing to resume yet: it starts
    printed = capsys.readouterr().out
    assert "Report: out/report.html" in printed and "pope/adversarial/accuracy" in printed
    before = files(tmp_path / "out")
    assert main([*arguments, "--resume"]) == 0
    assert printed.endswith(capsys.readouterr().out)
    refused(
        capsys, [*arguments, "--resume", "seed=1"], "run folder: 'out' belongs to a different recipe .seed: 0 there, 1 here."
    )
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--resume", "--overwrite"])
    assert ended.value.code == 2 and "not allowed with argument" in capsys.readouterr().err
    refused(capsys, arguments, "run folder: 'out' exists")
    # One that fails on its way, however far it came, leaves the earlier one.
    refused(capsys, [*arguments, "alignment.layers=[9]", "--overwrite"], "alignment.layers: got 9")
    assert files(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml"]


# pipeline


def test_a_pipeline_prints_a_table_of_its_stages(capsys, recipe, tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / recipe).rename(tmp_path / "recipes" / "only.yaml")
    arguments = ["pipeline", "recipes", *SHORT, "--output", "out"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "only: started" in printed and "Checkpoint: out/only/checkpoint" in printed
    table = printed[printed.index("test part of each") :]
    assert re.search("metric .* only", table) and "pope/adversarial/accuracy" in table
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "only: complete already" in printed and printed.endswith(table)
    before = files(tmp_path)
    refused(capsys, [*arguments, "only:seed=4"], "only: run folder: 'out/only' belongs to a different recipe .seed: 0 there, 4")
    refused(capsys, [*arguments, "other:seed=4"], "override: 'other:seed=4' is for 'other', expected one of only")
    refused(capsys, [*arguments, "only:training.stps=4"], "only.yaml: training.stps: unknown key")
    refused(capsys, ["pipeline", "none", "--output", "out"], "recipes: 'none' is not a folder")
    assert files(tmp_path) == before


FULL = textwrap.dedent(
    """
    import resource, sys
    from age_vlm.cli import main

    # Files that grow beyond this fail to be written, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
    sys.exit(main(sys.argv[2:]))
    """
)


def test_no_space_left_keeps_the_earlier_run(recipe, checkpoint, tmp_path):
    earlier = tmp_path / "out"
    earlier.mkdir()
    (earlier / "recipe.yaml").write_text("name: earlier\n")
    os.rename(checkpoint, earlier / "checkpoint")
    try:
        before = files(earlier)
        size = (earlier / "checkpoint" / "model.safetensors").stat().st_size
        arguments = ["train", recipe, *SHORT, "--output", "out", "--overwrite"]
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
