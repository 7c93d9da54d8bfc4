import dataclasses
import io
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from age_vlm.commands.recipe import DataRecipe, Recipe, TrainingRecipe
from age_vlm.commands.sources import check_paths, load_source, load_sources, open_dataset, yes_no_items
from age_vlm.data.masks import decode_mask
from age_vlm.data.mix import Mix
from age_vlm.data.scene_datasets import to_dataset
from age_vlm.data.schema import (
    FEATURES,
    assistant_message,
    grounding,
    message_text,
    user_message,
    validate_sample,
)


SCENES = DataRecipe(train=6, validation=2, test=3)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder each of images and class indices: bands of three classes, of which one is not in every image."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for part in ("images", "labels", "instances"):
        (folder / part).mkdir()
    for number in range(12):
        labels = np.zeros((48, 64), np.uint8)
        labels[16:] = 1
        if number % 2:
            labels[24:, 32:] = 2
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / "images" / f"{number:02}.png")
        Image.fromarray(labels).save(folder / "labels" / f"{number:02}.png")
        Image.fromarray((labels == 2).astype(np.uint8)).save(folder / "instances" / f"{number:02}.png")
    return DataRecipe(
        kind="label_maps",
        images=str(folder / "images"),
        labels=str(folder / "labels"),
        classes=["sky", "road", "car"],
        crop=[32, 24],
        train=5,
        validation=1,
        test=2,
    )


@pytest.mark.parametrize("kind", ["scenes", "label_maps"])
def test_a_source_holds_what_its_recipe_says(kind, photographs):
    recipe = SCENES if kind == "scenes" else photographs
    source = load_source(recipe, seed=0)
    assert len(source.train) == recipe.train
    assert (len(source.validation), len(source.test)) == (recipe.validation, recipe.test)
    for index in range(recipe.train):
        validate_sample(source.train[index])
    images = {np.asarray(item.image).tobytes() for item in (*source.validation, *source.test)}
    assert len(images) == recipe.validation + recipe.test
    assert not images & {np.asarray(source.train[index]["images"][0]).tobytes() for index in range(recipe.train)}
    unknown = source.tokenizer.unk_token_id
    texts = [question.text for item in source.test for question in item.questions]
    texts += [part["text"] for index in range(3) for m in source.train[index]["messages"] for part in m["content"][-1:]]
    assert all(unknown not in source.tokenizer(text)["input_ids"] for text in texts)
    assert (source.icons is None) == (kind == "label_maps")
    assert (source.prior is None) == (kind == "scenes")


def test_label_maps_keep_some_kinds_of_texts(photographs):
    instances = photographs.images.replace("images", "instances")
    recipe = dataclasses.replace(photographs, instances=instances, train=6)
    for texts in (["caption"], ["existence"], ["count"]):
        samples = load_source(dataclasses.replace(recipe, texts=texts), 0, evaluation=False).train
        for index in range(6):
            sample = samples[index]
            validate_sample(sample)
            asked = [message_text(message) for message in sample["messages"][::2]]
            start = {"caption": "describe", "existence": "is there", "count": "how many"}[texts[0]]
            assert asked and all(question.startswith(start) for question in asked)
    for file in Path(instances).iterdir():
        empty = file.parent.parent / "none" / file.name
        empty.parent.mkdir(exist_ok=True)
        Image.new("L", (64, 48)).save(empty)
    recipe = dataclasses.replace(recipe, instances=str(empty.parent), texts=["count"])
    with pytest.raises(ValueError, match="texts: got .'count'., which .* expected kinds that crops have"):
        load_source(recipe, 0, evaluation=False).train[0]


def test_a_mix_has_its_shares_and_the_words_of_all(photographs):
    parts = [DataRecipe(train=9, texts=["caption"], weight=3.0), dataclasses.replace(photographs, train=9)]
    recipe = Recipe(data=SCENES, mix=parts, training=TrainingRecipe(steps=5, batch_size=4, gradient_accumulation=2))
    source, again = load_sources(recipe), load_sources(recipe)
    assert isinstance(source.train, Mix) and len(source.train) == 40
    counts = [sum(source.train.part(index) == part for index in range(40)) for part in range(3)]
    assert counts == pytest.approx([8, 24, 8], abs=4)
    for index in (0, 7, 39):
        assert source.train[index]["messages"] == again.train[index]["messages"]
    # Drawn with other seeds: not the same scenes.
    scenes = [{source.train[i]["id"] for i in range(40) if source.train.part(i) == part} for part in (0, 1)]
    assert not scenes[0] & scenes[1]
    assert [item.image_id for item in source.test] == [item.image_id for item in load_source(SCENES, 0).test]
    for word, known in (("circle", True), ("sky", True), ("road", True), ("submarine", False)):
        assert (source.tokenizer.unk_token_id in source.tokenizer(word)["input_ids"]) != known
    assert (
        load_sources(dataclasses.replace(recipe, mix=[])).train[0]["messages"]
        == load_source(SCENES, 0).train[0]["messages"]
    )


# Stored data sets


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Ten scenes in every form that can be loaded."""
    folder = tmp_path_factory.mktemp("stored")
    samples = to_dataset("train", 10)
    samples.save_to_disk(folder / "arrow")
    datasets.DatasetDict(train=samples, test=samples.select([3])).save_to_disk(folder / "splits")
    (folder / "parquet" / "data").mkdir(parents=True)
    for number in (0, 1):
        samples.select(range(5 * number, 5 * number + 5)).to_parquet(folder / "parquet" / "data" / f"{number}.parquet")
    (folder / "parquet" / "manifest.json").write_text("{}")
    (folder / "empty").mkdir()
    samples.remove_columns("groundings").save_to_disk(folder / "lacking")
    return folder


@pytest.mark.parametrize("form", ["arrow", "splits", "parquet"])
def test_a_stored_data_set_is_the_same_in_every_form(stored, form):
    recipe = DataRecipe(kind="dataset", path=str(stored / form), held_out=0.4, validation=5, test=1)
    source = load_source(recipe, 0)
    expected = to_dataset("train", 10)
    assert len(source.train) == 6
    for index in range(6):
        validate_sample(source.train[index])
        assert source.train[index]["messages"] == expected[index]["messages"]
        assert source.train[index]["images"][0].tobytes() == expected[index]["images"][0].tobytes()
    assert len(source.validation) == 2 and len(source.test) == 1
    trained = {source.train[index]["images"][0].tobytes() for index in range(6)}
    assert not trained & {item.image.tobytes() for item in (*source.validation, *source.test)}
    unknown = source.tokenizer.unk_token_id
    assert all(unknown not in source.tokenizer(message_text(m))["input_ids"] for m in expected[9]["messages"])
    assert source.icons is None and source.prior is None


@pytest.mark.parametrize(
    "form, split, words",
    [
        ("empty", "train", "^data.path: '.*empty' .a folder. cannot be loaded as a data set: "),
        ("lacking", "train", "^data.path: '.*lacking' lacks the columns groundings of the schema"),
        ("splits", "dev", "^split: got 'dev', expected one of train, test"),
        ("none/of/these", "train", "^data.path: '.*these' .a Hub id, and no folder here. cannot be loaded"),
    ],
)
def test_what_is_no_data_set_is_one_sentence(stored, form, split, words):
    with pytest.raises(ValueError, match=words) as caught:
        open_dataset(str(stored / form), split)
    assert "\n" not in str(caught.value)


def test_images_without_a_type_are_read(stored, tmp_path):
    table = to_dataset("train", 2).with_format("arrow")[:].replace_schema_metadata(None)
    pyarrow.parquet.write_table(table, tmp_path / "plain.parquet")
    samples = open_dataset(str(tmp_path))
    assert samples.features["images"] == FEATURES["images"]
    assert samples[1]["images"][0].tobytes() == to_dataset("train", 2)[1]["images"][0].tobytes()


def chat(name, *turns, images=1, groundings=()):
    messages = [m for q, a in turns for m in (user_message(q), assistant_message(a))]
    messages[0] = user_message(turns[0][0], images=images)
    pictures = [Image.new("RGB", (8, 8)) for _ in range(images)]
    return {"id": name, "images": pictures, "messages": messages, "groundings": list(groundings)}


def test_questions_are_the_turns_that_are_answered_by_yes_or_no():
    mask = np.eye(8, dtype=bool)
    samples = [
        chat(
            "a",
            ("describe it", "a dog"),
            ("a dog?", " Yes. "),
            ("a cat?", "no"),
            groundings=[grounding(2, 2, 5, 0, mask)],
        ),
        chat("b", ("describe it", "yes, a dog")),
        chat("c", ("two alike?", "no"), images=2),
        chat("d", ("a fox?", "no"), groundings=[grounding(0, 2, 5, 0, None)]),
        chat("e", ("text only?", "yes"), images=0),
    ]
    first, second = yes_no_items(samples, range(5), 10)
    assert [(q.text, q.answer, q.phrase) for q in first.questions] == [
        ("a dog?", "yes", (2, 5)),
        ("a cat?", "no", None),
    ]
    assert first.questions[0].subject == "dog" and decode_mask(first.questions[0].mask).tolist() == mask.tolist()
    assert [(q.text, q.answer, q.mask) for q in second.questions] == [("a fox?", "no", None)]
    assert len({q.id for item in (first, second) for q in item.questions}) == 3
    assert len(yes_no_items(samples, range(5), 1)) == 1 and not yes_no_items(samples, [1, 2], 9)


def test_folders_that_are_not_there_are_found_before_anything_is_read(photographs, stored):
    there = DataRecipe(kind="dataset", path=str(stored))
    check_paths(Recipe(data=photographs, mix=[SCENES, there, DataRecipe(kind="dataset", path="some/name")]))
    for recipe, words in (
        (Recipe(data=dataclasses.replace(photographs, labels="none")), "data.labels: 'none' is not a folder"),
        (Recipe(mix=[there, DataRecipe(kind="dataset", path="a/b/c")]), "mix.1.path: 'a/b/c' is not a folder"),
        (Recipe(data=DataRecipe(kind="dataset", path="none")), "data.path: 'none' is not a folder"),
    ):
        with pytest.raises(ValueError, match=f"^{words}, expected"):
            check_paths(recipe)


def test_counts_are_asked_where_instances_are_given(photographs):
    def kinds(recipe):
        return {question.kind for item in load_source(recipe, seed=0).test for question in item.questions}

    instances = photographs.images.replace("images", "instances")
    assert kinds(photographs) == {"existence"}
    assert kinds(dataclasses.replace(photographs, instances=instances)) == {"existence", "count"}


def test_the_seed_chooses_training_images_only():
    sources = [load_source(SCENES, seed) for seed in (0, 1)]
    first, second = ([np.asarray(source.train[i]["images"][0]) for i in range(3)] for source in sources)
    assert not any(np.array_equal(*pair) for pair in zip(first, second))
    for items in zip(*(source.test for source in sources)):
        assert np.array_equal(*(np.asarray(item.image) for item in items))
        assert items[0].questions == items[1].questions


def test_warm_up_images_fit_their_labels():
    pictures, labels = load_source(SCENES, 0).icons
    assert {pictures[index]["label"] for index in range(400)} == set(range(labels))


def test_sizes_that_differ_are_one_sentence(photographs, tmp_path):
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    for number in range(4):
        Image.new("RGB", (64, 48)).save(tmp_path / "images" / f"{number}.png")
        Image.new("L", (64, 40)).save(tmp_path / "labels" / f"{number}.png")
    recipe = DataRecipe(
        kind="label_maps", images=str(tmp_path / "images"), labels=str(tmp_path / "labels"), classes=["sky"]
    )
    with pytest.raises(ValueError, match="48.*40|40.*48") as caught:
        load_source(recipe, 0)
    assert "\n" not in str(caught.value)


def test_chats_whose_content_is_a_text(tmp_path):
    rows = [{"id": "a", "images": [], "messages": [{"role": "user", "content": "what?"}], "groundings": []}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match="^data.path: '.*' has messages whose content is a text, expected a list of p"):
        open_dataset(str(tmp_path))


def test_a_damaged_image_in_the_held_out_part_is_named(tmp_path):
    chat = [user_message("is it red?", images=1), assistant_message("yes")]
    rows = [
        {"id": name, "images": [{"bytes": content, "path": None}], "messages": chat, "groundings": []}
        for name, content in (("whole", png()), ("broken", b"no image at all"))
    ]
    datasets.Dataset.from_list(rows, features=FEATURES).save_to_disk(tmp_path)
    samples = open_dataset(str(tmp_path))
    assert len(yes_no_items(samples, [0], 9)) == 1
    with pytest.raises(ValueError, match="^held-out data: sample 'broken' .number 1. could not be read: "):
        yes_no_items(samples, [0, 1], 9)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("path", ["../a.png", "absolute", "http://x.org/a.png", "linked.png", "inside.png"])
def test_images_of_a_data_set_are_inside_its_folder(tmp_path, path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "a.png").write_bytes(png())
    (folder / "inside.png").write_bytes(png())
    (folder / "linked.png").symlink_to(tmp_path / "a.png")
    monkeypatch.chdir(folder)  # what a path without a folder starts from
    path = str(tmp_path / "a.png") if path == "absolute" else path
    chat = [user_message("is it red?", images=1), assistant_message("yes")]
    rows = [{"id": "a", "images": [{"bytes": None, "path": path}], "messages": chat, "groundings": []}] * 2
    # `to_parquet` asks URLs for their size.
    pyarrow.parquet.write_table(
        datasets.Dataset.from_list(rows, features=FEATURES).data.table, folder / "train.parquet"
    )
    recipe = DataRecipe(kind="dataset", path=str(folder), held_out=0.0)
    if path == "inside.png":
        assert len(load_source(recipe, 0, evaluation=False).train) == 2
        return
    with pytest.raises(
        ValueError, match="^data.path: '.*' has an image at '.*', expected images inside of it"
    ) as caught:
        load_source(recipe, 0)
    assert "\n" not in str(caught.value)
    assert len(open_dataset(str(folder), allow_outside=True)) == 2
    assert len(load_source(dataclasses.replace(recipe, allow_outside=True), 0, evaluation=False).train) == 2
