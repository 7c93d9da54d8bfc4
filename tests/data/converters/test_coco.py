import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from age_vlm.data.converters.coco import category_words, coco, segment_ids
from age_vlm.data.masks import decode_mask, encode_mask
from age_vlm.data.rejects import Rejects
from age_vlm.data.schema import message_text


WIDTH, HEIGHT = 40, 30
THINGS = {1: "person", 18: "dog", 58: "hot dog"}
STUFF = {**THINGS, 184: "tree-merged", 171: "wall-brick", 187: "sky-other-merged"}


def box(x0, y0, x1, y1):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def polygon(x0, y0, x1, y1):
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def image(number):
    return {
        "license": 4,
        "file_name": f"{number:012d}.jpg",
        "coco_url": f"http://images.cocodataset.org/val2017/{number:012d}.jpg",
        "height": HEIGHT,
        "width": WIDTH,
        "date_captured": "2013-11-14 17:02:52",
        "flickr_url": "http://farm7.staticflickr.com/1_z.jpg",
        "id": number,
    }


def file(images, annotations, categories=None):
    parts = {"info": {"year": 2017}, "licenses": [], "images": images, "annotations": annotations}
    if categories:
        parts["categories"] = [
            {"supercategory": "x", "isthing": int(number in THINGS), "id": number, "name": name}
            for number, name in categories.items()
        ]
    return parts


def caption(number, image_id, text):
    return {"image_id": image_id, "id": number, "caption": text}


def thing(number, image_id, category_id, segmentation, iscrowd=0):
    return {
        "segmentation": segmentation,
        "area": 100.5,
        "iscrowd": iscrowd,
        "image_id": image_id,
        "bbox": [0.0, 0.0, 9.5, 9.5],
        "category_id": category_id,
        "id": number,
    }


# A crowd in the upper left corner, column by column: 5 pixels of each of the first 3 columns.
CROWD = {"counts": [0, 5, HEIGHT - 5, 5, HEIGHT - 5, 5, WIDTH * HEIGHT - 2 * HEIGHT - 5], "size": [HEIGHT, WIDTH]}
CAPTIONS = [
    caption(37, 139, "Two dogs next to a woman.\n"),
    caption(38, 139, "A hot dog  in front of trees, a Brick wall and the sky"),
    caption(39, 139, "A quiet afternoon."),
    caption(40, 285, "A man walks his puppy."),
]
INSTANCES = [
    thing(1, 139, 18, [polygon(4, 6, 12, 14)]),
    thing(2, 139, 18, [polygon(20, 6, 26, 12), polygon(20, 20, 26, 26)]),
    thing(3, 139, 1, CROWD, iscrowd=1),
    thing(4, 139, 1, [polygon(30, 10, 38, 28)]),
    thing(5, 285, 18, [polygon(0, 0, 8, 8)]),
]
# Ids above 255 and above 65535 need the green and the blue channel.
SEGMENTS = {139: {3226956: (184, box(0, 0, 40, 8)), 300: (171, box(0, 8, 40, 20)), 7: (18, box(0, 20, 9, 30))}}


def write(folder, photograph, instances=INSTANCES, captions=CAPTIONS):
    for number in (139, 285):
        photograph(folder / f"val2017/{number:012d}.jpg", WIDTH, HEIGHT)
    images = [image(139), image(285)]
    (folder / "captions_val2017.json").write_text(json.dumps(file(images, captions)))
    (folder / "instances_val2017.json").write_text(json.dumps(file(images, instances, THINGS)))
    panoptic = []
    (folder / "panoptic_val2017").mkdir()
    for number, segments in SEGMENTS.items():
        colors = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        info = []
        for identity, (category, mask) in segments.items():
            colors[mask] = (identity % 256, identity // 256 % 256, identity // 65536)
            info.append({"id": identity, "category_id": category, "iscrowd": 0, "bbox": [0, 0, 1, 1], "area": 1})
        Image.fromarray(colors).save(folder / f"panoptic_val2017/{number:012d}.png")
        panoptic.append({"segments_info": info, "file_name": f"{number:012d}.png", "image_id": number})
    (folder / "panoptic_val2017.json").write_text(json.dumps(file(images, panoptic, STUFF)))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photograph):
    return write(tmp_path_factory.mktemp("coco"), photograph)


def paths(folder, *parts):
    return {part: folder / f"{part}_val2017.json" for part in ("captions", *parts)}


def masks(sample, phrase):
    """Words of each grounding -> its mask."""
    return {phrase(sample, n): decode_mask(item["mask"]) for n, item in enumerate(sample["groundings"])}


def test_captions_are_grounded_in_all_instances_of_what_they_name(folder, check, said, phrase):
    first, second = check(coco(folder / "val2017", **paths(folder, "instances")))
    assert (first["id"], second["id"]) == ("coco/139", "coco/285")
    assert said(first) == [" ".join(item["caption"].split()) for item in CAPTIONS[:3]]
    assert [message_text(item) for item in first["messages"][::2]] == ["describe the picture."] * 3
    grounded = masks(first, phrase)
    # The hot dog is not annotated, and is no dog.
    assert set(grounded) == {"dogs", "woman"}
    assert np.array_equal(grounded["dogs"], box(4, 6, 12, 14) | box(20, 6, 26, 12) | box(20, 20, 26, 26))
    assert np.array_equal(grounded["woman"], box(0, 0, 3, 5) | box(30, 10, 38, 28))
    assert set(masks(second, phrase)) == {"puppy"}


def test_panoptic_segments_ground_what_instances_do_not_know(folder, check, phrase):
    (first, _) = check(coco(folder / "val2017", **paths(folder, "instances", "panoptic")))
    grounded = masks(first, phrase)
    assert set(grounded) == {"dogs", "woman", "trees", "Brick wall"}
    assert np.array_equal(grounded["trees"], box(0, 0, 40, 8))
    assert np.array_equal(grounded["Brick wall"], box(0, 8, 40, 20))
    assert grounded["dogs"][6:14, 4:12].all()

    alone, _ = check(coco(folder / "val2017", **paths(folder, "panoptic"), segments=folder / "panoptic_val2017"))
    assert np.array_equal(masks(alone, phrase)["dogs"], box(0, 20, 9, 30))


def test_captions_alone_and_some_of_them(folder, check, said):
    samples = check(coco(folder / "val2017", **paths(folder), per_image=1, request="what is this?"))
    assert [said(sample) for sample in samples] == [["Two dogs next to a woman."], ["A man walks his puppy."]]
    assert not samples[0]["groundings"] and message_text(samples[0]["messages"][0]) == "what is this?"
    # The folder above, and the names of 2014, will do.
    assert len(list(coco(folder, **paths(folder)))) == 2
    assert [s["id"] for s in coco(folder, **paths(folder, "instances"), shard=(1, 2))] == ["coco/285"]


def test_broken_records_are_left_out_and_counted(tmp_path, photograph, check, phrase, said):
    instances = [
        *INSTANCES[:1],
        thing(6, 139, 18, [polygon(50, 50, 60, 60)]),
        thing(7, 139, 18, [[1, 2]]),
        thing(8, 139, 99, [polygon(1, 1, 5, 5)]),
        thing(9, 139, 1, {"counts": [5], "size": [1, 5]}),
        {"id": 10},
    ]
    captions = [*CAPTIONS, caption(41, 139, " \n"), {"id": 42, "image_id": 139}]
    folder = write(tmp_path, photograph, instances, captions)
    (folder / "val2017/000000000285.jpg").write_bytes(b"\xff\xd8 no image")
    (folder / "panoptic_val2017/000000000139.png").unlink()
    rejects = Rejects()
    (sample,) = check(coco(folder / "val2017", **paths(folder, "instances", "panoptic"), rejects=rejects))
    assert np.array_equal(masks(sample, phrase)["dogs"], box(4, 6, 12, 14))
    assert len(said(sample)) == 3
    assert rejects.counts == {
        "annotation covers nothing of the image": 1,
        "polygon is malformed": 1,
        "category is unknown": 1,
        "image is not of the size that its annotations are for": 1,
        "record lacks 'image_id'": 1,
        "text is empty": 1,
        "record lacks 'caption'": 1,
        "image cannot be read": 1,
        "image file is missing": 1,
    }

    photograph(folder / "val2017/000000000139.jpg", WIDTH + 1, HEIGHT)
    with pytest.warns(UserWarning, match="coco: 2 left out; image is not of the size"):
        assert not list(coco(folder / "val2017", **paths(folder)))


def test_missing_files_are_named(folder):
    for argument in ("captions", "instances", "panoptic"):
        arguments = {**paths(folder, "instances"), argument: "nowhere.json"}
        with pytest.raises(ValueError, match=f"{argument}: got 'nowhere.json', expected a file"):
            list(coco(folder, **arguments))
    with pytest.raises(ValueError, match="segments: got 'nowhere', expected a folder"):
        list(coco(folder, **paths(folder, "panoptic"), segments="nowhere"))


@pytest.mark.parametrize(
    ("category", "words"),
    [
        ("person", {"person", "woman"}),
        ("tree-merged", {"tree"}),
        ("sky-other-merged", {"sky"}),
        ("wall-other-merged", {"wall"}),
        ("floor-wood", {"wood floor", "floor"}),
        ("door-stuff", {"door"}),
        ("dining table", {"dining table", "table"}),
    ],
)
def test_categories_have_words(category, words):
    assert words <= set(category_words(category))
    assert not any("-" in word for word in category_words(category))


@given(st.lists(st.integers(0, 256**3 - 1), min_size=6, max_size=6))
def test_panoptic_ids_are_read_from_the_colours(ids):
    colors = np.array([[i % 256, i // 256 % 256, i // 65536] for i in ids], np.uint8).reshape(2, 3, 3)
    assert segment_ids(colors).tolist() == np.reshape(ids, (2, 3)).tolist()


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_every_span_names_its_category_and_its_mask_lies_in_the_boxes(tmp_path_factory, folder, phrase, data):
    place = tmp_path_factory.getbasetemp()
    boxes = data.draw(
        st.lists(
            st.tuples(
                st.sampled_from(sorted(THINGS)),
                st.integers(0, WIDTH - 2),
                st.integers(0, HEIGHT - 2),
                st.integers(2, WIDTH),
                st.integers(2, HEIGHT),
            ),
            max_size=4,
        )
    )
    words = data.draw(st.lists(st.sampled_from(["dog", "Dogs", "hot dog", "people", "a", "cat", "man"]), min_size=1))
    annotations = [
        thing(number, 139, category, [polygon(x, y, min(x + w, WIDTH), min(y + h, HEIGHT))])
        for number, (category, x, y, w, h) in enumerate(boxes)
    ]
    (place / "captions.json").write_text(json.dumps(file([image(139)], [caption(1, 139, " ".join(words))])))
    (place / "instances.json").write_text(json.dumps(file([image(139)], annotations, THINGS)))
    (sample,) = coco(folder, place / "captions.json", place / "instances.json")
    meant = {"dog": 18, "dogs": 18, "hot dog": 58, "people": 1, "man": 1}
    annotated = {category for category, *_ in boxes}
    found = [phrase(sample, number).lower() for number in range(len(sample["groundings"]))]
    # "hot" is no word of its own here, so a "dog" after it is always part of "hot dog".
    expected = [word.lower() for word in words if meant.get(word.lower()) in annotated]
    assert Counter(found) == Counter(expected)
    for word, item in zip(found, sample["groundings"]):
        union = np.any([box(x, y, x + w, y + h) for category, x, y, w, h in boxes if category == meant[word]], axis=0)
        assert item["mask"] == encode_mask(union)
