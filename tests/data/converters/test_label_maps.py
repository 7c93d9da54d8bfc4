import numpy as np
import pytest
from PIL import Image

from age_vlm.data.converters.label_maps import label_maps
from age_vlm.data.label_maps import LabelMaps, LabelMapsDataset


CLASSES = ("sky", "road", "car")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, photograph):
    folder = tmp_path_factory.mktemp("maps")
    (folder / "labels").mkdir()
    for number in range(3):
        photograph(folder / f"images/{number}.jpg", 48, 36)
        labels = np.zeros((36, 48), np.uint8)
        labels[12:], labels[20:30, 10 * number + 5 : 10 * number + 20] = 1, 2
        Image.fromarray(labels).save(folder / f"labels/{number}.png")
    return folder / "images", folder / "labels"


def test_samples_are_those_of_the_data_set(folders, check):
    options = {"seed": 3, "size": (32, 24)}
    samples = check(label_maps(*folders, CLASSES, length=5, **options))
    expected = LabelMapsDataset(LabelMaps(*folders, CLASSES), length=5, **options)
    assert [sample["id"] for sample in samples] == [sample["id"] for sample in expected]
    assert all(a["groundings"] == b["groundings"] for a, b in zip(samples, expected))
    assert len(list(label_maps(*folders, CLASSES, size=(32, 24)))) == 3
    parts = [list(label_maps(*folders, CLASSES, length=5, shard=(number, 2), **options)) for number in range(2)]
    assert [sample["id"] for sample in parts[1]] == [sample["id"] for sample in samples[1::2]]


def test_an_index_without_a_name_is_refused(folders):
    with pytest.raises(ValueError, match="class index 2, expected 0 to 1"):
        list(label_maps(*folders, CLASSES[:2]))
