import json
import os
import pickle
import warnings

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, Features, Image, IterableDataset, Value
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from age_vlm.data.collator import AgeVlmCollator
from age_vlm.data.converters import CONVERTERS, convert
from age_vlm.data.masks import decode_mask
from age_vlm.data.schema import FEATURES, message_text, validate_sample
from age_vlm.training import AgeVlmTrainer


def record(number, text="a dog"):
    return {
        "id": str(number),
        "image": f"{number}.jpg",
        "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": text}],
    }


@pytest.fixture
def llava_files(tmp_path, photograph):
    for number in range(4):
        photograph(tmp_path / f"images/{number}.jpg", 20 + number, 30)
    (tmp_path / "chat.json").write_text(json.dumps([record(number) for number in range(4)]))
    return {"conversations": tmp_path / "chat.json", "images": tmp_path / "images"}


@pytest.fixture
def regions(tmp_path, photograph):
    photograph(tmp_path / "vg/1.jpg")
    boxes = [{"phrase": "a dog", "x": 1, "y": 2, "width": 3, "height": 4.5}]
    (tmp_path / "vg.json").write_text(json.dumps([{"id": 1, "regions": boxes}]))
    return {"images": str(tmp_path / "vg"), "regions": str(tmp_path / "vg.json")}


def identity(rows):
    return rows


def test_a_data_set_is_made_once_or_streamed(tmp_path, llava_files):
    stored = convert("llava", cache_dir=tmp_path / "cache", **llava_files)
    stream = convert("llava", streaming=True, **llava_files)
    assert isinstance(stored, Dataset) and isinstance(stream, IterableDataset)
    assert stored.features == stream.features == FEATURES
    assert len(stored) == 4
    for a, b in zip(stored, stream, strict=True):
        validate_sample(a)
        assert (a["id"], a["messages"]) == (b["id"], b["messages"])
        assert np.array_equal(np.asarray(a["images"][0]), np.asarray(b["images"][0]))
    # A second pass, and storage that points at the files.
    assert [sample["id"] for sample in stream] == [sample["id"] for sample in stored]
    assert stored.data.to_pylist()[0]["images"] == [{"bytes": None, "path": str(llava_files["images"] / "0.jpg")}]


def test_boxes_survive_storage_and_wait_for_masks(tmp_path, regions):
    data = convert("visual_genome", cache_dir=tmp_path / "cache", **regions)
    data.save_to_disk(tmp_path / "saved")
    (tmp_path / "vg/1.jpg").rename(tmp_path / "elsewhere.jpg")
    saved = Dataset.load_from_disk(tmp_path / "saved")
    assert saved[0]["images"][0].size == (40, 30)
    (tmp_path / "elsewhere.jpg").rename(tmp_path / "vg/1.jpg")
    for loaded in (data, saved):
        (item,) = loaded[0]["groundings"]
        validate_sample(loaded[0])
        assert item["mask"] is None and item["box"] == [1, 2, 4, 6.5]


def test_images_inside_a_table_keep_their_bytes(tmp_path, llava_files):
    encoded = (llava_files["images"] / "1.jpg").read_bytes()
    features = Features({"images": [Image()], "texts": [{"user": Value("string"), "assistant": Value("string")}]})
    row = {"images": [{"bytes": encoded, "path": "1.jpg"}], "texts": [{"user": "what?", "assistant": "a dog"}]}
    Dataset.from_list([row], features=features).to_parquet(tmp_path / "table.parquet")
    made = convert("cauldron", data=str(tmp_path / "table.parquet"), cache_dir=tmp_path / "cache")
    assert made.data.to_pylist()[0]["images"] == [{"bytes": encoded, "path": None}]
    validate_sample(made[0])


def test_shards_deal_the_samples_out_to_workers(llava_files):
    stream = convert("llava", streaming=True, shards=2, **llava_files)
    assert stream.num_shards == 2
    loader = DataLoader(stream, batch_size=None, num_workers=2, collate_fn=identity)
    assert sorted(sample["id"] for sample in loader) == ["0/0", "1/1", "2/2", "3/3"]
    assert [sample["id"] for sample in stream.shard(2, 1)] == ["1/1", "3/3"]
    pickle.dumps(stream)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_tables_lose_nothing_in_workers(tmp_path, shards):
    for number in range(4):
        rows = [{"images": [], "texts": [{"user": "what?", "assistant": f"{number}.{row}"}]} for row in range(3)]
        Dataset.from_list(rows).to_parquet(tmp_path / f"train-{number:05d}-of-00004.parquet")
    stream = convert("cauldron", data=str(tmp_path), streaming=True, shards=shards)
    loader = DataLoader(stream, batch_size=None, num_workers=min(shards, 2), collate_fn=identity)
    said = [message_text(sample["messages"][1]) for sample in loader]
    assert sorted(said) == [f"{number}.{row}" for number in range(4) for row in range(3)]


def test_classes_are_not_taken_for_shards(tmp_path):
    stream = convert("label_maps", streaming=True, images=tmp_path, labels=tmp_path, classes=["sky", "road"])
    assert stream.num_shards == 1


def test_changed_files_are_converted_again(tmp_path, llava_files):
    arguments = {"cache_dir": tmp_path / "cache", **llava_files}
    first = convert("llava", **arguments)
    assert convert("llava", **arguments)._fingerprint == first._fingerprint
    llava_files["conversations"].write_text(json.dumps([record(0, "another dog")]))
    assert len(convert("llava", **arguments)) == 1


def test_files_in_a_folder_inside_are_seen(tmp_path, llava_files):
    arguments = {"cache_dir": tmp_path / "cache", **llava_files, "images": llava_files["images"].parent}
    inside = llava_files["images"].name
    records = [
        {**record(0, "a dog"), "image": f"{inside}/0.jpg"},
        {**record(1, "a cat"), "image": f"{inside}/more.jpg"},
    ]
    llava_files["conversations"].write_text(json.dumps(records))
    with pytest.warns(UserWarning, match="image file is missing: 1"):
        assert len(convert("llava", **arguments)) == 1
    (llava_files["images"] / "more.jpg").write_bytes((llava_files["images"] / "1.jpg").read_bytes())
    assert len(convert("llava", **arguments)) == 2


def test_what_is_left_out_is_said_at_the_end(tmp_path, llava_files):
    (llava_files["images"] / "2.jpg").unlink()
    for streaming in (False, True):
        with pytest.warns(UserWarning, match=r"llava: 1 left out; image file is missing: 1 \(first: 2\)"):
            data = convert("llava", streaming=streaming, cache_dir=tmp_path / "cache", **llava_files)
            assert len(list(data)) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (llava_files["images"] / "2.jpg").write_bytes((llava_files["images"] / "1.jpg").read_bytes())
        assert len(list(convert("llava", streaming=True, **llava_files))) == 4


def test_nothing_usable_is_an_error(tmp_path, llava_files):
    arguments = {"conversations": llava_files["conversations"], "images": tmp_path / "cache"}
    (tmp_path / "cache").mkdir()
    with pytest.raises(ValueError, match="llava: nothing could be used, 4 left out; image file is missing: 4"):
        convert("llava", cache_dir=tmp_path / "cache", **arguments)
    with pytest.raises(ValueError, match="nothing could be used"):
        list(convert("llava", streaming=True, **arguments))


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("imagenet", {}, "name: got 'imagenet', expected one of .*'visual_genome'.*"),
        ("llava", {}, "conversations: missing argument of 'llava', expected conversations and optionally "),
        (
            "llava",
            {"conversations": "a.json", "image": "b"},
            "image: unknown argument of 'llava', expected conversations",
        ),
        ("llava", {"conversations": "a.json", "rejects": None}, "rejects: unknown argument of 'llava'"),
        ("llava", {"conversations": "nowhere.json"}, "conversations: got 'nowhere.json', expected a file"),
        (
            "llava",
            {"conversations": "a.json", "shards": 2},
            "shards: got .*, expected a number from 1 on, and 1 unless streaming",
        ),
        ("llava", {"conversations": "a.json", "shards": 0, "streaming": True}, "shards: got"),
    ],
)
def test_bad_calls_are_named(tmp_path, name, arguments, says):
    with pytest.raises(ValueError, match=says) as caught:
        convert(name, cache_dir=tmp_path, **arguments)
    assert "\n" not in str(caught.value)


def test_all_converters_take_shards_and_count():
    for name, converter in CONVERTERS.items():
        assert {"shard", "rejects"} <= converter.__kwdefaults__.keys(), name
        assert converter.__name__ == name and converter.__doc__


@pytest.fixture
def coco_files(tmp_path, photograph):
    pictures = [{"id": n, "file_name": f"{n}.jpg", "width": 32 + n, "height": 30} for n in range(4)]
    for image in pictures:
        photograph(tmp_path / "coco" / image["file_name"], image["width"], image["height"])
    captions = [{"id": n, "image_id": n, "caption": "a dog"} for n in range(4)]
    things = [
        {"id": n, "image_id": n, "category_id": 18, "segmentation": [[2, 2, 26, 2, 26, 20, 2, 20]], "iscrowd": 0}
        for n in range(4)
    ]
    categories = [{"id": 18, "name": "dog"}]
    for name, annotations in (("captions", captions), ("instances", things)):
        parts = {"images": pictures, "annotations": annotations, "categories": categories}
        (tmp_path / f"{name}.json").write_text(json.dumps(parts))
    return {
        "images": tmp_path / "coco",
        "captions": tmp_path / "captions.json",
        "instances": str(tmp_path / "instances.json"),
    }


def test_masks_survive_storage_and_streams(tmp_path, coco_files):
    for streaming in (False, True):
        data = convert("coco", streaming=streaming, cache_dir=tmp_path / "cache", **coco_files)
        for sample in data:
            validate_sample(sample)
            (item,) = sample["groundings"]
            assert decode_mask(item["mask"]).sum() == 24 * 18 and item["box"] is None


def test_a_stream_trains(tmp_path, coco_files, make_model, processor):
    model = make_model()
    stream = convert("coco", streaming=True, shards=2, **coco_files).shuffle(seed=0, buffer_size=2)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        remove_unused_columns=False,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    collator = AgeVlmCollator.from_model(model, processor)
    trainer = AgeVlmTrainer(model, arguments, train_dataset=stream, data_collator=collator)
    trainer.train()
    assert all(entry["alignment_loss"] > 0 for entry in trainer.state.log_history if "lm_loss" in entry)
    assert sum("lm_loss" in entry for entry in trainer.state.log_history) == 2


def rewritten(path, content):
    """The same time as before, as after copying with times or within the clock's resolution."""
    state = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_a_file_rewritten_in_place_is_seen(tmp_path, llava_files):
    arguments = {"cache_dir": tmp_path / "cache", **llava_files}
    first = convert("llava", **arguments)
    images = llava_files["images"]
    # The time of a folder says nothing of what is in its files.
    rewritten(images / "1.jpg", b"no image")
    with pytest.warns(UserWarning, match="image cannot be read: 1"):
        assert len(convert("llava", **arguments)) == len(first) - 1
    rewritten(images / "1.jpg", (images / "2.jpg").read_bytes())
    assert len(convert("llava", **arguments)) == len(first)


def test_segments_that_nobody_named_are_seen(tmp_path, photograph):
    size = {"width": 40, "height": 30}
    photograph(tmp_path / "images/1.jpg", **size)
    image = {"id": 1, "file_name": "1.jpg", **size}
    captions = {"images": [image], "annotations": [{"id": 1, "image_id": 1, "caption": "a dog"}]}
    segments = [{"id": 7, "category_id": 1}]
    panoptic = {
        "images": [image],
        "annotations": [{"image_id": 1, "file_name": "1.png", "segments_info": segments}],
        "categories": [{"id": 1, "name": "dog"}],
    }
    for name, content in (("captions", captions), ("panoptic", panoptic)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "panoptic").mkdir()
    arguments = {name: tmp_path / f"{name}.json" for name in ("captions", "panoptic")}
    arguments |= {"images": tmp_path / "images", "cache_dir": tmp_path / "cache"}

    def write_segments(columns):
        colors = np.zeros((30, 40, 3), np.uint8)
        colors[:, :columns, 0] = 7
        PIL.Image.fromarray(colors).save(tmp_path / "panoptic/1.png")

    for columns in (10, 20):
        write_segments(columns)
        (item,) = convert("coco", **arguments)[0]["groundings"]
        assert decode_mask(item["mask"]).sum() == 30 * columns


def test_files_outside_are_converted_each_time(tmp_path, llava_files):
    outside = tmp_path / "outside.jpg"
    (llava_files["images"] / "0.jpg").rename(outside)
    llava_files["conversations"].write_text(json.dumps([record(0) | {"image": "../outside.jpg"}]))
    arguments = {"cache_dir": tmp_path / "cache", **llava_files}
    with pytest.raises(ValueError, match="nothing could be used, 1 left out; image lies outside of its folder"):
        convert("llava", **arguments)
    assert len(convert("llava", allow_outside=True, **arguments)) == 1
    outside.write_bytes(b"no image")
    with pytest.raises(ValueError, match="image cannot be read"):
        convert("llava", allow_outside=True, **arguments)
