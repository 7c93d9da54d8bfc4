"""Samples of the schema -> one training batch: text, images, and the masks of the grounded phrases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import PIL.Image
import torch

from ..configuration.alignment_agevlm import ANSWER_QUERIES
from ..errors import UserError, checkpoint_errors, one_of
from ..processing import ImageGeometry
from ..processing.images_agevlm import load_rgb
from .byte_cache import MIB, ByteCache
from .chat import ChatEncoder, EncodedChat
from .masks import decode_mask
from .packing import packed_rows
from .sample_names import naming
from .schema import Grounding, Message, Sample, upright_size, validate_sample


GROUNDING_KEYS = ("grounding_queries", "grounding_slots", "grounding_coverage")


@dataclass
class EncodedSample:
    """
    Attributes:
        input_ids, labels, positions: of its texts, one after the other; positions restart with each.
        images: the sample's images.
        image_indices: for each image token the number of the image that it stands for, in the sample.
        groundings: position in the row, number of the image and coverage of each aligned token.
        texts: which of them each token is of, counted from 1; 0 for the beginning that all share.
    """

    input_ids: list[int]
    labels: list[int]
    positions: list[int]
    images: list[PIL.Image.Image]
    image_indices: list[int]
    groundings: list[tuple[int, int, torch.Tensor]]
    texts: list[int] = field(default_factory=list)

    def append(self, chat: EncodedChat, images: list[int], aligned, number: int, start: int, end: int) -> None:
        """Tokens [start, end) of text `number`, with those of its images whose tokens are in it."""
        self.groundings.extend((len(self.input_ids) + token - start, image, cover) for token, image, cover in aligned)
        self.input_ids.extend(chat.input_ids[start:end])
        # Nothing, or another text, stands before the first token: it is not learned after that.
        self.labels.extend((-100, *chat.labels[start + 1 : end]))
        self.positions.extend(range(start, end))
        self.texts.extend([number] * (end - start))
        if not start:
            self.image_indices.extend(images)


class AgeVlmCollator:
    """Turns samples into tensors; masks go through the same geometry as the pixels.

    Args:
        processor: an `AgeVlmProcessor`.
        grid: (rows, columns) of the model's image tokens, see `model.image_grid`.
        independent_turns: every question and answer of a sample becomes a text of its own that sees the sample's
            images, all packed into one row (positions restart, no attention mask): earlier answers cannot give later
            ones away. What stands before the first question, a system message, is in front of each. Otherwise a sample is
            one chat.
        shared_prefix: independent texts of a sample have what they begin with, up to its images, once, in a row of its own:
            the same loss, from half of the tokens where questions are short. For backends that take a mask (`sdpa`, `eager`).
        phrase_queries: which tokens of a phrase are aligned, its `"last"` (it has read the whole phrase) or `"all"`.
        answer_queries: of a phrase that the assistant says, `"read"` for these tokens, or `"predict"` for the one in front of
            each of them; see `AlignmentConfig`.
        max_length: longest sample, in tokens; what is over is cut from the end.
        packing: several samples share a row (positions restart, no attention mask; each sees its own images only), see
            `packed_rows`. The samples of a batch, and so its loss, are the same without.
        pack_length: longest row that packing makes of several samples, in tokens; twice the longest sample when left out.
        image_visibility: the model's, `"latest"` or `"all_previous"`: a phrase is aligned only with an image that it sees.

    A batch holds `input_ids`, `labels` (batch, length), `attention_mask` or `position_ids` (batch, length),
    `pixel_values` (images, channels, height, width), where images are shared `image_indices` (image tokens,), and for
    each aligned text row `grounding_queries` (groundings, 2) batch index and position, `grounding_slots` (groundings,) which
    image of its row, `grounding_coverage` (groundings, rows x columns) how much of each image token the mask covers.

    Raises:
        UserError: one sentence, for a sample that does not follow the schema or still lacks masks, and for an image, or all
            answers of a sample, that `max_length` cuts off.
    """

    def __init__(
        self,
        processor,
        grid: tuple[int, int],
        *,
        independent_turns: bool = False,
        phrase_queries: str = "last",
        answer_queries: str = "read",
        max_length: int | None = None,
        image_visibility: str = "latest",
        packing: bool = False,
        pack_length: int | None = None,
        shared_prefix: bool = False,
    ):
        if phrase_queries not in ("last", "all"):
            raise UserError(f"phrase_queries: got '{phrase_queries}', expected 'last' or 'all'.")
        if answer_queries not in ANSWER_QUERIES:
            raise UserError(
                f"answer_queries: got '{answer_queries}', expected {one_of(answer_queries, ANSWER_QUERIES)}."
            )
        if shared_prefix and (packing or not independent_turns):
            raise UserError("shared_prefix: got True, expected False with packing=True or independent_turns=False.")
        self.processor = processor
        self.grid = grid
        self.independent_turns = independent_turns
        self.phrase_queries = phrase_queries
        self.answer_queries = answer_queries
        self.max_length = max_length
        self.image_visibility = image_visibility
        self.packing = packing
        self.pack_length = pack_length
        self.shared_prefix = shared_prefix
        self.encode = ChatEncoder(processor)
        self.coverages: ByteCache[torch.Tensor] = ByteCache(64 * MIB)

    @classmethod
    def from_model(cls, model, processor, **settings) -> AgeVlmCollator:
        """The collator of a model and its processor, whose image grid and visibility it takes.

        Args:
            settings: the others of the constructor.
        """
        size = processor.image_geometry(64, 64).size
        return cls(processor, model.image_grid(size), image_visibility=model.config.image_visibility, **settings)

    def __reduce__(self):
        # As for `ChatEncoder`: the caches stay behind.
        names = (
            "independent_turns", "phrase_queries", "answer_queries", "max_length", "image_visibility", "packing", "pack_length",
            "shared_prefix",
        )  # fmt: skip
        settings = {name: getattr(self, name) for name in names}
        return partial(AgeVlmCollator, self.processor, self.grid, **settings), ()

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        encoded = []
        # One image object in several samples, as in evaluation questions about it, is prepared and encoded once.
        loaded: dict[int, PIL.Image.Image] = {}
        for sample in samples:
            with naming(sample), checkpoint_errors():
                encoded.append(self._encoded(sample))
                for image in sample["images"]:
                    if id(image) not in loaded:
                        loaded[id(image)] = load_rgb(image)
        rows = [[number] for number in range(len(encoded))]
        if self.packing:
            rows = self._packed(encoded)

        numbers: dict[int, int] = {}
        images, image_indices = [], []
        groundings: list[tuple[int, int, int, torch.Tensor]] = []
        for row, members in enumerate(rows):
            row_images, row_groundings, start = [], [], 0
            for sample in (encoded[member] for member in members):
                for image in sample.images:
                    if numbers.setdefault(id(image), len(images)) == len(images):
                        images.append(loaded[id(image)])
                own = [numbers[id(image)] for image in sample.images]
                row_images.extend(own[image] for image in sample.image_indices)
                row_groundings.extend((start + token, own[image], cover) for token, image, cover in sample.groundings)
                start += len(sample.input_ids)
            # As the model sorts the images of a row.
            slots = {image: slot for slot, image in enumerate(sorted(set(row_images)))}
            groundings.extend((row, token, slots[image], coverage) for token, image, coverage in row_groundings)
            image_indices.extend(row_images)
        batch = self._pad([[encoded[member] for member in members] for members in rows])
        if images:
            batch["pixel_values"] = self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        if image_indices != list(range(len(images))):
            batch["image_indices"] = torch.tensor(image_indices)
        if groundings:
            batch["grounding_queries"] = torch.tensor([entry[:2] for entry in groundings])
            batch["grounding_slots"] = torch.tensor([entry[2] for entry in groundings])
            batch["grounding_coverage"] = torch.stack([entry[3] for entry in groundings])
        return batch

    def _packed(self, samples: Sequence[EncodedSample]) -> list[list[int]]:
        tokens = self.grid[0] * self.grid[1]
        return packed_rows(
            [len(sample.input_ids) for sample in samples],
            self.pack_length,
            [tokens * len(sample.images) for sample in samples],
        )

    def _encoded(self, sample: Sample) -> EncodedSample:
        validate_sample(sample)
        _require_masks(sample)
        whole = EncodedSample([], [], [], list(sample["images"]), [], [])
        texts = []
        for chat, chat_images, chat_groundings in self._chats(sample):
            tokens = chat.input_ids.count(self.processor.image_token_id)
            if tokens != len(chat_images):
                raise UserError(
                    f"messages: sample '{sample['id']}' has {tokens} image tokens in its rendered text, expected "
                    f"{len(chat_images)}, one for each image part."
                )
            aligned = list(self._aligned_tokens(sample, chat, chat_images, chat_groundings))
            texts.append((chat, chat_images, aligned))
        shared = self._shared_prefix(sample, texts) if self.shared_prefix else 0
        if shared:
            whole.append(texts[0][0], texts[0][1], [], 0, 0, shared)
        for number, (chat, chat_images, aligned) in enumerate(texts, start=1):
            whole.append(chat, chat_images, aligned, number, shared, len(chat.input_ids))
        return self._cut(sample, whole)

    def _shared_prefix(self, sample: Sample, texts: list) -> int:
        """How many tokens, images among them and nothing that is learned or aligned, all texts of a sample begin with."""
        chats = [chat.input_ids for chat, _, _ in texts]
        shared = next((n for n, each in enumerate(zip(*chats)) if len({*each}) > 1), min(map(len, chats)))
        for chat, _, aligned in texts:
            learned = next((number for number, label in enumerate(chat.labels) if label != -100), len(chat.labels))
            shared = min(shared, learned - 1, *(token for token, _, _ in aligned))
        image_token = self.processor.image_token_id
        apart = any(images != texts[0][1] for _, images, _ in texts)
        if len(texts) > 1 and (apart or any(image_token in ids[max(0, shared) :] for ids in chats)):
            raise UserError(
                f"shared_prefix: sample '{sample['id']}' has questions about different images, expected all to begin with the "
                "same ones."
            )
        return max(0, shared) if len(texts) > 1 else 0

    def _chats(self, sample: Sample) -> Iterator[tuple[EncodedChat, list[int], list[tuple[int, Grounding]]]]:
        """Each text of a sample: its encoding, the images of its image tokens, its groundings by message number."""
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
        """Position in the chat, image of the sample and mask coverage of every token that is aligned."""
        image_token = self.processor.image_token_id
        image_positions = [position for position, token in enumerate(chat.input_ids) if token == image_token]
        phrases: dict[tuple[int, int, int, int], list[Grounding]] = {}
        for message, item in chat_groundings:
            phrases.setdefault((message, item["start"], item["end"], item["image"]), []).append(item)
        for (message, start, end, image), items in phrases.items():
            tokens = chat.phrase_tokens(message, start, end)
            if not tokens:
                raise UserError(
                    f"groundings: sample '{sample['id']}' has the span [{start}, {end}) in message {items[0]['message']}, "
                    "which no token of the rendered chat holds."
                )
            width, height = upright_size(sample["images"][image])
            # "Three men" have a mask each in many data sets: the phrase is about all of them.
            mask = tuple(item["mask"]["counts"] for item in items), height, width
            coverage = self.coverages.get(mask, partial(self._mask_coverage, *mask))
            if not coverage.any():
                continue  # the crop of the image processor left nothing of it
            queries = tokens if self.phrase_queries == "all" else tokens[-1:]
            if self.answer_queries == "predict" and sample["messages"][items[0]["message"]]["role"] == "assistant":
                # The first token of a phrase chooses it: what names a thing is seen before it is said.
                queries = [token - 1 for token in (tokens if self.phrase_queries == "all" else tokens[:1]) if token > 0]
            for token in queries:
                seen = [number for position, number in zip(image_positions, chat_images) if position <= token]
                if image in (seen[-1:] if self.image_visibility == "latest" else seen):
                    yield token, image, coverage

    def _mask_coverage(self, counts: tuple[str, ...], height: int, width: int) -> torch.Tensor:
        geometry: ImageGeometry = self.processor.image_geometry(height, width)
        masks = [torch.from_numpy(decode_mask({"size": [height, width], "counts": each})) for each in counts]
        return geometry.mask_coverage(torch.stack(masks).any(0, keepdim=True), *self.grid)[0].flatten()

    def _cut(self, sample: Sample, whole: EncodedSample) -> EncodedSample:
        most, ids = self.max_length, whole.input_ids
        if most is None or len(ids) <= most:
            return whole
        if self.processor.image_token_id in ids[most:]:
            raise UserError(
                f"max_length: sample '{sample['id']}' has {len(ids)} tokens and an image after token {most}, "
                "expected a length that keeps all image tokens."
            )
        kept = whole.labels[:most]
        if any(label != -100 for label in whole.labels) and all(label == -100 for label in kept):
            raise UserError(
                f"max_length: sample '{sample['id']}' has {len(ids)} tokens and no token to learn among the first {most}, "
                "expected a length that keeps some of its answers."
            )
        return replace(
            whole,
            input_ids=ids[:most],
            labels=kept,
            positions=whole.positions[:most],
            texts=whole.texts[:most],
            groundings=[each for each in whole.groundings if each[0] < most],
        )

    def _pad(self, rows: list[list[EncodedSample]]) -> dict[str, torch.Tensor]:
        length = max(sum(len(sample.input_ids) for sample in row) for row in rows)
        pad = self.processor.tokenizer.pad_token_id
        if pad is None:  # Llama's tokenizers name none; what stands there is neither seen nor learned
            pad = self.processor.tokenizer.eos_token_id or 0
        ids = torch.full((len(rows), length), pad)
        labels = torch.full((len(rows), length), -100)
        positions = torch.zeros((len(rows), length), dtype=torch.long)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        for number, row in enumerate(rows):
            size = 0
            for sample in row:
                span = slice(size, size + len(sample.input_ids))
                ids[number, span] = torch.tensor(sample.input_ids)
                labels[number, span] = torch.tensor(sample.labels)
                positions[number, span] = torch.tensor(sample.positions)
                size = span.stop
            mask[number, :size] = 1
        batch = {"input_ids": ids, "labels": labels}
        if self.shared_prefix:
            batch |= {
                "position_ids": positions,
                "attention_mask": _seen([each for row in rows for each in row], length),
            }
        elif self.independent_turns or self.packing:
            # Padding has position 0 throughout: each such token is a sequence of its own.
            batch["position_ids"] = positions
        else:
            batch["attention_mask"] = mask
        return batch


def _seen(samples: list[EncodedSample], length: int) -> torch.Tensor:
    """(rows, 1, length, length): a text sees the beginning that it shares, and itself; padding sees itself."""
    texts = torch.full((len(samples), length), -1)
    for row, sample in enumerate(samples):
        texts[row, : len(sample.texts)] = torch.tensor(sample.texts)
    seen = (texts[:, None, :] == texts[:, :, None]) | ((texts[:, None, :] == 0) & (texts[:, :, None] > 0))
    return (seen & torch.ones(length, length, dtype=torch.bool).tril())[:, None]


def _require_masks(sample: Sample) -> None:
    missing = sum(item["mask"] is None for item in sample["groundings"])
    if missing:
        raise UserError(
            f"groundings: sample '{sample['id']}' lacks the mask of {missing} of its phrases, expected one for each: make "
            "them with `age-vlm ground`, or leave these groundings out."
        )


def _with_images(message: Message, images: int) -> Message:
    parts = [{"type": "image", "text": None}] * images
    return {"role": message["role"], "content": [*parts, *message["content"]]}
