"""Which samples a batch was made of, and which one of them could not be used."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from ..errors import UserError
from .mix import Mix


# Of a batch beside its tensors: the ids of its samples; or, alone, why there is no batch.
SAMPLE_IDS, FAILURE = "sample_ids", "sample_failure"


class SampleFailure(NamedTuple):
    """A sample that could not be used: the sentence that says so, and where in the code it happened."""

    sentence: str
    traceback: str


@contextmanager
def naming(sample: Any) -> Iterator[None]:
    """Puts the sample's id in front of a ValueError in the block that does not have it, and makes one of other errors."""
    name = f"sample {sample['id']!r}" if isinstance(sample, dict) and sample.get("id") is not None else None
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if name is None or name in str(error):
            raise
        raise UserError(f"{name}: {_reason(error)}") from error


class NamedSamples(Dataset):
    """A map-style data set whose items know their number, and which hands on what cannot be read, instead of raising it.

    Raised in a worker process, an error would come as pages of text, and before the batches that are ready. Items are
    pairs of a number and a sample or a `SampleFailure`; `NamedBatches` takes them apart.
    """

    def __init__(self, samples: Dataset):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def set_epoch(self, epoch: int) -> None:
        """Of a data set that has one, for the data loader."""
        getattr(self.samples, "set_epoch", lambda epoch: None)(epoch)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        try:
            return index, self.samples[index]
        except MemoryError:
            raise
        except Exception as error:
            sentence = f"training data: {sample_name(self.samples, index)} could not be read: {_reason(error)}"
            return index, SampleFailure(sentence, traceback.format_exc())

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, Any]]:
        together = getattr(self.samples, "__getitems__", None)
        if together is not None:
            try:
                return list(zip(indices, together(indices), strict=True))
            except MemoryError:
                raise
            except Exception:
                pass  # one by one, it shows which
        return [self[index] for index in indices]


class NamedBatches:
    """A collator for the items of `NamedSamples`: its batches hold `sample_ids`, or nothing but a `sample_failure`.

    Args:
        collator: for the samples themselves.
        samples: the data set that they are from, to say which one it is.
    """

    def __init__(self, collator: Callable[[list], dict], samples: Dataset):
        self.collator, self.samples = collator, samples

    def __call__(self, items: Sequence[tuple[int, Any]]) -> dict[str, Any]:
        failure = next((item for _, item in items if isinstance(item, SampleFailure)), None)
        if failure is not None:
            return {FAILURE: list(failure)}
        try:
            batch = self.collator([sample for _, sample in items])
        except MemoryError:
            raise
        except Exception as error:
            return {FAILURE: list(self._failure(items, error))}
        return {**batch, SAMPLE_IDS: [_id(number, sample) for number, sample in items]}

    def _failure(self, items: Sequence[tuple[int, Any]], error: Exception) -> SampleFailure:
        trace = traceback.format_exc()
        for number, sample in items:
            try:
                self.collator([sample])
            except Exception as own:
                own_id = sample.get("id") if isinstance(sample, dict) else None
                name, reason = sample_name(self.samples, number, own_id), _reason(own)
                reason = reason.removeprefix(f"sample {own_id!r}: ")  # as `naming` says it
                return SampleFailure(f"training data: {name} could not be used: {reason}", trace)
        names = ", ".join(_id(number, sample) for number, sample in items)
        return SampleFailure(f"training data: the batch of {names} could not be made: {_reason(error)}", trace)


def unnamed(batch: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The tensors of a batch, and the ids of its samples.

    Raises:
        UserError: one sentence, for a batch with a sample that could not be used.
    """
    if FAILURE in batch:
        failure = SampleFailure(*batch[FAILURE])
        raise UserError(failure.sentence) from RuntimeError(failure.traceback)
    return {key: value for key, value in batch.items() if key != SAMPLE_IDS}, list(batch.get(SAMPLE_IDS, ()))


def sample_name(samples: Dataset, index: int, own_id: str | None = None) -> str:
    """What a sample is called in a sentence, whether it can be read or not: its number, and its id if that can be had."""
    where = ""
    if isinstance(samples, Mix):
        part, index = samples.origin(index)
        samples, where = samples.parts[part], f" of part {part} of the mix"
    if own_id is None and hasattr(samples, "select_columns"):
        try:
            # Without its images, which may be what is broken.
            own_id = samples.select_columns(["id"])[index]["id"]
        except Exception:
            pass
    return f"sample number {index}{where}" if own_id is None else f"sample {own_id!r} (number {index}{where})"


def _id(number: int, sample: Any) -> str:
    name = sample.get("id") if isinstance(sample, dict) else None
    return f"number {number}" if name is None else str(name)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    shown = text if len(text) <= 500 else text[:500] + " ..."
    named = shown if isinstance(error, ValueError) and shown else f"{type(error).__name__}: {shown}".rstrip(": ")
    return named if named.endswith(".") else f"{named}."
