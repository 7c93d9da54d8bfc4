import json

import ijson
import pytest
from datasets import Dataset, Features, Image, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from age_vlm.data.converters import records
from age_vlm.data.converters.records import read_coco, read_json, read_table
from age_vlm.data.rejects import Rejects


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


def entries_of(value):
    if isinstance(value, list):
        return [(None, item) for item in value]
    return [(key, entry) for key, item in value.items() for entry in (item if isinstance(item, list) else [item])]


@given(
    st.lists(VALUES, max_size=4) | st.dictionaries(st.text(max_size=4), VALUES, max_size=4),
    st.sampled_from([None, 2]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_json_is_read_as_a_whole_parser_reads_it(tmp_path_factory, value, indent, ascii):
    path = tmp_path_factory.getbasetemp() / "any.json"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text(json.dumps(value, indent=indent, ensure_ascii=ascii), encoding)
        assert list(read_json(path, "file")) == entries_of(value)


def test_elements_come_before_the_file_is_read_to_its_end(tmp_path):
    path = tmp_path / "cut.json"
    path.write_text("[" + ",".join(json.dumps({"number": number, "long": "x" * 1000}) for number in range(1000)))
    entries = read_json(path, "file")
    assert [next(entries)[1]["number"] for _ in range(900)] == list(range(900))
    with pytest.raises(ValueError, match=r"file: got '.*cut.json', expected a whole JSON file") as caught:
        list(entries)
    assert "\n" not in str(caught.value)


def test_a_fault_is_found_without_reading_on(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text("[{a: 1}," + "0," * 1_000_000 + "0]")
    with path.open("rb") as file:
        with pytest.raises(ijson.JSONError):
            list(records._entries(file))
        assert file.tell() < 500_000


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "[NaN]",
        "[Infinity]",
        "[1 2]",
        "[1,]",
        '{"a" 1}',
        "[1] 2",
        '["a',
        '{"a": [1}',
        b"[\xff\xfe]",
    ],
)
def test_what_is_not_json_is_refused(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="file: got .*, expected a whole JSON file"):
        list(read_json(path, "file"))


def test_lines_are_read_one_by_one_and_a_broken_one_is_none(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": \n[2]\n')
    assert list(read_json(path, "file")) == [(None, {"a": 1}), (None, None), (None, [2])]
    with pytest.raises(ValueError, match="file: got 'nowhere.json', expected a file"):
        list(read_json("nowhere.json", "file"))


def test_a_coco_file_keeps_what_is_wanted_and_counts_what_is_broken(tmp_path):
    path = tmp_path / "a.json"
    annotations = [{"id": 1, "image_id": 5}, {"id": 2, "image_id": 6}, {"id": 3}, None]
    path.write_text(
        json.dumps(
            {
                "info": {"year": 2017},
                "annotations": annotations,
                "images": [{"id": 5}, {"id": 6}, {}],
                "categories": [{"id": 1, "name": "dog"}],
            }
        )
    )
    rejects = Rejects()
    file = read_coco(path, "file", rejects, wanted={"5"})
    assert dict(file.images.items()) == {"5": {"id": "5"}, "6": {"id": "6"}}
    assert dict(file.categories.items()) == {"1": "dog"}
    assert file.annotations.keys() == {"5"} and file.annotations_of("5") == [{"id": "1", "image_id": "5"}]
    assert file.annotations_of("6") == []
    assert rejects.counts == {
        "record lacks 'image_id'": 1,
        "record is malformed (TypeError)": 1,
        "record lacks 'id'": 1,
    }


def test_identifiers_of_a_coco_file_are_matched_or_counted(tmp_path):
    path = tmp_path / "a.json"
    parts = {
        "annotations": [
            {"id": 1, "image_id": "5"},
            {"id": "2", "image_id": 5.0},
            {"id": 1, "image_id": 5},
            {"id": 1, "image_id": 6},
            {"id": 3, "image_id": 7},
            {"image_id": 5, "caption": "a"},
            {"image_id": 5, "caption": "b"},
            {"id": 4, "image_id": 8, "caption": "a"},
            {"id": "4", "image_id": 8, "caption": "b"},
            {"image_id": 9, "segments_info": [1]},
            {"image_id": 9, "segments_info": [2]},
            {"id": 5, "image_id": True},
        ],
        "images": [{"id": 5}, {"id": "6"}, {"id": 8}, {"id": 9}, {"id": 9}, {"id": 10, "a": 1}, {"id": "10"}],
        "categories": [{"id": 1, "name": "dog"}, {"id": "1", "name": "cat"}, {"id": 2, "name": "bird"}],
    }
    path.write_text(json.dumps(parts))
    rejects = Rejects()
    file = read_coco(path, "file", rejects)
    assert [image for image, _ in file.images.items()] == ["5", "6", "8", "9"]
    assert dict(file.categories.items()) == {"2": "bird"}
    assert len(file.annotations_of("5")) == 4 and len(file.annotations_of("6")) == 1
    assert file.annotations_of("8") == [] == file.annotations_of("9")
    assert rejects.counts == {
        "image of an annotation is unknown": 1,
        "annotation identifier stands for different records": 4,
        "identifier is neither a whole number nor a text": 1,
        "image repeats": 1,
        "annotation repeats": 1,
        "image identifier stands for different records": 2,
        "category identifier stands for different records": 2,
    }


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A data set with images, and the folder that holds it in three files."""
    folder = tmp_path_factory.mktemp("table")
    features = Features({"number": Value("int32"), "images": [Image()]})
    rows = [{"number": number, "images": [{"bytes": b"no image", "path": None}]} for number in range(7)]
    data = Dataset.from_list(rows, features=features)
    for number in range(3):
        data.shard(3, number).to_parquet(folder / f"train-{number:05d}-of-00003.parquet")
    data.select([0]).to_parquet(folder / "test-00000-of-00001.parquet")
    return data, folder


@pytest.mark.parametrize("parts", [1, 3, 4])
def test_parts_of_a_table_make_the_whole(table, parts):
    data, folder = table
    for source in (data, data.to_iterable_dataset(), folder, str(folder)):
        rows = [row for number in range(parts) for row in read_table(source, "data", (number, parts))]
        assert sorted(row["number"] for row in rows) == list(range(7))
        assert all(row["images"] == [{"bytes": b"no image", "path": None}] for row in rows)


def test_a_table_has_splits_and_may_be_one_file(table):
    _, folder = table
    assert [row["number"] for row in read_table(folder, "data", (0, 1), split="test")] == [0]
    assert [row["number"] for row in read_table(folder / "test-00000-of-00001.parquet", "data", (0, 1))] == [0]
    with pytest.raises(
        ValueError, match="data: got .*, expected a data set of the Hub, or a folder or file of parquet"
    ) as caught:
        read_table("nobody/has-this", "data", (0, 1))
    assert "\n" not in str(caught.value)
