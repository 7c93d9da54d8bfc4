import json
import subprocess
import sys
import textwrap

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from age_vlm.data.masks import decode_mask, encode_mask
from age_vlm.data.scene_datasets import to_dataset
from age_vlm.data.schema import FEATURES, validate_sample
from age_vlm.grounding import Prompt, load_teacher
from age_vlm.grounding.annotated import AnnotatedTeacher
from age_vlm.grounding.run import GroundSettings, ground


@pytest.fixture(scope="module")
def scenes():
    return to_dataset("train", 7)


@pytest.fixture(scope="module")
def annotated():
    return load_teacher("annotated", device="cpu")


def run(data, folder, teacher, batch_size=8, **settings):
    return ground(data, folder, teacher, GroundSettings(**settings), batch_size=batch_size, progress=False)


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def records(folder):
    return [json.loads(line) for path in sorted((folder / "phrases").iterdir()) for line in path.open()]


def load(folder):
    return datasets.load_dataset(str(folder), split="train", cache_dir=folder.parent / "cache")


def image_row(phrases, boxes=None, **changes):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    return {"image": picture, "phrases": phrases, "boxes": boxes, **changes}


def test_annotated_data_come_out_as_they_went_in(scenes, annotated, tmp_path):
    summary = run(scenes, tmp_path / "out", annotated, shard_size=3)
    assert sorted(tree(tmp_path / "out")) == [
        *(f"data/train-{shard:05d}-of-00003.parquet" for shard in range(3)),
        "manifest.json",
        *(f"phrases/train-{shard:05d}-of-00003.jsonl" for shard in range(3)),
        "report.html",
    ]
    loaded = load(tmp_path / "out")
    assert loaded.features == FEATURES
    assert loaded[:] | {"images": []} == scenes[:] | {"images": []}
    for sample, expected in zip(loaded, scenes):
        validate_sample(sample)
        assert sample["images"][0].tobytes() == expected["images"][0].tobytes()
    assert (summary.samples, summary.phrases) == (7, sum(map(len, scenes["groundings"])))
    assert summary.rejected_samples.total == summary.rejected_phrases.total == 0 and summary.iou is None
    files = str(tmp_path / "out" / "data" / "*.parquet")
    assert datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=tmp_path / "cache").num_rows == 7


def test_the_order_of_shards_and_batches_does_not_matter(scenes, sam2_teacher, tmp_path):
    run(scenes, tmp_path / "one", sam2_teacher, shard_size=7, min_score=0.0)
    run(scenes, tmp_path / "many", sam2_teacher, shard_size=2, batch_size=3, min_score=0.0)
    one, many = load(tmp_path / "one"), load(tmp_path / "many")
    for sample, other in zip(one, many, strict=True):
        for a, b in zip(sample["groundings"], other["groundings"], strict=True):
            assert (decode_mask(a["mask"]) != decode_mask(b["mask"])).mean() < 0.002


def test_masks_are_those_of_the_teacher(sam2_teacher, tmp_path):
    row = image_row(["dog", "cat"], [[1, 2, 30, 20], [0, 0, 12.5, 29]])
    run([row], tmp_path / "out", sam2_teacher, min_score=0.0)
    (sample,) = load(tmp_path / "out")
    asked = [Prompt(phrase, tuple(box)) for phrase, box in zip(row["phrases"], row["boxes"])]
    for item, found in zip(sample["groundings"], sam2_teacher.ground([row["image"]], [asked])[0], strict=True):
        np.testing.assert_array_equal(decode_mask(item["mask"]), found.masks[0])
    assert [item["box"] for item in sample["groundings"]] == row["boxes"]
    for record, found in zip(records(tmp_path / "out"), sam2_teacher.ground([row["image"]], [asked])[0]):
        assert record["score"] == pytest.approx(float(found.scores[0]), abs=1e-6)
        assert record["area"] == pytest.approx(found.masks.mean(), abs=1e-6)


def test_overlap_with_masks_that_the_data_has(scenes, sam2_teacher, tmp_path):
    summary = run(scenes.select([0]), tmp_path / "out", sam2_teacher, min_score=0.0)
    overlaps = []
    for item, other in zip(load(tmp_path / "out")[0]["groundings"], scenes[0]["groundings"], strict=True):
        a, b = decode_mask(item["mask"]), decode_mask(other["mask"])
        overlaps.append((a & b).sum() / (a | b).sum())
    assert summary.iou == pytest.approx(np.mean(overlaps), abs=1e-5)


def masked_row(area):
    mask = np.zeros((10, 10), bool)
    mask.reshape(-1)[:area] = True
    messages = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": f"{area} dots"}]}
    ]
    item = {"message": 0, "start": 0, "end": 2, "image": 0, "mask": encode_mask(mask), "box": None}
    return {"id": str(area), "images": [Image.new("RGB", (10, 10))], "messages": messages, "groundings": [item]}


def test_limits_of_the_area(annotated, tmp_path):
    rows = [masked_row(area) for area in (0, 9, 10, 60, 61)]
    summary = run(rows, tmp_path / "out", annotated, min_area=0.1, max_area=0.6)
    assert [len(sample["groundings"]) for sample in load(tmp_path / "out")] == [0, 0, 1, 1, 0]
    assert summary.rejected_phrases.counts == {
        "its mask is empty": 1,
        "its mask covers less than 0.1 of the image": 1,
        "its mask covers more than 0.6 of the image": 1,
    }
    # What was found all the same, so that a person can judge the limits.
    assert [
        record["mask"] == item["groundings"][0]["mask"]
        for record, item in zip(records(tmp_path / "out"), rows)
        if "mask" in record
    ] == [True] * 3


def test_least_score(sam2_teacher, tmp_path):
    rows = [image_row(["a", "b", "c"], [[0, 0, 9, 9], [3, 3, 30, 20], [20, 1, 39, 29]])]
    run(rows, tmp_path / "all", sam2_teacher, min_score=0.0)
    scores = [record["score"] for record in records(tmp_path / "all")]
    middle = round(float(np.median(scores)), 3)
    summary = run(rows, tmp_path / "some", sam2_teacher, min_score=middle)
    assert summary.phrases == sum(score >= middle for score in scores) < 3
    assert summary.rejected_phrases.counts == {f"its score is below {middle:g}": 3 - summary.phrases}


def test_what_cannot_be_used_is_left_out_and_counted(sam2_teacher, tmp_path):
    rows = [
        image_row(["dog"], [[1, 1, 9, 9]]),
        image_row(["dog"], [[1, 1, 9, 9]], image={"bytes": b"\xff\xd8 no image", "path": None}, id="broken"),
        image_row(["dog", "cat"], [[1, 1, 9, 9], None]),
        image_row(["dog"], "box"),
        image_row(["dog"], [[1, 1, 9, 9]], image={"bytes": None, "path": "/nowhere.png"}),
    ]
    summary = run(rows, tmp_path / "out", sam2_teacher, shard_size=1, min_score=0.0)
    assert (summary.samples, summary.phrases) == (2, 2)
    assert summary.rejected_samples.counts == {
        "image cannot be read": 1,
        "it does not follow the schema": 1,
        "image file is missing": 1,
    }
    assert summary.rejected_samples.examples["image cannot be read"] == "broken"
    assert summary.rejected_phrases.counts == {"there is neither a box nor a point for it": 1}
    assert summary.rejected_phrases.examples["there is neither a box nor a point for it"] == "'cat' of 2"
    # Shards of which nothing is left do not get in the way of those that have something.
    assert load(tmp_path / "out")["id"] == ["0", "2"]


def test_text_prompts_and_samples_without_phrases(sam3_teacher, tmp_path):
    rows = [image_row(["red dog"]), image_row([], caption="nothing to see")]
    summary = run(rows, tmp_path / "out", sam3_teacher, min_score=0.0)
    loaded = load(tmp_path / "out")
    assert (summary.samples, summary.phrases) == (2, 1)
    assert [len(sample["groundings"]) for sample in loaded] == [1, 0]


def test_a_finished_run_is_not_done_again(scenes, annotated, tmp_path):
    run(scenes, tmp_path / "out", annotated, shard_size=3)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "data").iterdir()}
    summary = run(scenes, tmp_path / "out", annotated, shard_size=3)
    assert summary.samples == 7
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "data").iterdir()} == before


def test_another_run_into_the_same_folder_is_refused(scenes, annotated, sam2_teacher, tmp_path):
    run(scenes, tmp_path, annotated)
    before = tree(tmp_path)
    for data, teacher, settings, words in (
        (scenes, annotated, {"min_score": 0.3}, "settings.min_score 0.5, this one has 0.3"),
        (scenes, sam2_teacher, {}, "output: .* holds a run with teacher"),
        (scenes.select([1, 2]), annotated, {}, "output: .* holds a run with data"),
    ):
        with pytest.raises(ValueError, match=words):
            run(data, tmp_path, teacher, **settings)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"min_score": 1.5}, "min_score: got 1.5"),
        ({"min_score": float("nan")}, "min_score: got nan"),
        ({"min_area": 0.5, "max_area": 0.5}, "min_area, max_area: got 0.5 and 0.5"),
        ({"max_area": 2}, "min_area, max_area: got 0.0 and 2"),
        ({"shard_size": 0}, "shard_size: got 0"),
        ({"batch_size": 0}, "batch_size: got 0"),
    ],
)
def test_settings_that_cannot_be(scenes, annotated, tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        run(scenes, tmp_path / "out", annotated, **settings)
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_too_small(scenes, tmp_path):
    class Large(AnnotatedTeacher):
        def _ground(self, images, prompts):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ValueError, match="batch_size: 4 images at once do not fit into the memory of the device"):
        run(scenes, tmp_path / "out", Large(), batch_size=4)


KILLED = textwrap.dedent(
    """
    import os, random, signal, sys, time
    from pathlib import Path
    from age_vlm.data.scene_datasets import ScenesDataset
    from age_vlm.grounding import load_teacher
    from age_vlm.grounding.run import GroundSettings, ground

    scenes = ScenesDataset("train", 40)
    drawn = [scenes[place] for place in range(40)]
    # A corrupt one, so that what is left out is also told once only.
    drawn[7] = {**drawn[7], "images": [{"bytes": b"", "path": None}]}

    class Slow:
        def __len__(self):
            return len(drawn)

        def __getitem__(self, place):
            time.sleep(0.01)
            return drawn[place]

    def start(folder, operations=None):
        # A process that is killed just before so many operations on files of the run, or by its parent.
        process = os.fork()
        if process:
            return process
        left = [operations]

        def count(event, arguments):
            if event in ("open", "os.rename", "os.chmod", "os.remove") and str(arguments[0]).startswith(folder):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        if operations is not None:
            sys.addaudithook(count)
        ground(Slow(), folder, load_teacher("annotated", device="cpu"), GroundSettings(shard_size=2), fingerprint="scenes",
               progress=False)
        os._exit(0)

    def ended(process):
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    began = time.monotonic()
    assert ended(start(sys.argv[1])) == 0
    whole = time.monotonic() - began
    chance, killed, finished = random.Random(0), 0, []
    for turn in range(20):
        if turn % 2:
            process = start(sys.argv[2], chance.randrange(9))
        else:
            process = start(sys.argv[2])
            time.sleep(chance.uniform(0.05, 0.2) * whole)
            os.kill(process, signal.SIGKILL)
        killed += ended(process) == -signal.SIGKILL
        finished.append(len(list(Path(sys.argv[2]).glob("data/*.parquet"))))
    assert ended(start(sys.argv[2])) == 0
    print(killed, *finished)
    """
)


def test_killed_at_any_moment_it_continues(tmp_path):
    arguments = [sys.executable, "-c", KILLED, str(tmp_path / "whole"), str(tmp_path / "killed")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    killed, *finished = map(int, done.stdout.split())
    # Kills that hit nothing would prove nothing; how many hit what hangs on the speed of the machine.
    assert killed >= 6 and len({count for count in finished if 0 < count < 20}) >= 2
    whole = tree(tmp_path / "whole")
    assert tree(tmp_path / "killed") == whole
    assert len(load(tmp_path / "killed")["id"]) == 39 and len(set(load(tmp_path / "killed")["id"])) == 39


# `accelerate launch` starts several processes on GPUs only.
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


def test_two_processes_give_the_same_bytes_as_one(scenes, annotated, tmp_path):
    scenes.save_to_disk(tmp_path / "data")
    run(datasets.load_from_disk(tmp_path / "data"), tmp_path / "one", annotated, shard_size=2)
    command = ["age_vlm", "ground", tmp_path / "data", "--teacher", "annotated", "--output", tmp_path / "two"]
    launched = subprocess.run(
        [*LAUNCH, *command, "--shard-size", "2"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert launched.returncode == 0, launched.stderr
    assert "process 1 of 2" in launched.stderr
    assert launched.stdout.count("Report:") == 1
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
