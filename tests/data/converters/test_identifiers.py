"""Converters that join records by identifiers: what is written as a text or a number is one, what repeats or is not there is
counted, and nothing wins for being the last."""

import json
import pickle

import pytest
from datasets import Dataset

from age_vlm.data.converters import CONVERTERS
from age_vlm.data.rejects import Rejects


SIZE = {"width": 40, "height": 30}
SQUARE = [[2, 2, 20, 2, 20, 20]]
OTHER = [[1, 1, 9, 1, 9, 9]]
SHARED = "identifier stands for different records"


def picture(number, name="1.jpg"):
    return {"id": number, "file_name": name, **SIZE}


def caption(number, image, text="a dog"):
    return {"id": number, "image_id": image, "caption": text}


def thing(number, image, category=18, segmentation=SQUARE):
    return {"id": number, "image_id": image, "category_id": category, "segmentation": segmentation}


def ref(number, annotation=5, image=1, text="a dog"):
    return {"ref_id": number, "ann_id": annotation, "image_id": image, "split": "train", "sentences": [{"sent": text}]}


@pytest.fixture
def run(tmp_path, photograph):
    """(converter, its files) -> (samples, what was left out)."""
    for name in ("1", "2"):
        photograph(tmp_path / f"images/{name}.jpg", **SIZE)

    def convert(name, **files):
        paths = {"images": tmp_path / "images"}
        for argument, content in files.items():
            paths[argument] = tmp_path / f"{argument}.json"
            if argument == "refs":
                paths[argument].write_bytes(pickle.dumps(content, protocol=2))
            elif argument == "data":
                paths[argument] = Dataset.from_list(content)
            else:
                paths[argument].write_text(json.dumps(content))
        rejects = Rejects()
        samples = list(CONVERTERS[name](**paths, rejects=rejects))
        return samples, dict(rejects.counts)

    return convert


def coco(run, images=None, captions=None, things=None, categories=None, instance_images=None):
    images = images or [picture(1)]
    return run(
        "coco",
        captions={"images": images, "annotations": captions or [caption(1, 1)]},
        instances={
            "images": images if instance_images is None else instance_images,
            "annotations": things or [thing(5, 1)],
            "categories": categories or [{"id": 18, "name": "dog"}],
        },
    )


def test_coco_joins_texts_and_numbers(run):
    samples, rejects = coco(
        run,
        images=[picture("1")],
        captions=[caption("7", 1)],
        things=[thing(5, "1", "18")],
        categories=[{"id": 18.0, "name": "dog"}],
        instance_images=[picture(1)],
    )
    assert rejects == {} and len(samples) == 1 and len(samples[0]["groundings"]) == 1


@pytest.mark.parametrize(
    ("arguments", "expected", "samples", "groundings"),
    [
        ({"images": [picture(1), picture("1")]}, {"image repeats": 2}, 1, 1),
        ({"images": [picture(1), picture(1, "2.jpg")]}, {f"image {SHARED}": 4}, 0, 0),
        ({"images": [picture(1), picture(2, "2.jpg")]}, {"image has no captions": 1}, 1, 1),
        ({"captions": [caption(1, 1), caption(1, 1, "a cat"), caption(2, 1)]}, {f"annotation {SHARED}": 2}, 1, 1),
        ({"captions": [caption(1, 1), caption(2, 3)]}, {"image of an annotation is unknown": 1}, 1, 1),
        ({"things": [thing(5, 1), thing("5", 1, segmentation=OTHER)]}, {f"annotation {SHARED}": 2}, 1, 0),
        ({"things": [thing(5, 1), thing(5, 1)]}, {"annotation repeats": 1}, 1, 1),
        ({"things": [thing(5, 1), thing(6, 9)]}, {"image of an annotation is unknown": 1}, 1, 1),
        ({"things": [thing(5, 1), thing(6, 1, 99)]}, {"category is unknown": 1}, 1, 1),
        ({"things": [thing(5, 1), thing(6, True)]}, {"identifier is neither a whole number nor a text": 1}, 1, 1),
        (
            {
                "captions": [caption(1, 1, "a dog and a bird")],
                "things": [thing(5, 1), thing(6, 1, 1)],
                "categories": [{"id": 18, "name": "dog"}, {"id": "18", "name": "cat"}, {"id": 1, "name": "bird"}],
            },
            {f"category {SHARED}": 3},
            1,
            1,
        ),
        ({"instance_images": [picture(1, "2.jpg")]}, {"files name different images for one identifier": 1}, 0, 0),
        ({"instance_images": [picture(1, "COCO_train2014_1.jpg")]}, {}, 1, 1),
    ],
)
def test_coco_counts_what_cannot_be_joined(run, arguments, expected, samples, groundings):
    made, rejects = coco(run, **arguments)
    assert rejects == expected
    assert len(made) == samples and sum(len(sample["groundings"]) for sample in made) == groundings


def instances(*annotations, images=None):
    return {"images": images or [picture(1)], "annotations": annotations, "categories": []}


@pytest.mark.parametrize(
    ("refs", "annotations", "expected", "samples"),
    [
        ([ref("3", "5", "1")], [thing(5, 1)], {}, 1),
        ([ref(3)], [thing("5", "1")], {}, 1),
        ([ref(3), ref("3")], [thing(5, 1)], {"reference repeats": 1}, 1),
        ([ref(3), ref(3, text="a cat"), ref(4)], [thing(5, 1)], {f"reference {SHARED}": 2}, 1),
        ([ref(3)], [thing(5, 1), thing(5, 1, segmentation=OTHER)], {f"annotation {SHARED}": 3}, 0),
        ([ref(3)], [thing(5, 1), thing(5, 2, segmentation=OTHER)], {"image of an annotation is unknown": 1}, 1),
        ([ref(3), ref(4, 6)], [thing(5, 1)], {"instances lack its image or annotation": 1}, 1),
        ([ref(3), ref(4, image=8)], [thing(5, 1)], {"instances lack its image or annotation": 1}, 1),
    ],
)
def test_refcoco(run, refs, annotations, expected, samples):
    made, rejects = run("refcoco", refs=refs, instances=instances(*annotations))
    assert (rejects, len(made)) == (expected, samples)


def test_refcoco_with_two_images_of_one_identifier(run):
    file = instances(thing(5, 1), images=[picture(1), picture("1", "2.jpg")])
    made, rejects = run("refcoco", refs=[ref(3)], instances=file)
    assert made == [] and rejects == {f"image {SHARED}": 3}


def test_rows_of_refcoco(run):
    def row(number, **changes):
        raw = {"raw_anns": json.dumps(thing(5, 1)), "raw_image_info": json.dumps(picture("1"))}
        return ref(number) | raw | changes

    elsewhere = json.dumps(thing(5, 2))
    rows = [row(3), row(3), row(4, image_id=2), row(5, ann_id=6), row(6, raw_anns=elsewhere)]
    made, rejects = run("refcoco_hub", data=rows)
    assert [sample["id"] for sample in made] == ["refcoco/3"]
    assert rejects == {"reference repeats": 1, "identifiers of the record do not agree": 3}


def test_visual_genome(run):
    def record(number, *images, **more):
        regions = [{"phrase": "a dog", "x": 1, "y": 2, "width": 3, "height": 4, "image_id": image} for image in images]
        return {"id": number, "regions": regions, **more}

    made, rejects = run(
        "visual_genome",
        regions=[
            record(1, 1, "1", 2),
            record("1", 1),
            record(2, 2, image_id=1),
            record(True, 1),
            record(None, 1),
            record(3, 3),
        ],
    )
    assert [sample["id"] for sample in made] == ["visual_genome/1"] and len(made[0]["groundings"]) == 2
    assert rejects == {
        "region is of another image": 1,
        "image repeats": 1,
        "identifiers of the record do not agree": 1,
        "identifier is neither a whole number nor a text": 1,
        "identifier is missing": 1,
        "image file is missing": 1,
    }


def test_flickr30k_entities(tmp_path, photograph):
    box = "<bndbox><xmin>2</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    for name, file in (("1", "1.jpg"), ("2", "1.jpg")):
        photograph(tmp_path / f"images/{name}.jpg", **SIZE)
        for folder, suffix, content in (
            ("sentences", "txt", "[/EN#7/people A man] waits ."),
            (
                "annotations",
                "xml",
                f"<a><filename>{file}</filename><object><name> 7 </name><name>7</name>{box}</object></a>",
            ),
        ):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{name}.{suffix}").write_text(content)
    (tmp_path / "ids").write_text("1\n2\n1\n")
    rejects = Rejects()
    folders = {name: tmp_path / name for name in ("images", "sentences", "annotations", "ids")}
    (sample,) = CONVERTERS["flickr30k_entities"](**folders, rejects=rejects)
    assert sample["id"] == "flickr30k/1" and len(sample["groundings"]) == 1
    assert rejects.counts == {"image repeats": 1, "file of annotations is of another image": 1}
