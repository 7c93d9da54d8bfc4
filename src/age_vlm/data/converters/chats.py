"""Turns of other formats as messages of the schema."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from ..masks import MaskRLE
from ..rejects import Unusable
from ..schema import ROLES, Message, Sample, assistant_message, grounding, user_message


IMAGE_MARKER = "<image>"
REGION_REQUEST = "describe one thing in the picture."

# Formats mark media in many ways; a text with a mark that was not understood would be trained on as it is.
_MARKER = re.compile(
    r"<\|?(image|img|picture|video|vision|audio|speech|sound)s?([ _-]?(\d+|pad|placeholder|here|(soft_?)?token|start|end))?\|?>"
    r"|\[IMG\]",
    re.IGNORECASE,
)
_MEDIA = re.compile(
    r"(image|img|picture|photo|video|audio|sound|speech|frame)s?(_?(path|file|file_?name|url|byte)s?)?", re.IGNORECASE
)

Phrase = tuple[int, int, MaskRLE | None, Sequence[float] | None]
"""Start and end of a phrase in its text, its mask, its box."""


def line(text: Any) -> str:
    """A text as one line, without blanks at its ends or two in a row.

    Raises:
        Unusable: it is no text, nothing is left of it, or it marks an image.
    """
    if not isinstance(text, str):
        raise Unusable("text is missing")
    if not (text := " ".join(text.split())):
        raise Unusable("text is empty")
    _require_no_marker(text)
    return text


def require_only(record: Mapping[str, Any], media: str | None) -> None:
    """Refuse a record with images, sounds or videos under another key than `media`: it would be half understood.

    Raises:
        Unusable: it has.
    """
    for key, value in record.items():
        if key == media or not value or not (match := _MEDIA.fullmatch(str(key))):
            continue
        # Beside the image itself, "image_url" only says where it is from.
        if not (match[2] and media and record.get(media) and match[1].lower() in ("image", "img", "picture", "photo")):
            raise Unusable(f"media under a key that is not read: {key}")


def chat(turns: Sequence[tuple[str, Any]], images: int) -> list[Message]:
    """Role and text of each turn as messages that show `images` images.

    `<image>` in a user's text marks an image. Where there is none, the first user turn shows all images. A
    single image of a turn stands before its text, because words see only images before them; several stay where
    they are.

    Raises:
        Unusable: a text is missing or empty, roles are unknown or do not alternate, nobody answers, the markers are not
            as many as the images, or a text marks an image elsewhere or in another way.
    """
    if any(role not in ROLES for role, _ in turns):
        raise Unusable("role is unknown")
    if not all(isinstance(text, str) for _, text in turns):
        raise Unusable("text is missing")
    for role, text in turns:
        _require_no_marker(text.replace(IMAGE_MARKER, "") if role == "user" else text)
    messages: list[Message] = [{"role": role, "content": [_text(text)]} for role, text in turns[:1] if role == "system"]
    turns = list(turns[len(messages) :])
    # Logs of chats, such as ShareGPT's, may be cut so that they begin with an answer: to a question nobody knows.
    while turns and turns[0][0] == "assistant":
        turns.pop(0)
    if any(role != ("user", "assistant")[number % 2] for number, (role, _) in enumerate(turns)):
        raise Unusable("turns do not alternate")
    if len(turns) < 2:
        raise Unusable("nobody answers")
    markers = sum(text.count(IMAGE_MARKER) for role, text in turns if role == "user")
    if markers not in (0, images):
        raise Unusable(f"image markers ({IMAGE_MARKER}) are not as many as the images")
    in_front = 0 if markers else images
    for role, text in turns:
        if role == "assistant":
            messages.append({"role": role, "content": [_text(text)]})
        else:
            messages.append({"role": role, "content": _shown(text, in_front)})
            in_front = 0
    return messages


class Turn(NamedTuple):
    """A question and its answer, with the phrases of each."""

    question: str
    answer: str
    in_question: Sequence[Phrase] = ()
    in_answer: Sequence[Phrase] = ()


def statements(name: str, image: Image.Image, request: str, said: Iterable[tuple[str, Sequence[Phrase]]]) -> Sample:
    """A sample of one image in which each text answers the same request, with its phrases grounded.

    Raises:
        Unusable: nothing is said.
    """
    return sample_of(name, image, (Turn(request, text, in_answer=phrases) for text, phrases in said))


def sample_of(name: str, image: Image.Image, turns: Iterable[Turn]) -> Sample:
    """A sample of these turns about one image, with their phrases grounded.

    Raises:
        Unusable: there are none.
    """
    messages: list[Message] = []
    groundings = []
    for turn in turns:
        for number, phrases in enumerate((turn.in_question, turn.in_answer), start=len(messages)):
            groundings += [grounding(number, start, end, 0, mask, box) for start, end, mask, box in phrases]
        messages += [user_message(turn.question, images=0 if messages else 1), assistant_message(turn.answer)]
    if not messages:
        raise Unusable("no text is left of it")
    return {"id": name, "images": [image], "messages": messages, "groundings": groundings}


def _require_no_marker(text: str) -> None:
    if _MARKER.search(text):
        raise Unusable("text marks an image or other media where none belongs")


def _text(text: str) -> dict[str, str]:
    if not (text := text.strip()):
        raise Unusable("text is empty")
    return {"type": "text", "text": text}


def _shown(text: str, images: int) -> list[dict[str, Any]]:
    """Content of a user turn: `images` images in front, or those at the markers in the text."""
    image = {"type": "image", "text": None}
    parts = text.split(IMAGE_MARKER)
    if len(parts) <= 2:
        count = images + len(parts) - 1
        text = " ".join(part.strip() for part in parts).strip()
        content = [dict(image) for _ in range(count)]
        return content if count and not text else [*content, _text(text)]
    content = []
    for number, part in enumerate(parts):
        if number:
            content.append(dict(image))
        if part := part.strip("\r\n"):
            content.append({"type": "text", "text": part})
    return content
