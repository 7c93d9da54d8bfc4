import json

import pytest

from age_vlm.data.converters.visual_genome import visual_genome
from age_vlm.data.rejects import Rejects


def region(number, image_id, x, y, width, height, phrase):
    return {
        "region_id": number,
        "width": width,
        "height": height,
        "image_id": image_id,
        "phrase": phrase,
        "y": y,
        "x": x,
    }


RECORDS = [
    {
        "regions": [
            region(1382, 1, 21, 7, 12, 9, "the clock is green in colour"),
            region(1383, 1, -2, 20, 60, 15, "shade is along the street \n"),
        ],
        "id": 1,
    },
    {"image_id": 2407890, "regions": [region(1353, 2407890, 0, 0, 9, 9, "a cat sitting on a table.")]},
]


@pytest.fixture
def folder(tmp_path, photograph):
    photograph(tmp_path / "VG_100K/1.jpg")
    photograph(tmp_path / "VG_100K_2/2407890.jpg")
    (tmp_path / "region_descriptions.json").write_text(json.dumps(RECORDS))
    return tmp_path


def test_regions_are_described_and_have_a_box(folder, check, said, phrase):
    first, second = check(visual_genome(folder, folder / "region_descriptions.json"))
    assert (first["id"], second["id"]) == ("visual_genome/1", "visual_genome/2407890")
    assert said(first) == ["the clock is green in colour", "shade is along the street"]
    assert [phrase(first, number) for number in range(2)] == said(first)
    assert [item["box"] for item in first["groundings"]] == [[21, 7, 33, 16], [0, 20, 40, 30]]
    assert all(item["mask"] is None for item in first["groundings"])


def test_some_regions_and_parts(folder, said):
    arguments = folder, folder / "region_descriptions.json"
    first, _ = visual_genome(*arguments, per_image=1)
    assert said(first) == ["the clock is green in colour"]
    assert [sample["id"] for sample in visual_genome(*arguments, shard=(1, 2))] == ["visual_genome/2407890"]


def test_broken_records_are_left_out_and_counted(folder, check, said):
    bad = [
        region(1, 1, 50, 50, 9, 9, "outside"),
        region(2, 1, 5, 5, 0, 9, "flat"),
        region(3, 1, 5, 5, 9, 9, " "),
        region(4, 1, None, 5, 9, 9, "no place"),
        {"region_id": 5},
    ]
    records = [
        {"id": 1, "regions": [*bad, *RECORDS[0]["regions"]]},
        {"id": 1, "regions": []},
        {"id": 3, "regions": RECORDS[0]["regions"]},
        {"regions": []},
        None,
    ]
    (folder / "region_descriptions.json").write_text(json.dumps(records))
    rejects = Rejects()
    (sample,) = check(visual_genome(folder, folder / "region_descriptions.json", rejects=rejects))
    assert len(said(sample)) == 2
    assert rejects.counts == {
        "annotation covers nothing of the image": 2,
        "text is empty": 1,
        "record is malformed (TypeError)": 2,
        "record lacks 'phrase'": 1,
        "no text is left of it": 1,
        "image file is missing": 1,
        "record lacks 'id'": 1,
    }
