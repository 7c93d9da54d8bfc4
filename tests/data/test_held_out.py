"""No image is in two of training, validation and test, whatever its sample or file is called."""

import dataclasses
import io

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from age_vlm.commands.recipe import DataRecipe, Recipe, TrainingRecipe
from age_vlm.commands.sources import load_source, load_sources
from age_vlm.data.held_out import HeldOutImages, StoredImage
from age_vlm.data.label_maps import LabelMaps
from age_vlm.data.schema import FEATURES, assistant_message, user_message


CHAT = [user_message("is it red?", images=1), assistant_message("yes")]


def png(number, size=(8, 8)):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def row(name, *pictures):
    images = [{"bytes": png(item), "path": None} if isinstance(item, int) else item for item in pictures]
    chat = [user_message("is it red?", images=len(images)), assistant_message("yes")]
    return {"id": str(name), "images": images, "messages": chat, "groundings": []}


def saved(folder, rows):
    datasets.Dataset.from_list(rows, features=FEATURES).to_parquet(folder / "data/train.parquet")
    return DataRecipe(kind="dataset", path=str(folder / "data"), held_out=0.4, validation=9, test=9)


def pixels(picture):
    return np.asarray(picture.convert("RGB")).tobytes()


def parts(source):
    trained = [pixels(image) for sample in source.train for image in sample["images"]]
    return trained, *([pixels(item.image) for item in items] for items in (source.validation, source.test))


@given(st.lists(st.integers(0, 4), min_size=10, max_size=10))
@settings(max_examples=10, deadline=None)
def test_no_image_is_in_two_parts(tmp_path_factory, numbers):
    recipe = saved(tmp_path_factory.mktemp("split"), [row(index, number) for index, number in enumerate(numbers)])
    train, validation, test = numbers[:6], numbers[6:8], numbers[8:]
    expected = [number for number in train if number not in numbers[6:]]
    if not expected:
        with pytest.raises(ValueError, match="expected one to train on at least whose images are not held out"):
            load_source(recipe, 0)
        return
    if len(expected) < len(train):
        with pytest.warns(
            UserWarning, match=f"{len(train) - len(expected)} samples of .* held out, and are not trained"
        ):
            source = load_source(recipe, 0)
    else:
        source = load_source(recipe, 0)
    shown = {number: pixels(Image.open(io.BytesIO(png(number)))) for number in numbers}
    found = parts(source)
    assert found[0] == [shown[number] for number in expected]
    assert found[1] == [shown[number] for number in validation if number not in test]
    assert found[2] == [shown[number] for number in test]


def test_an_image_is_the_same_in_a_file_under_any_name_and_beside_others(tmp_path):
    (tmp_path / "data").mkdir()
    for name, number in (("a.png", 7), ("b.png", 7), ("c.png", 8)):
        (tmp_path / "data" / name).write_bytes(png(number))

    def file(name):
        return {"bytes": None, "path": str(tmp_path / "data" / name)}

    rows = [row("a", file("a.png")), row("b", 1, 7), row("c", file("c.png")), row("d", 2), row("e", file("b.png"))]
    source_recipe = dataclasses.replace(saved(tmp_path, rows), held_out=0.2)
    with pytest.warns(UserWarning, match="2 samples"):
        source = load_source(source_recipe, 0)
    assert [sample["id"] for sample in source.train] == ["c", "d"] and len(source.test) == 1


def test_what_is_held_out_of_the_data_is_in_no_part_of_the_mix(tmp_path):
    data = saved(tmp_path / "one", [row(number, number) for number in range(5)])
    other = dataclasses.replace(saved(tmp_path / "two", [row(f"b{n}", n) for n in (0, 3, 4, 5)]), held_out=0.0)
    training = TrainingRecipe(steps=4, batch_size=4, gradient_accumulation=1)
    with pytest.warns(UserWarning, match="2 samples of '.*two.*' show images that are held out"):
        source = load_sources(Recipe(data=data, mix=[other], training=training))
    trained = {source.train[index]["id"] for index in range(16)}
    assert trained == {"0", "1", "2", "b0", "b5"}


@pytest.fixture
def photographs(tmp_path):
    """Six photographs of which the first, in training, and the last, in the test, are the same in two formats."""
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for number, shown in enumerate((0, 1, 2, 3, 4, 0)):
        picture = Image.open(io.BytesIO(png(shown, (64, 48))))
        picture.save(tmp_path / "images" / f"{number}.{'bmp' if number == 0 else 'png'}")
        labels = np.zeros((48, 64), np.uint8)
        labels[24:] = 1
        Image.fromarray(labels).save(tmp_path / "labels" / f"{number}.png")
    return tmp_path


def test_frames_that_repeat_under_other_names(photographs):
    maps = LabelMaps(photographs / "images", photographs / "labels", ["sky", "road"])
    with pytest.warns(UserWarning, match="1 frames repeat held-out ones under other names"):
        split = maps.split(0.2)
    assert [[frame.name for frame in part.frames] for part in split] == [["1", "2", "3"], ["4"], ["5"]]
    alike = maps.subset(maps.frames.take([0, 5, 0]))
    with pytest.raises(ValueError, match="a frame of its own for each of its three parts, got 3"):
        alike.split(0.2)


def test_label_maps_and_data_sets_know_of_each_other(photographs):
    maps = DataRecipe(
        kind="label_maps",
        images=str(photographs / "images"),
        labels=str(photographs / "labels"),
        classes=["sky", "road"],
        crop=[32, 24],
        train=4,
    )
    content = {name: (photographs / "images" / f"{name}.png").read_bytes() for name in "245"}
    rows = [row(name, {"bytes": content[name], "path": None}) for name in "245"]
    training = TrainingRecipe(steps=4, batch_size=4, gradient_accumulation=1)
    stored = dataclasses.replace(saved(photographs / "stored", rows), held_out=0.0)
    with pytest.warns(UserWarning, match="1 frames repeat"), pytest.warns(UserWarning, match="2 samples of"):
        source = load_sources(Recipe(data=maps, mix=[stored], training=training))
    assert {source.train[index]["id"] for index in range(16) if source.train.part(index) == 1} == {"2"}

    held = dataclasses.replace(stored, held_out=0.34)  # the last, which is 5
    assert len(load_source(held, 0).held_out) == 1
    images = HeldOutImages()
    images.add([StoredImage.of_file(photographs / "images/1.png"), StoredImage.of_file("nowhere"), None])
    warned = "1 samples of '.*images' show images that are held out"
    with pytest.warns(UserWarning, match="1 frames repeat"), pytest.warns(UserWarning, match=warned):
        source = load_source(maps, 0, evaluation=False, held_out=images)
    assert not any(source.train[index]["id"].startswith("1/") for index in range(4))
