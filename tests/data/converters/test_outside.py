"""No converter opens an image outside of the folder it was given, unless it is told to."""

import json
import os
import pickle

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from age_vlm.data.converters import CONVERTERS
from age_vlm.data.label_maps import LabelMaps
from age_vlm.data.rejects import Rejects


SIZE = {"width": 40, "height": 30}
SQUARE = [[2, 2, 20, 2, 20, 20]]
OUTSIDE = "image lies outside of its folder, which needs allow_outside"
TURNS = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a dog"}]


@pytest.fixture
def place(tmp_path, photograph):
    photograph(tmp_path / "outside/1.jpg", **SIZE)
    (tmp_path / "images").mkdir()
    return tmp_path


def files(place, name, file):
    """Files of a converter whose only record shows `file`."""
    image = {"id": 1, "file_name": file, **SIZE}
    annotation = {"id": 5, "image_id": 1, "category_id": 18, "segmentation": SQUARE}
    instances = {"images": [image], "annotations": [annotation], "categories": [{"id": 18, "name": "dog"}]}
    ref = {"ref_id": 3, "ann_id": 5, "image_id": 1, "split": "train", "sentences": [{"sent": "a dog"}]}
    contents = {
        "llava": {"conversations": [{"id": 1, "image": file, "conversations": TURNS}]},
        "coco": {"captions": {"images": [image], "annotations": [{"id": 1, "image_id": 1, "caption": "a dog"}]}},
        "refcoco": {"refs": [ref], "instances": instances},
        "refcoco_hub": {"data": [ref | {"raw_anns": json.dumps(annotation), "raw_image_info": json.dumps(image)}]},
    }[name]
    paths = {"images": place / "images"}
    for argument, content in contents.items():
        paths[argument] = place / f"{argument}.json"
        if argument == "refs":
            paths[argument].write_bytes(pickle.dumps(content, protocol=2))
        elif argument == "data":
            paths[argument] = Dataset.from_list(content)
        else:
            paths[argument].write_text(json.dumps(content))
    return paths


@pytest.mark.parametrize("name", ["llava", "coco", "refcoco", "refcoco_hub"])
@pytest.mark.parametrize("file", ["../outside/1.jpg", "absolute", "linked/1.jpg", "link.jpg"])
def test_a_record_that_names_a_file_outside(place, name, file):
    (place / "images/linked").symlink_to(place / "outside")
    (place / "images/link.jpg").symlink_to(place / "outside/1.jpg")
    paths = files(place, name, str(place / "outside/1.jpg") if file == "absolute" else file)
    rejects = Rejects()
    assert list(CONVERTERS[name](**paths, rejects=rejects)) == []
    assert rejects.counts == {OUTSIDE: 1}
    assert len(list(CONVERTERS[name](**paths, allow_outside=True))) == 1


@pytest.mark.parametrize("name", ["llava", "coco", "refcoco", "refcoco_hub"])
@pytest.mark.parametrize(
    "file", ["http://x.org/1.jpg", "https://x.org/1.jpg", "data:image/png;base64,AA", "file:///1.jpg"]
)
def test_a_record_that_names_a_url(place, name, file):
    rejects = Rejects()
    assert list(CONVERTERS[name](**files(place, name, file), rejects=rejects)) == []
    assert rejects.counts == {"image is a URL": 1}


def test_images_that_are_found_by_their_identifier(place):
    os.symlink(place / "outside/1.jpg", place / "images/1.jpg")
    region = {"phrase": "a dog", "x": 1, "y": 2, "width": 3, "height": 4}
    records = [{"id": 1, "regions": [region]}, {"id": "../outside/1", "regions": [region]}]
    (place / "regions.json").write_text(json.dumps(records))
    arguments = {"images": place / "images", "regions": place / "regions.json"}
    rejects = Rejects()
    assert list(CONVERTERS["visual_genome"](**arguments, rejects=rejects)) == []
    assert rejects.counts == {OUTSIDE: 2}
    assert len(list(CONVERTERS["visual_genome"](**arguments, allow_outside=True))) == 2

    for folder, suffix, content in (("sentences", "txt", "A dog ."), ("annotations", "xml", "<a></a>")):
        (place / folder).mkdir()
        for name in ("1", "outside"):
            (place / (folder if name == "1" else ".") / f"{name}.{suffix}").write_text(content)
    (place / "ids").write_text("1 ../outside")
    folders = {name: place / name for name in ("images", "sentences", "annotations", "ids")}
    rejects = Rejects()
    assert list(CONVERTERS["flickr30k_entities"](**folders, rejects=rejects)) == []
    assert rejects.counts == {OUTSIDE: 2}


def test_segments(place):
    arguments = files(place, "coco", "../outside/1.jpg") | {"allow_outside": False, "panoptic": place / "panoptic.json"}
    (place / "outside/1.jpg").rename(place / "images/1.jpg")
    arguments |= files(place, "coco", "1.jpg")
    Image.fromarray(np.full((30, 40, 3), 7, np.uint8)).save(place / "outside/1.png")
    (place / "panoptic").mkdir()
    panoptic = {
        "images": [{"id": 1, "file_name": "1.jpg", **SIZE}],
        "annotations": [
            {"image_id": 1, "file_name": "../outside/1.png", "segments_info": [{"id": 460551, "category_id": 18}]}
        ],
        "categories": [{"id": 18, "name": "dog"}],
    }
    (place / "panoptic.json").write_text(json.dumps(panoptic))
    rejects = Rejects()
    (sample,) = CONVERTERS["coco"](**arguments, rejects=rejects)
    assert sample["groundings"] == [] and rejects.counts == {OUTSIDE: 1}
    (sample,) = CONVERTERS["coco"](**arguments | {"allow_outside": True})
    assert len(sample["groundings"]) == 1


def test_rows_that_hold_a_path_and_no_image(place):
    path = str(place / "outside/1.jpg")
    chats = [{"images": [{"bytes": None, "path": path}], "texts": [{"user": "what?", "assistant": "a dog"}]}]
    llava = [{"id": "1", "image": {"bytes": None, "path": path}, "conversations": TURNS}]
    for name, argument, rows in (("cauldron", "data", chats), ("llava", "conversations", llava)):
        arguments = {argument: Dataset.from_list(rows)}
        rejects = Rejects()
        assert list(CONVERTERS[name](**arguments, rejects=rejects)) == []
        assert rejects.counts == {"image is a path, and no folder of images was given": 1}
        assert len(list(CONVERTERS[name](**arguments, allow_outside=True))) == 1


@pytest.mark.parametrize("part", ["images", "labels", "instances"])
def test_label_maps(tmp_path, part):
    for folder, mode in (("images", "RGB"), ("labels", "L"), ("instances", "L")):
        (tmp_path / folder).mkdir()
        Image.new(mode, (8, 6)).save(tmp_path / folder / "1.png")
    (tmp_path / part / "1.png").rename(tmp_path / "1.png")
    (tmp_path / part / "1.png").symlink_to(tmp_path / "1.png")
    arguments = (tmp_path / "images", tmp_path / "labels", ["sky"])
    with pytest.raises(ValueError, match=rf"^{part}: got 1.png, a link that leads out of the folder, expected"):
        LabelMaps(*arguments, instances=tmp_path / "instances")
    assert len(LabelMaps(*arguments, instances=tmp_path / "instances", allow_outside=True)) == 1
    assert len(list(CONVERTERS["label_maps"](*arguments, instances=tmp_path / "instances", allow_outside=True))) == 1
