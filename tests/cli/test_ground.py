import datasets
import pytest

from age_vlm.cli import main


def test_ground_says_what_it_made_and_where(capsys, scenes, tmp_path, files, refused):
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
        (
            ["scenes", "--teacher", "sam3", "--model", "huge"],
            "model: got 'huge', expected a Hub id, .* or one of large",
        ),
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
def test_ground_refuses_and_leaves_nothing(capsys, scenes, tmp_path, arguments, words, files, refused):
    datasets.Dataset.from_dict({"image": [1]}).save_to_disk(tmp_path / "images")
    before = files(tmp_path)
    refused(capsys, ["ground", *arguments], words)
    assert files(tmp_path) == before
