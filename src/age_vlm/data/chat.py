"""A chat as tokens: what the model reads, what it is to learn, and which tokens a phrase became."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UserError
from ..processing.chat_agevlm import assistant_turn
from .byte_cache import MIB, ByteCache
from .schema import Message


@dataclass(frozen=True)
class EncodedChat:
    """
    Attributes:
        input_ids: the tokens of the rendered chat.
        labels: the same for what the assistant says, and for what ends its turn; -100 elsewhere.
        offsets: characters [start, end) of the rendered chat that each token stands for.
        pieces: for every message, (first character in the message's text, first character in the rendered chat,
            length) of each of its text parts.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    pieces: tuple[tuple[tuple[int, int, int], ...], ...]

    def phrase_tokens(self, message: int, start: int, end: int) -> list[int]:
        """Positions of the tokens that hold characters [start, end) of a message's text, in order."""
        spans = []
        for in_text, in_chat, length in self.pieces[message]:
            first, last = max(start, in_text), min(end, in_text + length)
            if first < last:
                spans.append((first - in_text + in_chat, last - in_text + in_chat))
        return [
            position
            for position, (left, right) in enumerate(self.offsets)
            if any(left < span_end and right > span_start for span_start, span_end in spans)
        ]


class ChatEncoder:
    """Renders chats with the processor's own template and tokenizes them.

    Encodings are kept, up to `cache_bytes`: the questions of a data set repeat from image to image.

    Raises:
        UserError: one sentence, for a chat template that changes the text of messages, or does not end an answer.
    """

    def __init__(self, processor, cache_bytes: int = 64 * MIB):
        self.processor = processor
        try:
            self.turn = assistant_turn(processor.tokenizer, processor.chat_template)
        except ValueError as error:
            raise UserError(str(error)) from None
        self.cache: ByteCache[EncodedChat] = ByteCache(cache_bytes)

    def __reduce__(self):
        # The workers of a data loader are started by pickling on most systems.
        return ChatEncoder, (self.processor, self.cache.max_bytes)

    def __call__(self, messages: Sequence[Message]) -> EncodedChat:
        key = tuple(
            (message["role"], tuple((part["type"], part.get("text")) for part in _parts(message)))
            for message in messages
        )
        return self.cache.get(key, lambda: self._encode_parts(key))

    def _encode_parts(self, messages) -> EncodedChat:
        texts = [content for _, parts in messages for kind, content in parts if kind == "text"]
        first, last = _unused_characters(texts)
        numbers = iter(range(len(texts)))

        def chat(mark: bool):
            # A numbered mark in front of every piece of text finds it again, whatever the chat template puts around it.
            # Blanks stay outside of the marks, where a template that trims can reach them.
            def text(content):
                core = content.strip() or content
                marked = f"{first}{next(numbers)}{last}{core}{first}{last}" if mark else core
                return content.replace(core, marked, 1) if core else marked

            return [
                {
                    "role": role,
                    "content": [
                        {"type": "text", "text": text(content)} if kind == "text" else {"type": kind}
                        for kind, content in parts
                    ],
                }
                for role, parts in messages
            ]

        rendered = self.processor.apply_chat_template(chat(mark=False), tokenize=False)
        marked = self.processor.apply_chat_template(chat(mark=True), tokenize=False)
        starts, removed = {}, 0
        for mark in re.finditer(f"{first}(\\d*){last}", marked):
            if mark[1]:
                starts[int(mark[1])] = mark.start() - removed
            removed += len(mark[0])
        cores = [content.strip() or content for content in texts]
        if re.sub(f"{first}\\d*{last}", "", marked) != rendered or any(
            not rendered.startswith(cores[number], start) for number, start in starts.items()
        ):
            raise UserError(
                "chat_template: changes the text of messages, expected one that keeps it: phrases are found by it."
            )
        pieces, number = [], 0
        for _, parts in messages:
            in_text, found = 0, []
            for kind, content in parts:
                if kind != "text":
                    continue
                if number in starts:  # a template may leave a system message out
                    core = cores[number]
                    blanks, start = content.index(core), starts[number]
                    if self.turn.keeps_blanks and rendered.startswith(content, start - blanks):
                        found.append((in_text, start - blanks, len(content)))
                    else:
                        found.append((in_text + blanks, start, len(core)))
                in_text += len(content)
                number += 1
            pieces.append(tuple(found))

        tokenizer = self.processor.tokenizer
        encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        labels = [-100] * len(ids)
        for (role, _), spans in zip(messages, pieces):
            if role != "assistant" or not spans:
                continue
            start, end = spans[0][1], spans[-1][1] + spans[-1][2]
            if not rendered.startswith(self.turn.end, end):
                raise UserError(
                    f"chat_template: got {rendered[end : end + 20]!r} after an answer, expected its end, {self.turn.end!r}."
                )
            start -= len(self.turn.start) if rendered.endswith(self.turn.start, 0, start) else 0
            end += len(self.turn.end)
            for i, (left, right) in enumerate(offsets):
                if left < end and right > start and ids[i] != self.processor.image_token_id:
                    labels[i] = ids[i]
        return EncodedChat(tuple(ids), tuple(labels), tuple(map(tuple, offsets)), tuple(pieces))


def _parts(message: Message):
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _unused_characters(texts: Sequence[str]) -> tuple[str, str]:
    """Two characters of Unicode's private use area that none of the texts has."""
    used = set().union(*texts)
    unused = (character for character in map(chr, range(0xE000, 0xF900)) if character not in used)
    return next(unused), next(unused)
