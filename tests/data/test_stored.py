"""Data sets by a name."""

import os

import datasets
import pytest

from age_vlm.data.scene_datasets import to_dataset
from age_vlm.data.stored import load_stored


def test_every_kind_of_folder(tmp_path):
    data = to_dataset("train", 3)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(tmp_path / "parts")
    (tmp_path / "parquet").mkdir()
    data.to_parquet(tmp_path / "parquet" / "train.parquet")
    for name in ("one", "parts", "parquet"):
        loaded = load_stored(str(tmp_path / name))
        assert loaded.num_rows == 3 and loaded.features == data.features
    assert load_stored(str(tmp_path / "parts"), "test").num_rows == 1


def test_folders_without_data(tmp_path):
    data = to_dataset("train", 1)
    datasets.DatasetDict(train=data).save_to_disk(tmp_path / "parts")
    (tmp_path / "empty").mkdir()
    for name, split, words in (
        ("parts", "val", "split: got 'val', expected one of train"),
        ("empty", "train", "data: '.*empty' .a folder. cannot be loaded as a data set"),
        ("nowhere", "train", "data: '.*nowhere' .a Hub id, and no folder here. cannot be loaded"),
    ):
        with pytest.raises(ValueError, match=words):
            load_stored(str(tmp_path / name), split)


def test_a_changed_file_with_its_old_time_is_read_again(tmp_path):
    file = tmp_path / "data" / "train.parquet"
    file.parent.mkdir()
    to_dataset("train", 2).to_parquet(file)
    state = file.stat()
    assert load_stored(str(file.parent)).num_rows == 2
    to_dataset("train", 3).to_parquet(file)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert load_stored(str(file.parent)).num_rows == 3
