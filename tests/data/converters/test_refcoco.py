import io
import json
import pickle

import numpy as np
import pytest
from datasets import Dataset

from age_vlm.data.converters.refcoco import image_names, refcoco, refcoco_hub
from age_vlm.data.masks import decode_mask
from age_vlm.data.rejects import Rejects
from age_vlm.data.schema import message_text


WIDTH, HEIGHT = 40, 30


def sentence(number, text):
    return {"tokens": text.split(), "raw": text.upper(), "sent_id": number, "sent": text}


def ref(number, ann_id, image_id, *texts, split="train"):
    sentences = [sentence(10 * number + index, text) for index, text in enumerate(texts)]
    return {
        "sent_ids": [item["sent_id"] for item in sentences],
        "file_name": f"COCO_train2014_{image_id:012d}_{ann_id}.jpg",
        "ann_id": ann_id,
        "ref_id": number,
        "image_id": image_id,
        "split": split,
        "sentences": sentences,
        "category_id": 1,
    }


def image(image_id):
    return {
        "license": 1,
        "file_name": f"COCO_train2014_{image_id:012d}.jpg",
        "height": HEIGHT,
        "width": WIDTH,
        "id": image_id,
    }


def annotation(ann_id, image_id, x0, y0, x1, y1):
    return {
        "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
        "area": float((x1 - x0) * (y1 - y0)),
        "iscrowd": 0,
        "image_id": image_id,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "category_id": 1,
        "id": ann_id,
    }


REFS = [
    ref(0, 1719310, 581857, "the lady with the blue shirt", "lady w back to us"),
    ref(1, 489209, 581857, "guy on right"),
    ref(2, 1719311, 98304, "the red bus", split="val"),
]
ANNOTATIONS = [
    annotation(1719310, 581857, 2, 3, 20, 28),
    annotation(489209, 581857, 25, 0, 40, 30),
    annotation(1719311, 98304, 5, 5, 15, 15),
]


class AsInPython2(pickle._Pickler):
    """Texts as the byte strings of Python 2, as some of the released files have them."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_str(self, value):
        self.write(pickle.SHORT_BINSTRING + bytes([len(value)]) + value.encode())
        self.memoize(value)

    dispatch[str] = save_str


def pickled(refs, old=False):
    if not old:
        return pickle.dumps(refs, protocol=2)
    stream = io.BytesIO()
    AsInPython2(stream, protocol=2).dump(refs)
    return stream.getvalue()


@pytest.fixture
def write(tmp_path, photograph):
    def make(refs=REFS, annotations=ANNOTATIONS, **options):
        for number in (581857, 98304):
            photograph(tmp_path / f"train2014/COCO_train2014_{number:012d}.jpg", WIDTH, HEIGHT)
        parts = {
            "info": {"version": "1.0"},
            "images": [image(581857), image(98304)],
            "licenses": [],
            "annotations": annotations,
            "categories": [{"supercategory": "person", "id": 1, "name": "person"}],
        }
        (tmp_path / "instances.json").write_text(json.dumps(parts))
        (tmp_path / "refs(unc).p").write_bytes(pickled(refs, **options))
        return tmp_path / "train2014", tmp_path / "refs(unc).p", tmp_path / "instances.json"

    return make


def mask_of(item):
    rows, columns = np.nonzero(decode_mask(item["mask"]))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.mark.parametrize("old", [False, True])
def test_every_expression_of_an_object_is_grounded_in_its_mask(write, check, said, phrase, old):
    lady, guy = check(refcoco(*write(old=old)))
    assert (lady["id"], guy["id"]) == ("refcoco/0", "refcoco/1")
    assert said(lady) == ["the lady with the blue shirt", "lady w back to us"]
    assert [phrase(lady, number) for number in range(2)] == said(lady)
    assert [mask_of(item) for item in lady["groundings"]] == [(2, 3, 20, 28)] * 2
    assert mask_of(guy["groundings"][0]) == (25, 0, 40, 30)
    assert message_text(lady["messages"][0]) == "describe one thing in the picture."


def test_splits_and_parts(write):
    paths = write()
    assert [sample["id"] for sample in refcoco(*paths, "val")] == ["refcoco/2"]
    assert [sample["id"] for sample in refcoco(*paths, shard=(1, 2))] == ["refcoco/1"]
    with pytest.raises(ValueError, match=r"split: got 'testA', expected one of train, val"):
        list(refcoco(*paths, "testA"))


def test_images_of_2017_are_those_of_2014(write, photograph):
    images, *paths = write()
    photograph(images.parent / "train2017/000000581857.jpg", WIDTH, HEIGHT)
    assert len(list(refcoco(images.parent / "train2017", *paths))) == 2
    assert image_names("COCO_train2014_000000581857.jpg")[1:3] == [
        "COCO_train2014_000000581857.jpg",
        "000000581857.jpg",
    ]


def test_broken_records_are_left_out_and_counted(write, check):
    refs = [
        *REFS,
        ref(3, 1, 581857, "no such annotation"),
        ref(4, 489209, 7, "no such image"),
        ref(5, 489209, 581857, " ", "but a good one"),
        ref(6, 489209, 581857),
        ref(7, 2, 581857, "far away"),
        {"ref_id": 8},
        None,
    ]
    rejects = Rejects()
    outside = annotation(2, 581857, 50, 50, 60, 60)
    samples = check(refcoco(*write(refs, [*ANNOTATIONS, outside]), rejects=rejects))
    assert [sample["id"] for sample in samples] == ["refcoco/0", "refcoco/1", "refcoco/5"]
    assert rejects.counts == {
        "instances lack its image or annotation": 2,
        "text is empty": 1,
        "no text is left of it": 1,
        "annotation covers nothing of the image": 1,
        "record lacks 'ann_id'": 1,
        "record is malformed (TypeError)": 1,
    }


def test_a_pickle_that_is_more_than_data_is_refused(write, tmp_path):
    images, refs, instances = write()
    for content, says in (
        (pickle.dumps([print]), "it asks for builtins.print"),
        (b"no pickle", "refs: got .*, expected a pickle of plain data"),
        (pickle.dumps({}), "refs: got .* with a dict, expected a list"),
    ):
        refs.write_bytes(content)
        with pytest.raises(ValueError, match=says):
            list(refcoco(images, refs, instances))


def test_the_tables_of_the_hub_say_the_same(write, check, said, phrase, tmp_path):
    paths = write()
    rows = [
        {
            **item,
            "raw_anns": json.dumps(ann),
            "raw_image_info": json.dumps(image(item["image_id"])),
            "raw_sentences": json.dumps(item["sentences"]),
            "image_path": f"coco/train2014/COCO_train2014_{item['image_id']:012d}.jpg",
            "bbox": [0.0, 0.0, 1.0, 1.0],
            "captions": [each["sent"] for each in item["sentences"]],
            "global_image_id": f"coco.{item['image_id']}",
            "anns_id": f"coco.{ann['id']}",
        }
        for item, ann in zip(REFS, ANNOTATIONS)
    ]
    Dataset.from_list(rows[:2]).to_parquet(tmp_path / "hub/data/train-00000-of-00001.parquet")
    Dataset.from_list(rows[2:]).to_parquet(tmp_path / "hub/data/validation-00000-of-00001.parquet")
    ours, theirs = list(refcoco(*paths)), check(refcoco_hub(paths[0], tmp_path / "hub"))
    for a, b in zip(ours, theirs, strict=True):
        assert (a["id"], a["messages"], a["groundings"]) == (b["id"], b["messages"], b["groundings"])
    assert [s["id"] for s in refcoco_hub(paths[0], tmp_path / "hub", split="validation")] == ["refcoco/2"]

    rejects = Rejects()
    broken = Dataset.from_list([rows[0] | {"raw_anns": "{"}, rows[0] | {"raw_anns": None}])
    assert not list(refcoco_hub(paths[0], broken, rejects=rejects))
    assert rejects.counts == {"record is malformed (JSONDecodeError)": 1, "instances lack its image or annotation": 1}
