"""AGE-VLM (Mahajan et al., arXiv 2511.17793): a Llama that looks at images through gated cross-attention."""

import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from transformers import Cache, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from ..configuration.configuration_agevlm import AgeVlmConfig
from .attention_maps_agevlm import check_queries, mean_attention
from .backbones_agevlm import BackboneFiles, model_from_backbones
from .cache_agevlm import check_cache
from .compat_agevlm import accepts_old_cache_name
from .cross_attention_agevlm import AgeVlmTextModel, unseen_images
from .generation_agevlm import AgeVlmGenerationMixin
from .image_masks_agevlm import check_image_count, group_images_by_row
from .outputs_agevlm import AgeVlmCausalLMOutputWithPast, AgeVlmModelOutputWithPast
from .pretrained_agevlm import AgeVlmPreTrainedModel
from .vision_agevlm import (
    AgeVlmMultiModalProjector,
    drop_unused_head,
    image_shape,
    image_tokens,
    position_encoding_2d,
    vision_encoder,
    vision_width,
)


logger = logging.get_logger(__name__)


class AgeVlmModel(AgeVlmPreTrainedModel):
    """Vision encoder, projector and language model, without a language modelling head."""

    def __init__(self, config: AgeVlmConfig):
        super().__init__(config)
        self.vision_tower = vision_encoder(config.vision_config)
        drop_unused_head(self.vision_tower)
        self.multi_modal_projector = AgeVlmMultiModalProjector(
            vision_width(self.vision_tower, config.vision_config), config.text_config.hidden_size
        )
        self.language_model = AgeVlmTextModel(config)
        self.image_grids: dict[tuple[int, int], tuple[int, int]] = {}
        self.post_init()

    @torch.no_grad()
    def image_grid(self, image_size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Rows and columns of the image tokens of an image, found with a blank one and kept.

        Args:
            image_size: height and width of `pixel_values`, those of the encoder's configuration when left out.
        """
        channels, *default = image_shape(self.config.vision_config)
        height, width = image_size or default
        if (height, width) not in self.image_grids:
            tower = self.vision_tower
            training = [module for module in tower.modules() if module.training]
            tower.eval()  # a blank image is nothing to take statistics of
            blank = torch.zeros(1, channels, height, width, device=tower.device, dtype=tower.dtype)
            _, *grid = image_tokens(tower, tower(blank, return_dict=True).last_hidden_state, (height, width))
            for module in training:
                module.training = True
            self.image_grids[height, width] = tuple(grid)
        return self.image_grids[height, width]

    def attention_maps(
        self,
        cross_attention_queries: torch.LongTensor,
        *,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        **inputs,
    ) -> torch.FloatTensor:
        """Where the model looks: one forward pass, and of it the maps of some queries.

        Args:
            cross_attention_queries: (maps, 2) batch index and position of each.
            layers: cross-attention blocks, counted from 0 among the blocks; those that were aligned in training when left
                out, the first where the configuration does not say.
            heads: the aligned ones when left out, the first half where the configuration does not say.
            inputs: of [`AgeVlmModel.forward`], `pixel_values` among them.

        Returns:
            (maps, rows, columns) float32, on the image that a query sees, or on the last one of several. It sums to 1, to less
            where other images are seen, and to 0 where none is.

        Raises:
            ValueError: one sentence, without images, or for a block or head that is not there.
        """
        if inputs.get("pixel_values") is None:
            raise ValueError("pixel_values: got none, expected the images to look at.")
        maps = self(**inputs, cross_attention_queries=cross_attention_queries).cross_attention_maps
        if maps is None:
            raise ValueError("pixel_values: got no image, expected at least one.")
        alignment = self.alignment
        if layers is not None:
            alignment = replace(alignment, layers=layers)
        if heads is not None:
            alignment = replace(alignment, heads=heads)
        layers, heads = alignment.layer_indices(len(maps)), alignment.head_indices(maps[0].shape[1])
        return mean_attention(maps, self.image_grid(tuple(inputs["pixel_values"].shape[-2:])), layers, heads)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.FloatTensor, **kwargs) -> BaseModelOutputWithPooling:
        """The encoder's own output as `last_hidden_state`; image tokens (images, tokens, text width) as `pooler_output`.

        Args:
            pixel_values: (images, channels, height, width).
        """
        if pixel_values.ndim != 4:
            raise ValueError(
                f"pixel_values: got {pixel_values.ndim} dimensions, {tuple(pixel_values.shape)}, expected 4: images, "
                "channels, height, width."
            )
        channels = image_shape(self.config.vision_config)[0]
        if pixel_values.shape[1] != channels:
            raise ValueError(f"pixel_values: got {pixel_values.shape[1]} channels, expected {channels}.")
        if hasattr(self.vision_tower, "timm_model"):
            wanted = kwargs.get("output_hidden_states", self.config.vision_config.output_hidden_states)
            # A list of maps has no other hidden states than itself.
            kwargs = {"do_pooling": False, "output_hidden_states": wanted and not self.vision_tower.features_only}
        kwargs["return_dict"] = True
        outputs = self.vision_tower(pixel_values.to(self.vision_tower.dtype), **kwargs)
        last_hidden_state, hidden_states = outputs.last_hidden_state, outputs.hidden_states
        if isinstance(last_hidden_state, (list, tuple)):
            last_hidden_state, hidden_states = last_hidden_state[-1], tuple(last_hidden_state) if wanted else None
        image_size = tuple(pixel_values.shape[-2:])
        tokens, rows, columns = image_tokens(self.vision_tower, last_hidden_state, image_size)
        if not torch.compiler.is_compiling():  # nothing that a graph should depend on
            self.image_grids[image_size] = rows, columns
        tokens = self.multi_modal_projector(tokens)
        return BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state,
            pooler_output=tokens + position_encoding_2d(rows, columns, tokens.shape[-1], like=tokens),
            hidden_states=hidden_states,
            attentions=getattr(outputs, "attentions", None),
        )

    def find_image_tokens(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor | None = None,
        image_token_mask: torch.BoolTensor | None = None,
    ) -> torch.BoolTensor:
        """(batch, length): which tokens stand for an image. Of embeddings, by that of the image token, if no other token has
        the same (the reserved tokens of a Llama often do); else `image_token_mask` has to say it.

        Raises:
            ValueError: one sentence, for embeddings that do not tell, or a mask of another shape.
        """
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        if image_token_mask is not None:
            if image_token_mask.shape != inputs_embeds.shape[:2]:
                raise ValueError(
                    f"image_token_mask: got shape {tuple(image_token_mask.shape)}, expected that of the text, "
                    f"{tuple(inputs_embeds.shape[:2])}."
                )
            return image_token_mask.bool()
        embeddings = self.get_input_embeddings()
        token = embeddings(torch.tensor(self.config.image_token_id, device=inputs_embeds.device))
        found = (inputs_embeds == token.to(inputs_embeds)).all(-1)
        if not torch.compiler.is_compiling() and found.any():
            table = embeddings.weight
            # The first column alone leaves few to compare whole.
            alike = table[table[:, 0] == token[0]]
            if (alike == token).all(-1).sum() > 1:
                raise ValueError(
                    f"inputs_embeds: got the embedding of the image token, {self.config.image_token_id}, which other tokens "
                    "share, expected input_ids, or image_token_mask beside them."
                )
        return found

    @accepts_old_cache_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        image_indices: torch.LongTensor | None = None,
        image_token_mask: torch.BoolTensor | None = None,
        cross_attention_queries: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AgeVlmModelOutputWithPast:
        """
        Args:
            input_ids: (batch, length), with one `image_token_id` for each image.
            pixel_values: (images, channels, height, width), in the order of their tokens, row by row.
            position_ids: (batch, length); positions that restart, with no attention mask, are packed sequences: each
                sees only its own image.
            image_token_mask: (batch, length), with `inputs_embeds`: which of them stand for an image, see `find_image_tokens`.
            image_indices: (image tokens,) which image each image token stands for, where several share one.
            cross_attention_queries: (maps, 2) batch index and position of the text rows whose attention maps are wanted.
            mm_encoder_outputs: `{"image": output of get_image_features}` instead of `pixel_values`.

        Raises:
            ValueError: one sentence, where shapes or numbers of images and image tokens disagree.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: expected exactly one of the two.")
        if kwargs.get("use_cache") is None:
            # Shared images and packed texts are for training, which has no use for a cache.
            kwargs["use_cache"] = self.config.use_cache and image_indices is None and not self.training
        encoded = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and encoded is not None:
            raise ValueError("pixel_values, mm_encoder_outputs: got both, expected one of the two.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        batch, length = inputs_embeds.shape[:2]
        check_cache(cache, batch)
        check_queries(cross_attention_queries, batch, length)

        if pixel_values is not None and len(pixel_values) == 0:
            check_image_count(
                int(self.find_image_tokens(input_ids, inputs_embeds, image_token_mask).sum()), 0, image_indices
            )
        elif pixel_values is not None:
            encoded = self.get_image_features(pixel_values, return_dict=True)
        image_states = encoded.pooler_output if encoded is not None else None
        if image_states is not None and image_indices is not None and (cache is not None or kwargs["use_cache"]):
            # In a cache, where new text follows, each image token has an image of its own.
            is_image = self.find_image_tokens(input_ids, inputs_embeds, image_token_mask)
            check_image_count(int(is_image.sum()), len(image_states), image_indices)
            image_states, image_indices = image_states[image_indices], None
        images_by_row = None
        if image_states is not None:
            image_states = image_states.to(inputs_embeds.device, inputs_embeds.dtype)
            is_image = self.find_image_tokens(input_ids, inputs_embeds, image_token_mask)
            check_image_count(int(is_image.sum()), image_states.shape[0], image_indices)
            past_length = cache.get_seq_length() if cache is not None else 0
            images_by_row = group_images_by_row(is_image, image_indices, past_length)
        elif cache is None and not torch.compiler.is_compiling():
            if self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
                # All ranks must run, and reduce, the same parameters; a rank without an image gives them zeros.
                blank = inputs_embeds.new_zeros(1, *image_shape(self.config.vision_config))
                image_states = self.get_image_features(blank, return_dict=True).pooler_output.to(inputs_embeds.dtype)
                images_by_row = unseen_images(batch, inputs_embeds.device)
            elif input_ids is not None and (input_ids == self.config.image_token_id).any():
                logger.warning_once("Got image tokens but no images: these rows are treated as text.")

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            image_states=image_states,
            images_by_row=images_by_row,
            cross_attention_queries=cross_attention_queries,
            **kwargs,
        )
        return AgeVlmModelOutputWithPast(**outputs, image_outputs=encoded)


class AgeVlmForConditionalGeneration(AgeVlmPreTrainedModel, AgeVlmGenerationMixin):
    """AGE-VLM with a language modelling head: answers questions about images, and says where it looked."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: AgeVlmConfig):
        super().__init__(config)
        self.model = AgeVlmModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def image_grid(self, image_size: tuple[int, int] | None = None) -> tuple[int, int]:
        """See [`AgeVlmModel.image_grid`]."""
        return self.model.image_grid(image_size)

    def attention_maps(self, cross_attention_queries: torch.LongTensor, **inputs) -> torch.FloatTensor:
        """See [`AgeVlmModel.attention_maps`]."""
        return self.model.attention_maps(cross_attention_queries, **inputs)

    def get_image_features(self, pixel_values: torch.FloatTensor, **kwargs) -> BaseModelOutputWithPooling:
        """See [`AgeVlmModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @accepts_old_cache_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        image_indices: torch.LongTensor | None = None,
        image_token_mask: torch.BoolTensor | None = None,
        cross_attention_queries: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AgeVlmCausalLMOutputWithPast:
        """
        Args:
            labels: (batch, length), -100 where no loss is wanted; `num_items_in_batch` is taken from the keywords.
            logits_to_keep: number of last positions, or their indices, to compute logits for; 0 for all.

        The other arguments are those of [`AgeVlmModel.forward`].
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            image_indices=image_indices,
            image_token_mask=image_token_mask,
            cross_attention_queries=cross_attention_queries,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept])
        loss = None
        if labels is not None:
            if labels.shape != hidden_states.shape[:2]:
                raise ValueError(
                    f"labels: got shape {tuple(labels.shape)}, expected that of the text, {tuple(hidden_states.shape[:2])}."
                )
            # An image is given, never said: collators that leave its token in the labels would teach to ask for one.
            labels = labels.masked_fill(labels == self.config.image_token_id, -100)
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return AgeVlmCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            cross_attention_maps=outputs.cross_attention_maps,
            image_outputs=outputs.image_outputs,
        )

    @classmethod
    def from_backbones(
        cls,
        text: str | os.PathLike | LlamaForCausalLM,
        vision: str | os.PathLike | PreTrainedModel,
        *,
        processor=None,
        image_token: str | None = None,
        dtype: torch.dtype | str | None = None,
        gguf_file: str | None = None,
        text_revision: str | None = None,
        vision_revision: str | None = None,
        **config_overrides,
    ) -> "AgeVlmForConditionalGeneration":
        """A new AGE-VLM from a pretrained language model and a pretrained vision encoder, their weights unchanged.

        Args:
            text, vision: Hub id or folder of a `LlamaForCausalLM` and of a vision encoder (timm's too), or loaded models.
            processor: the [`AgeVlmProcessor`] to go with; when left out, what its own `from_backbones` makes of these arguments.
            image_token: as for the processor. The embedding of a new token starts at the mean of all others.
            dtype: of the whole model, that of the language model's file when left out.
            gguf_file: name of the GGUF file in `text`; its weights are dequantised.
            text_revision, vision_revision: branch, tag or commit on the Hub.
            config_overrides: fields of [`AgeVlmConfig`].

        Raises:
            ValueError: one sentence, for a folder that is not there, a gated repository, a quantised or another kind of model.
        """
        files = BackboneFiles(text, vision, gguf_file, text_revision, vision_revision)
        return model_from_backbones(cls, files, processor, image_token, dtype, config_overrides)


__all__ = ["AgeVlmForConditionalGeneration", "AgeVlmModel", "AgeVlmPreTrainedModel"]
