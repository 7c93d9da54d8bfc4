"""Samples of the schema -> one training batch: text, pictures, and the masks of the grounded phrases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial

import torch

from ..processing import ImageGeometry
from ..processing.images_agevlm import load_rgb
from .chat import ChatEncoder, EncodedChat
from .masks import decode_mask
from .schema import Grounding, Message, Sample, upright_size, validate_sample


GROUNDING_KEYS = ("grounding_rows", "grounding_slots", "grounding_coverage")


class AgeVlmCollator:
    """Turns samples into tensors; masks go through the same geometry as the pixels.

    Args:
        processor: an `AgeVlmProcessor`.
        grid: (rows, columns) of the model's image tokens, see `token_grid_size`.
        independent_turns: every question and answer of a sample becomes a text of its own that sees the sample's
            pictures, all packed into one row (positions restart, no attention mask): earlier answers cannot give later
            ones away. What stands before the first question, a system message, is in front of each. Otherwise a sample is
            one chat.
        phrase_rows: which tokens of a phrase are aligned, its `"last"` (it has read the whole phrase) or `"all"`.
        max_length: longest row, in tokens; what is over is cut from the end.
        image_visibility: the model's, `"latest"` or `"all_previous"`: a phrase is aligned only with a picture that it sees.

    A batch holds `input_ids`, `labels` (batch, length), `attention_mask` or `position_ids` (batch, length),
    `pixel_values` (images, channels, height, width), where pictures are shared `image_indices` (image tokens,), and for
    each aligned text row `grounding_rows` (groundings, 2) batch index and position, `grounding_slots` (groundings,) which
    picture of its row, `grounding_coverage` (groundings, rows x columns) how much of each image token the mask covers.

    Raises:
        ValueError: one sentence, for a sample that does not follow the schema or still lacks masks, or a picture that
            `max_length` cuts off.
    """

    def __init__(
        self,
        processor,
        grid: tuple[int, int],
        *,
        independent_turns: bool = False,
        phrase_rows: str = "last",
        max_length: int | None = None,
        image_visibility: str = "latest",
    ):
        if phrase_rows not in ("last", "all"):
            raise ValueError(f"phrase_rows: got '{phrase_rows}', expected 'last' or 'all'.")
        self.processor = processor
        self.grid = grid
        self.independent_turns = independent_turns
        self.phrase_rows = phrase_rows
        self.max_length = max_length
        self.image_visibility = image_visibility
        self.encode = ChatEncoder(processor)
        self._coverage = lru_cache(maxsize=65_536)(self._mask_coverage)

    def __reduce__(self):
        # As for `ChatEncoder`: the caches stay behind.
        names = ("independent_turns", "phrase_rows", "max_length", "image_visibility")
        settings = {name: getattr(self, name) for name in names}
        return partial(AgeVlmCollator, self.processor, self.grid, **settings), ()

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        images, image_indices = [], []
        # One picture object in several samples, as in evaluation questions about it, is prepared and encoded once.
        numbers: dict[int, int] = {}
        rows = []
        groundings: list[tuple[int, int, int, torch.Tensor]] = []
        for batch_index, sample in enumerate(samples):
            validate_sample(sample)
            _require_masks(sample)
            for image in sample["images"]:
                if numbers.setdefault(id(image), len(images)) == len(images):
                    images.append(image)
            ids, labels, positions = [], [], []
            for chat, chat_images, chat_groundings in self._chats(sample):
                tokens = chat.input_ids.count(self.processor.image_token_id)
                if tokens != len(chat_images):
                    raise ValueError(
                        f"messages: sample '{sample['id']}' has {tokens} image tokens in its rendered text, expected "
                        f"{len(chat_images)}, one for each image part."
                    )
                for token, slot, coverage in self._aligned_tokens(sample, chat, chat_images, chat_groundings):
                    groundings.append((batch_index, len(ids) + token, slot, coverage))
                image_indices.extend(numbers[id(sample["images"][image])] for image in chat_images)
                ids.extend(chat.input_ids)
                labels.extend(chat.labels)
                positions.extend(range(len(chat.input_ids)))
            rows.append((ids, labels, positions))
            self._cut(sample, rows, groundings)
        batch = self._pad(rows)
        if images:
            batch["pixel_values"] = self.processor.image_processor(
                images=[load_rgb(image) for image in images], return_tensors="pt"
            )["pixel_values"]
        if image_indices != list(range(len(images))):
            batch["image_indices"] = torch.tensor(image_indices)
        if groundings:
            batch["grounding_rows"] = torch.tensor([entry[:2] for entry in groundings])
            batch["grounding_slots"] = torch.tensor([entry[2] for entry in groundings])
            batch["grounding_coverage"] = torch.stack([entry[3] for entry in groundings])
        return batch

    def _chats(self, sample: Sample) -> Iterator[tuple[EncodedChat, list[int], list[tuple[int, Grounding]]]]:
        """Each text of a sample: its encoding, the pictures of its image tokens, its groundings by message number."""
        messages = sample["messages"]
        images, first = [], 0
        for message in messages:
            count = sum(part["type"] == "image" for part in message["content"])
            images.append(list(range(first, first + count)))
            first += count
        starts = [number for number, message in enumerate(messages) if message["role"] == "user"]
        if not self.independent_turns or not starts:
            starts = [0]
        lead = list(range(starts[0] if self.independent_turns else 0))
        for start, end in zip(starts, [*starts[1:], len(messages)]):
            numbers = [*lead, *range(start, end)]
            chat = [messages[number] for number in numbers]
            shown = [images[number] for number in numbers]
            earlier = [image for number in range(len(lead), start) for image in images[number]]
            if earlier and not images[start]:
                chat[len(lead)] = _with_images(messages[start], len(earlier))
                shown[len(lead)] = earlier
            own = numbers if start == starts[0] else numbers[len(lead) :]
            inside = [(numbers.index(g["message"]), g) for g in sample["groundings"] if g["message"] in own]
            yield self.encode(chat), [image for part in shown for image in part], inside

    def _aligned_tokens(
        self, sample: Sample, chat: EncodedChat, chat_images: list[int], chat_groundings: list[tuple[int, Grounding]]
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Position in the chat, picture of the row and mask coverage of every token that is aligned."""
        image_token = self.processor.image_token_id
        places = [position for position, token in enumerate(chat.input_ids) if token == image_token]
        for message, item in chat_groundings:
            tokens = chat.phrase_tokens(message, item["start"], item["end"])
            if not tokens:
                raise ValueError(
                    f"groundings: sample '{sample['id']}' has the span [{item['start']}, {item['end']}) in message "
                    f"{item['message']}, which no token of the rendered chat holds."
                )
            width, height = upright_size(sample["images"][item["image"]])
            coverage = self._coverage(tuple(item["mask"]["size"]), item["mask"]["counts"], height, width)
            if not coverage.any():
                continue  # the crop of the image processor left nothing of it
            for token in tokens if self.phrase_rows == "all" else tokens[-1:]:
                seen = [image for place, image in zip(places, chat_images) if place <= token]
                if item["image"] in (seen[-1:] if self.image_visibility == "latest" else seen):
                    yield token, item["image"], coverage

    def _mask_coverage(self, size: tuple[int, int], counts: str, height: int, width: int) -> torch.Tensor:
        geometry: ImageGeometry = self.processor.image_geometry(height, width)
        mask = torch.from_numpy(decode_mask({"size": list(size), "counts": counts}))
        return geometry.mask_coverage(mask[None], *self.grid)[0].flatten()

    def _cut(self, sample, rows, groundings) -> None:
        ids, labels, positions = rows[-1]
        if self.max_length is None or len(ids) <= self.max_length:
            return
        if self.processor.image_token_id in ids[self.max_length :]:
            raise ValueError(
                f"max_length: sample '{sample['id']}' has {len(ids)} tokens and a picture after token {self.max_length}, "
                "expected a length that keeps all image tokens."
            )
        rows[-1] = (ids[: self.max_length], labels[: self.max_length], positions[: self.max_length])
        groundings[:] = [g for g in groundings if g[0] != len(rows) - 1 or g[1] < self.max_length]

    def _pad(self, rows) -> dict[str, torch.Tensor]:
        length = max(len(ids) for ids, _, _ in rows)
        pad = self.processor.tokenizer.pad_token_id
        if pad is None:  # Llama's tokenizers name none; what stands there is neither seen nor learned
            pad = self.processor.tokenizer.eos_token_id or 0
        ids = torch.full((len(rows), length), pad)
        labels = torch.full((len(rows), length), -100)
        positions = torch.zeros((len(rows), length), dtype=torch.long)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        for number, row in enumerate(rows):
            size = len(row[0])
            ids[number, :size], labels[number, :size], positions[number, :size] = map(torch.tensor, row)
            mask[number, :size] = 1
        batch = {"input_ids": ids, "labels": labels}
        if self.independent_turns:
            # Padding has position 0 throughout: each such token is a sequence of its own.
            batch["position_ids"] = positions
        else:
            batch["attention_mask"] = mask
        return batch


def _require_masks(sample: Sample) -> None:
    missing = sum(item["mask"] is None for item in sample["groundings"])
    if missing:
        raise ValueError(
            f"groundings: sample '{sample['id']}' lacks the mask of {missing} of its phrases, expected one for each: make "
            "them with `age-vlm ground`, or leave these groundings out."
        )


def _with_images(message: Message, images: int) -> Message:
    parts = [{"type": "image", "text": None}] * images
    return {"role": message["role"], "content": [*parts, *message["content"]]}


@torch.no_grad()
def token_grid_size(model, processor) -> tuple[int, int]:
    """(rows, columns) of the model's image tokens for a picture as the processor prepares it: found by one blank one."""
    from ..modeling_agevlm.vision_agevlm import feature_map, token_grid

    height, width = processor.image_geometry(64, 64).size
    model = getattr(model, "model", model)
    tower = model.vision_tower
    blank = torch.zeros(1, 3, height, width, device=tower.device, dtype=tower.dtype)
    states = feature_map(tower, tower(blank, return_dict=True).last_hidden_state)
    return token_grid(states, tower, model.config.vision_config, (height, width))[1:]
