"""The one schema of all training data: images, a chat, and the phrases of the chat that have a mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Features, Image, Value
from PIL import Image as PILImage

from ..errors import UserError
from .masks import MaskRLE, encode_mask, mask_size


ROLES = ("system", "user", "assistant")

Message = dict[str, Any]
Grounding = dict[str, Any]
Sample = dict[str, Any]

FEATURES = Features(
    {
        "id": Value("string"),
        "images": [Image()],
        "messages": [{"role": Value("string"), "content": [{"type": Value("string"), "text": Value("string")}]}],
        "groundings": [
            {
                "message": Value("int32"),
                "start": Value("int32"),
                "end": Value("int32"),
                "image": Value("int32"),
                "mask": {"size": [Value("int32")], "counts": Value("string")},
                "box": [Value("float64")],
            }
        ],
    }
)
"""Arrow types of a sample. `start` and `end` (exclusive) count characters of the message's text, see `message_text`; a
mask is a compressed COCO RLE at the resolution of its source image, a box [x0, y0, x1, y1] in pixels of it. Data that
still has to be grounded have no mask: a teacher makes it from the phrase, and from the box where there is one."""


def user_message(text: str, images: int = 0) -> Message:
    """A user turn: `images` image parts, then the text."""
    parts = [{"type": "image", "text": None} for _ in range(images)]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def assistant_message(text: str) -> Message:
    """An assistant turn of plain text."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def message_text(message: Message) -> str:
    """The text parts of a message, concatenated: what the character spans of groundings count in."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] or "" for part in content if part["type"] == "text")


def grounding(
    message: int,
    start: int,
    end: int,
    image: int,
    mask: np.ndarray | MaskRLE | None,
    box: Sequence[float] | None = None,
) -> Grounding:
    """Tie characters [start, end) of message number `message` to a mask on image number `image`.

    `mask` is an RLE, or a boolean array of shape (height, width) that is encoded here, or None where a teacher still has
    to make it; `box`, [x0, y0, x1, y1] in pixels, tells it where to look.
    """
    rle = encode_mask(mask) if isinstance(mask, np.ndarray) else mask
    corners = None if box is None else [float(value) for value in box]
    return {"message": message, "start": start, "end": end, "image": image, "mask": rle, "box": corners}


def validate_sample(sample: Sample) -> None:
    """Check that a sample follows the schema; `box` may be missing, as in data from before there were boxes.

    Raises:
        UserError: what is wrong, in one sentence that starts with the sample's id.
    """
    name = f"sample {sample.get('id')!r}" if isinstance(sample, dict) else "sample"
    if not isinstance(sample, dict):
        raise UserError(f"{name} is a {type(sample).__name__}, expected a dict with the keys {sorted(FEATURES)}.")
    missing = sorted(set(FEATURES) - set(sample))
    if missing:
        raise UserError(f"{name} lacks the keys {missing}, expected {sorted(FEATURES)}.")
    if not isinstance(sample["id"], str):
        raise UserError(f"{name} has an id of type {type(sample['id']).__name__}, expected text.")
    for number, image in enumerate(sample["images"]):
        if not isinstance(image, PILImage.Image):
            raise UserError(f"{name}: images[{number}] is a {type(image).__name__}, expected a PIL image.")
    _validate_messages(name, sample)
    for number, item in enumerate(sample["groundings"]):
        _validate_grounding(f"{name}: groundings[{number}]", item, sample)


def _validate_messages(name: str, sample: Sample) -> None:
    if not sample["messages"]:
        raise UserError(f"{name} has no messages, expected at least one.")
    image_parts = 0
    for number, message in enumerate(sample["messages"]):
        if message.get("role") not in ROLES:
            role = message.get("role")
            raise UserError(f"{name}: messages[{number}] has the role {role!r}, expected one of {ROLES}.")
        content = message.get("content")
        if not isinstance(content, (list, tuple)):
            raise UserError(
                f"{name}: messages[{number}] has content of type {type(content).__name__}, "
                "expected a list of image and text parts."
            )
        for part in content:
            kind = part.get("type")
            if kind not in ("image", "text"):
                raise UserError(f"{name}: messages[{number}] has a part of type {kind!r}, expected 'image' or 'text'.")
            if kind == "text" and not isinstance(part.get("text"), str):
                raise UserError(f"{name}: messages[{number}] has a text part whose text is {part.get('text')!r}.")
            image_parts += kind == "image"
    if image_parts != len(sample["images"]):
        raise UserError(f"{name} has {len(sample['images'])} images but {image_parts} image parts in its messages.")


def _validate_grounding(name: str, item: Grounding, sample: Sample) -> None:
    missing = sorted({"message", "start", "end", "image", "mask"} - set(item))
    if missing:
        raise UserError(f"{name} lacks the keys {missing}.")
    messages, images = sample["messages"], sample["images"]
    if not 0 <= item["message"] < len(messages):
        raise UserError(f"{name} points at message {item['message']}, expected 0 to {len(messages) - 1}.")
    if not 0 <= item["image"] < len(images):
        raise UserError(f"{name} points at image {item['image']}, but the sample has {len(images)} images.")
    length = len(message_text(messages[item["message"]]))
    if not 0 <= item["start"] < item["end"] <= length:
        raise UserError(
            f"{name} has the character span [{item['start']}, {item['end']}), expected a non-empty span inside "
            f"message {item['message']}, which has {length} characters."
        )
    image_width, image_height = upright_size(images[item["image"]])
    box = item.get("box")
    if box is not None and not _is_box_inside(box, image_width, image_height):
        raise UserError(
            f"{name} has the box {box!r}, expected [x0, y0, x1, y1] with 0 <= x0 < x1 <= {image_width} and "
            f"0 <= y0 < y1 <= {image_height}, in pixels of image {item['image']}."
        )
    if item["mask"] is None:
        return
    try:
        height, width = mask_size(item["mask"])
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    if (height, width) != (image_height, image_width):
        raise UserError(
            f"{name} has a mask of {width} x {height} pixels, expected {image_width} x {image_height}, "
            f"the size of image {item['image']}."
        )


def _is_box_inside(box: Any, width: int, height: int) -> bool:
    if not isinstance(box, (list, tuple, np.ndarray)) or len(box) != 4:
        return False
    if not all(isinstance(value, (int, float, np.number)) and math.isfinite(value) for value in box):
        return False
    x0, y0, x1, y1 = box
    return 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height


def upright_size(image: PILImage.Image) -> tuple[int, int]:
    """Width and height in pixels with the EXIF orientation applied, as datasets and the processor read the image."""
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # Pillow's reader of damaged tags raises nearly anything; they turn nothing
        orientation = 1
    return image.size[::-1] if orientation in (5, 6, 7, 8) else image.size
