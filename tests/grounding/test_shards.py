import pytest

from age_vlm.grounding.shards import ShardFolder


MANIFEST = {"data": {"fingerprint": "a"}, "settings": {"min_score": 0.5}, "shards": 3}


def test_a_run_is_claimed_and_continued(tmp_path):
    folder = ShardFolder(tmp_path / "out", MANIFEST)
    folder.claim()
    assert folder.missing() == [0, 1, 2]
    folder.samples(1).touch()
    unfinished = folder.samples(2).with_name(f".{folder.name(2)}.parquet.abcd0123.part")
    unfinished.touch()
    again = ShardFolder(tmp_path / "out", MANIFEST)
    again.claim()
    assert again.missing() == [0, 2] and not unfinished.exists()


def test_a_run_that_was_killed_before_its_manifest_was_there(tmp_path):
    for name in ("data", "phrases"):
        (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / ".manifest.json.abcd0123.part").touch()
    ShardFolder(tmp_path / "out", MANIFEST).claim()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data", "manifest.json", "phrases"]


def test_another_run_is_refused(tmp_path):
    ShardFolder(tmp_path, MANIFEST).claim()
    words = "holds a run with settings.min_score 0.5, this one has 0.3, expected the same, or another folder"
    with pytest.raises(ValueError, match=words):
        ShardFolder(tmp_path, {**MANIFEST, "settings": {"min_score": 0.3}}).claim()
    with pytest.raises(ValueError, match="teacher.weights 'not set', this one has 'abc'"):
        ShardFolder(tmp_path, {**MANIFEST, "teacher": {"weights": "abc"}}).claim()
    for content in ("{", "[]", "null"):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match="output: .*manifest.json' is damaged"):
            ShardFolder(tmp_path, MANIFEST).claim()


def test_only_what_is_ours_is_cleared_away(tmp_path):
    folder = ShardFolder(tmp_path, MANIFEST)
    folder.claim()
    kept = [
        tmp_path / ".film.part",
        tmp_path / ".git" / ".manifest.json.abcd0123.part",
        tmp_path / "data" / ".film.mkv.abcd0123.part",
        tmp_path / "data" / ".train-00007-of-00003.parquet.abcd0123.part",
    ]
    (tmp_path / ".git").mkdir()
    for path in kept:
        path.touch()
    folder.phrases(0).with_name(f".{folder.phrases(0).name}.abcd0123.part").touch()
    ShardFolder(tmp_path, MANIFEST).claim()
    assert all(path.exists() for path in kept) and not list((tmp_path / "phrases").iterdir())


def test_other_things_are_left_alone(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").touch()
    (tmp_path / "file").touch()
    for name in ("folder", "file"):
        with pytest.raises(ValueError, match=f"output: '.*{name}' is not a folder of `age-vlm ground`"):
            ShardFolder(tmp_path / name, MANIFEST).claim()
