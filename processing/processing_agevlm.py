"""Images and chat text -> what AGE-VLM takes: `pixel_values`, `input_ids`, `attention_mask`."""

import copy
import os
from collections.abc import Iterator, Sequence

import torch
from transformers import AutoTokenizer
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ProcessorMixin

from ..configuration.checkpoint_code_agevlm import AUTO_MAP, save_with_code
from .backbone_files_agevlm import add_image_token, load_component
from .chat_agevlm import default_template, template_with_images
from .image_geometry_agevlm import ImageGeometry, image_geometry
from .image_settings_agevlm import encoder_image_processor
from .images_agevlm import load_rgb


# Its common tests, and whoever catches its error, look for these words.
AS_TRANSFORMERS_SAYS = "image tokens in the prompts should be the same as the number of images."


class AgeVlmProcessor(ProcessorMixin):
    r"""
    Args:
        image_processor: any image processor of transformers that resizes to a size or a shortest edge, and may crop.
        tokenizer: of the language model.
        image_token (`str`): the token of the vocabulary that stands for one image.
        chat_template (`str` or `dict`, *optional*): the tokenizer's own when left out; Llama 3's format, or plain text, for
            a tokenizer that has none. One for messages of plain text gets the image token where an image is.

    Calling it gives `pixel_values` (images, channels, height, width), `input_ids` and `attention_mask`
    (batch, length): nothing of text length besides, so whatever truncates or pads text can do so safely.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        image_token: str = "<|reserved_special_token_0|>",
        chat_template: str | dict[str, str] | None = None,
        **kwargs,
    ):
        self.image_token, self.image_token_id = add_image_token(tokenizer, image_token)
        template = chat_template or default_template(tokenizer)
        if isinstance(template, dict):
            template = {name: template_with_images(tokenizer, each, image_token) for name, each in template.items()}
        else:
            template = template_with_images(tokenizer, template, image_token)
        super().__init__(image_processor, tokenizer, chat_template=template)

    def prepare_inputs_layout(self, images=None, text=None, **kwargs):
        images = _loaded(images)
        adds_special_tokens = {**kwargs, **kwargs.get("text_kwargs", {})}.get("add_special_tokens", True)
        if text is not None and adds_special_tokens and self._tokenizer_adds_bos():
            # A rendered chat starts with it already.
            bos = self.tokenizer.bos_token
            texts = [text] if isinstance(text, str) else text
            text = [one.removeprefix(bos) if isinstance(one, str) else one for one in texts]
        return super().prepare_inputs_layout(images=images, text=text, **kwargs)

    def _tokenizer_adds_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("")["input_ids"][:1] == [bos]

    def validate_inputs(self, images=None, text=None, **kwargs):
        # transformers compares totals, and that since 5.17 only; by row, an image cannot end up in another's text.
        if text is not None and all(isinstance(sample, str) for sample in text):
            images_by_row = isinstance(images, (list, tuple)) and any(isinstance(row, (list, tuple)) for row in images)
            tokens = [sample.count(self.image_token) for sample in text]
            if images_by_row and tokens != [len(row) for row in images]:
                raise ValueError(
                    f"images: got {[len(row) for row in images]} images for {tokens} image tokens in the rows of the text, "
                    f"expected as many: {AS_TRANSFORMERS_SAYS}"
                )
            count = 0 if images is None else len(make_flat_list_of_images(images))
            if sum(tokens) != count:
                raise ValueError(
                    f"images: got {count} images for {sum(tokens)} image tokens in the text, expected as many: "
                    f"{AS_TRANSFORMERS_SAYS}"
                )
        super().validate_inputs(images=images, text=text, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        from transformers.processing_utils import MultiModalData

        ones = [1] * len(image_sizes or ())
        return MultiModalData(num_image_tokens=ones, num_image_patches=ones)

    def image_geometry(self, height: int, width: int) -> ImageGeometry:
        """Where pixels, masks and points of a `height` x `width` source land in `pixel_values`."""
        return image_geometry(self.image_processor, height, width)

    def post_process_attention(
        self, attention_maps: torch.Tensor, target_sizes: Sequence[tuple[int, int]]
    ) -> list[torch.Tensor]:
        """Attention on image tokens -> attention on the pixels of the images.

        Args:
            attention_maps: (images, rows, columns) or (images, tokens, rows, columns), as `attention_maps` of the model and
                of what it generates.
            target_sizes: height and width of each image, in pixels, as it was given to the processor.

        Returns:
            For each image (height, width) or (tokens, height, width) float32, bilinear between the image tokens and 0 where
            the crop of the image processor shows the model nothing.

        Raises:
            ValueError: one sentence, for another number of sizes.
        """
        if attention_maps.ndim not in (3, 4):
            raise ValueError(
                f"attention_maps: got shape {tuple(attention_maps.shape)}, expected (images, rows, columns), or "
                "(images, tokens, rows, columns)."
            )
        if len(target_sizes) != len(attention_maps):
            raise ValueError(
                f"target_sizes: got {len(target_sizes)}, expected one for each of {len(attention_maps)} images."
            )
        pixels = []
        for maps, (height, width) in zip(attention_maps, target_sizes):
            geometry = self.image_geometry(int(height), int(width))
            pixels.append(geometry.to_source(maps) if maps.ndim == 3 else geometry.to_source(maps[None])[0])
        return pixels

    def to_dict(self):
        return {**super().to_dict(), "auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]}}

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        return save_with_code(self, super().save_pretrained, save_directory, push_to_hub, **kwargs)

    @classmethod
    def from_backbones(
        cls,
        text: str | os.PathLike,
        vision: str | os.PathLike,
        *,
        image_token: str | None = None,
        image_size: int | Sequence[int] | None = None,
        chat_template: str | None = None,
        gguf_file: str | None = None,
        text_revision: str | None = None,
        vision_revision: str | None = None,
    ) -> "AgeVlmProcessor":
        """The processor that goes with [`AgeVlmForConditionalGeneration.from_backbones`].

        Args:
            text: Hub id or folder with the tokenizer, or a tokenizer.
            vision: Hub id or folder of the vision encoder; what its own image processor does to a colour, its resampling
                and its size are taken.
            image_token: token of the vocabulary that stands for an image. When left out: the first reserved special one of
                a Llama 3, else a new one, `<image>`.
            image_size: of the model's input, a side or height and width in pixels, the encoder's own when left out.
            chat_template: instead of the tokenizer's own.
            gguf_file: name of the GGUF file in `text` that holds the tokenizer.
            text_revision, vision_revision: branch, tag or commit on the Hub.

        Raises:
            ValueError: one sentence, for a component that cannot be loaded, or an `image_token` that is not known.
        """
        if isinstance(text, (str, os.PathLike)):
            tokenizer = load_component("text", text, AutoTokenizer, revision=text_revision, gguf_file=gguf_file)
        else:
            tokenizer = copy.deepcopy(text)  # it may get a new token
        return cls(
            encoder_image_processor(vision, image_size, vision_revision),
            tokenizer,
            image_token=add_image_token(tokenizer, image_token)[0],
            chat_template=chat_template,
        )


def _loaded(images):
    """Images as RGB, flat or by row of the text; None where there are none. A None among them is a row without any."""
    if images is None or not _is_nested(images):
        return None if images is None else load_rgb(images)
    rows = [list(_flat(row)) if row is None or _is_nested(row) else load_rgb(row) for row in images]
    if any(isinstance(row, list) for row in rows):
        rows = [row if isinstance(row, list) else [row] for row in rows]
        return rows if any(rows) else None
    return rows or None


def _flat(images) -> Iterator:
    if images is not None and _is_nested(images):
        for image in images:
            yield from _flat(image)
    elif images is not None:
        yield load_rgb(images)


def _is_nested(images) -> bool:
    return isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4


__all__ = ["AgeVlmProcessor"]
