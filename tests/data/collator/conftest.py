"""Chats about pictures of noise, whose phrases have masks, and collators of them."""

import numpy as np
import pytest
from PIL import Image

from age_vlm.data.collator import AgeVlmCollator
from age_vlm.data.schema import assistant_message, grounding, message_text, user_message


SIDE = 32  # of the model's input, conftest's IMAGE_SIZE


def _picture(seed, size=(SIDE, SIDE)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def picture():
    """Noise of a seed and a size."""
    return _picture


def _box(size, left, top, right, bottom):
    mask = np.zeros((size[1], size[0]), bool)
    mask[top:bottom, left:right] = True
    return mask


@pytest.fixture(scope="session")
def box():
    return _box


def _phrase(messages, message, words, image=0, size=(SIDE, SIDE), mask=None):
    start = message_text(messages[message]).index(words)
    mask = _box(size, 0, 0, size[0] // 2, size[1]) if mask is None else mask
    return grounding(message, start, start + len(words), image, mask)


@pytest.fixture(scope="session")
def phrase():
    """A grounding of words in a message."""
    return _phrase


def _sample(messages, images, groundings=(), name="one"):
    return {"id": name, "images": list(images), "messages": messages, "groundings": list(groundings)}


@pytest.fixture(scope="session")
def sample():
    return _sample


def _turns(*pairs, images=1):
    messages = []
    for number, (question, answer) in enumerate(pairs):
        messages += [user_message(question, images=0 if number else images), assistant_message(answer)]
    return messages


@pytest.fixture(scope="session")
def turns():
    """Pairs of question and answer -> messages."""
    return _turns


TALK = _turns(("is there a dog?", "yes"), ("and a big cat?", "no, none"), ("what else?", "a red car"))


@pytest.fixture(scope="session")
def three_turns():
    """A chat: changed by no test."""
    return TALK


MANY = [
    {
        "role": "user",
        "content": [
            {"type": "image", "text": None},
            {"type": "text", "text": "here a dog, "},
            {"type": "image", "text": None},
            {"type": "text", "text": "there a cat and the dog"},
        ],
    },
    assistant_message("yes"),
]


@pytest.fixture(scope="session")
def two_images():
    """A message with two images, and its answer."""
    return MANY


@pytest.fixture(scope="module")
def grid(model, processor):
    return model.image_grid(processor.image_geometry(64, 64).size)


@pytest.fixture(scope="module")
def make_collator(processor, grid):
    return lambda **options: AgeVlmCollator(processor, grid, **options)


def _aligned(processor, batch):
    """(row, position, slot) of each aligned token, and the character it stands for."""
    rows = batch["grounding_queries"].tolist()
    slots = batch["grounding_slots"].tolist()
    texts = [processor.tokenizer.decode([batch["input_ids"][row, place]]) for row, place in rows]
    return [(row, place, slot) for (row, place), slot in zip(rows, slots)], texts


@pytest.fixture(scope="session")
def aligned_tokens():
    return _aligned


def _flat(number, extra=0, pictures=1):
    """A short chat of its own length, with a grounded phrase where it has an image."""
    messages = _turns(("is there a dog" + "?" * extra, "yes" * (1 + number % 3)), images=pictures)
    groundings = [_phrase(messages, 0, "dog", image=each) for each in range(pictures)]
    return _sample(
        messages, [_picture(10 * number + each) for each in range(pictures)], groundings, name=f"flat {number}"
    )


@pytest.fixture(scope="session")
def flat():
    return _flat
