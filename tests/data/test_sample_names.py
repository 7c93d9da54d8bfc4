import io
import pickle

import datasets
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from age_vlm.data.mix import Mix
from age_vlm.data.sample_names import FAILURE, SAMPLE_IDS, NamedBatches, NamedSamples, naming, sample_name, unnamed


class Samples(Dataset):
    """Some of which cannot be read, and one of which has no id."""

    def __init__(self, unreadable=(), nameless=(), length=6):
        self.unreadable, self.nameless, self.length = unreadable, nameless, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.unreadable:
            raise OSError("cannot read\nthis file")
        return {"value": index} if index in self.nameless else {"id": f"s{index}", "value": index}


def total(samples):
    """A collator that takes no fives."""
    for sample in samples:
        with naming(sample):
            if sample["value"] == 5:
                raise TypeError("fives are bad")
    return {"total": sum(sample["value"] for sample in samples)}


def loader(samples, workers=0, collator=total):
    return DataLoader(
        NamedSamples(samples), batch_size=2, num_workers=workers, collate_fn=NamedBatches(collator, samples)
    )


def test_batches_come_with_the_ids_of_their_samples():
    batches = [unnamed(batch) for batch in loader(Samples(nameless=(3,), length=5))]
    assert batches == [({"total": 1}, ["s0", "s1"]), ({"total": 5}, ["s2", "number 3"]), ({"total": 4}, ["s4"])]
    assert unnamed({"total": 1}) == ({"total": 1}, [])


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_used_is_told_in_one_sentence_when_its_batch_is_due(workers):
    for samples, words in (
        (
            Samples(unreadable=(4,)),
            "training data: sample number 4 could not be read: OSError: cannot read this file.",
        ),
        (
            Samples(),
            "training data: sample 's5' (number 5) could not be used: TypeError: fives are bad.",
        ),
        (
            Samples(nameless=(5,)),
            "training data: sample number 5 could not be used: TypeError: fives are bad.",
        ),
    ):
        batches = iter(loader(samples, workers))
        assert [unnamed(next(batches))[0]["total"] for _ in range(2)] == [1, 5]
        failed = next(batches)
        with pytest.raises(ValueError) as caught:
            unnamed(failed)
        assert str(caught.value) == words
        assert "Traceback" in str(caught.value.__cause__) and ", line" in str(caught.value.__cause__)


def test_a_failure_of_the_batch_as_a_whole_names_all_of_it():
    def pairs_fail(samples):
        if len(samples) > 1:
            raise ValueError("too many")
        return {}

    failed = NamedBatches(pairs_fail, Samples())([(0, {"id": "a"}), (1, {"id": "b"})])
    with pytest.raises(ValueError, match="^training data: the batch of a, b could not be made: too many.$"):
        unnamed(failed)


def test_memory_that_runs_out_is_nobodys_fault():
    class Full(Samples):
        def __getitem__(self, index):
            raise MemoryError

    def full(samples):
        raise MemoryError

    for batches in (loader(Full()), loader(Samples(), collator=full)):
        with pytest.raises(MemoryError):
            next(iter(batches))


def test_a_stored_sample_that_cannot_be_decoded_has_its_id():
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    rows = {"id": ["a", "b", "c"], "image": [{"bytes": file.getvalue(), "path": None}] * 3}
    rows["image"][1] = {"bytes": b"no image", "path": None}
    features = datasets.Features({"id": datasets.Value("string"), "image": datasets.Image()})
    stored = datasets.Dataset.from_dict(rows, features=features)
    whole, broken, after = NamedSamples(stored).__getitems__([0, 1, 2])
    assert whole[1]["id"] == "a" and after[1]["id"] == "c"
    assert broken[1].sentence.startswith(
        "training data: sample 'b' (number 1) could not be read: UnidentifiedImageError"
    )
    assert [number for number, _ in NamedSamples(stored.select([0, 2])).__getitems__([1, 0])] == [1, 0]


def test_a_mix_says_which_part_it_is():
    stored = datasets.Dataset.from_dict({"id": ["a", "b", "c"]})
    mix = Mix([Samples(length=3), stored], [1, 1], length=12, seed=1)
    names = {sample_name(mix, index) for index in range(12)}
    assert "sample number 2 of part 0 of the mix" in names
    assert "sample 'b' (number 1 of part 1 of the mix)" in names
    assert len(names) == 6
    for index in range(12):
        part, number = mix.origin(index)
        assert mix[index]["id"] == (f"s{number}" if part == 0 else "abc"[number])


def test_errors_that_have_the_id_are_not_given_it_twice():
    with pytest.raises(ValueError, match="^sample 'a' is bad$"):
        with naming({"id": "a"}):
            raise ValueError("sample 'a' is bad")
    with pytest.raises(KeyError):
        with naming({"value": 1}):
            raise KeyError("id")


def test_both_can_be_sent_to_a_worker_and_follow_the_epochs():
    named = NamedSamples(Samples())
    named.set_epoch(3)
    assert pickle.loads(pickle.dumps(named))[2] == named[2]
    assert set(pickle.loads(pickle.dumps(NamedBatches(total, Samples())))([named[1]])) == {"total", SAMPLE_IDS}
    assert FAILURE not in NamedBatches(total, Samples())([named[1]])
