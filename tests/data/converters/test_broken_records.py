"""Whatever a record holds, a conversion goes on: valid files with one value replaced by any other."""

import copy
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from age_vlm.data.converters import CONVERTERS
from age_vlm.data.rejects import Rejects
from age_vlm.data.schema import validate_sample


SIZE = {"width": 40, "height": 30}
IMAGE = {"id": 1, "file_name": "1.jpg", **SIZE}
SQUARE = [2, 2, 20, 2, 20, 20]
RLE = {"size": [30, 40], "counts": [100, 50, 1050]}
SENTENCE = {"tokens": ["a", "dog"], "raw": "A dog", "sent_id": 0, "sent": "a dog"}
REF = {"ref_id": 1, "ann_id": 1, "image_id": 1, "split": "train", "sentences": [SENTENCE], "category_id": 18}
DOG = {"id": 18, "name": "dog"}
SEGMENT = {"id": 0, "category_id": 18, "iscrowd": 0}


def instances(segmentation):
    annotation = {"id": 1, "image_id": 1, "category_id": 18, "segmentation": segmentation, "iscrowd": 0}
    return {"images": [IMAGE], "annotations": [annotation], "categories": [DOG]}


CAPTIONS = {"images": [IMAGE], "annotations": [{"id": 1, "image_id": 1, "caption": "a dog"}]}
PANOPTIC = {
    "images": [IMAGE],
    "annotations": [{"image_id": 1, "file_name": "1.png", "segments_info": [SEGMENT]}],
    "categories": [DOG],
}
TURNS = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a dog"}]
REGION = {"region_id": 1, "phrase": "a dog", "x": 1, "y": 2, "width": 3, "height": 4}
# Converter -> its files by argument: a good record, and one to be spoilt.
FILES = {
    "llava": {"conversations": [{"id": "1", "image": "1.jpg", "conversations": TURNS}]},
    "visual_genome": {"regions": [{"image_id": 1, "regions": [REGION]}]},
    "coco": {"captions": CAPTIONS, "instances": instances([SQUARE]), "panoptic": PANOPTIC},
    "refcoco": {"refs": [REF], "instances": instances(RLE)},
}
# Converter -> arguments with which it may read them.
ARGUMENTS = {"coco": [{}, {"questions": ["presence", "count", "where"], "min_area": 0.0}]}
VALUES = st.one_of(
    st.none(),
    st.sampled_from([True, -1, 0, 10**400, 1e300, "", "x", "../1.jpg", "/", "\0"]),
    st.sampled_from([[], {}, [[]], [{}], [None], {"counts": "0"}, [[1, 2, 3, 4]], [1] * 6]),
)


def places(value, path=()):
    """Paths of all values inside this one."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def spoilt(value, path, new):
    value = copy.deepcopy(value)
    place = value
    for key in path[:-1]:
        place = place[key]
    if new is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = new
    return value


def write(folder, argument, content):
    if argument == "refs":
        path = folder / "refs(unc).p"
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        path = folder / f"{argument}.json"
        path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photograph):
    folder = tmp_path_factory.mktemp("broken")
    photograph(folder / "images/1.jpg", **SIZE)
    photograph(folder / "panoptic/1.png", **SIZE)
    return folder


@pytest.mark.parametrize("name", sorted(FILES))
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_broken_record_never_stops_a_conversion(folder, name, data):
    files = FILES[name]
    broken = data.draw(st.sampled_from(sorted(files)))
    # The parts of a file are there: a file of another form is a wrong argument, not a broken record.
    path = data.draw(
        st.sampled_from([path for path in places(files[broken]) if len(path) > isinstance(files[broken], dict)])
    )
    content = spoilt(files[broken], path, data.draw(VALUES | st.just(...)))
    if broken == "refs":
        content.append({**REF, "ref_id": 2, "sentences": []})
    paths = {
        argument: write(folder, argument, content if argument == broken else files[argument]) for argument in files
    }
    rejects = Rejects()
    paths |= data.draw(st.sampled_from(ARGUMENTS.get(name, [{}])))
    for sample in CONVERTERS[name](images=folder / "images", rejects=rejects, **paths):
        validate_sample(sample)
    assert all(0 < len(reason) < 80 and "\n" not in reason for reason in rejects.counts)
