"""What the tests of all converters share: photographs on disk, and the check that samples can be trained on."""

import warnings

import numpy as np
import pytest
from PIL import Image

from age_vlm.data.collator import AgeVlmCollator
from age_vlm.data.schema import message_text, validate_sample


@pytest.fixture(scope="session")
def photograph():
    """(path, width, height, options of `save`) -> writes an image of noise there and returns its pixels."""

    def write(path, width=40, height=30, **options):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng([width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, **options)
        return pixels

    return write


@pytest.fixture(scope="session")
def collator(processor):
    return AgeVlmCollator(processor, (4, 4), independent_turns=True)


@pytest.fixture(scope="session")
def check(collator):
    """Samples -> the same, all valid and, their masks given or left out, fit for a batch."""

    def run(samples):
        samples = list(samples)
        for sample in samples:
            validate_sample(sample)
            masked = [item for item in sample["groundings"] if item["mask"] is not None]
            batch = collator([{**sample, "groundings": masked}])
            assert (batch["labels"] != -100).any()
            # Each phrase of one image is aligned, unless its mask is smaller than what the grid resolves.
            assert len(batch.get("grounding_queries", ())) == len(masked)
            if len(masked) < len(sample["groundings"]):
                with pytest.raises(ValueError, match="age-vlm ground"):
                    collator([sample])
        return samples

    return run


@pytest.fixture(scope="session")
def said():
    """The texts of a sample's assistant."""
    return lambda sample: [message_text(item) for item in sample["messages"] if item["role"] == "assistant"]


@pytest.fixture(scope="session")
def phrase():
    """(sample, number of a grounding) -> the words it is about."""

    def text(sample, number):
        item = sample["groundings"][number]
        return message_text(sample["messages"][item["message"]])[item["start"] : item["end"]]

    return text


@pytest.fixture(autouse=True)
def _no_silent_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield
