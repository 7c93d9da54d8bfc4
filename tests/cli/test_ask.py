import pytest
from PIL import Image

from age_vlm.cli import main


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
def test_ask_about_a_broken_image(capsys, checkpoint, image, tmp_path, name, words, refused):
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
def test_ask_refuses(capsys, checkpoint, image, arguments, words, refused):
    swap = {"MODEL": checkpoint, "IMAGE": image}
    refused(capsys, [swap.get(argument, argument) for argument in arguments], words)
