"""Generation: images are given once, at the prefill, in the order of their tokens and without a batch dimension."""

from math import prod

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .attention_maps_agevlm import AttentionRecorder
from .cache_agevlm import cached_images
from .compat_agevlm import accepts_old_cache_name
from .image_masks_agevlm import check_image_count


class NoImageTokens(LogitsProcessor):
    """The image token is an input only: an answer that contained one would ask for an image."""

    def __init__(self, image_token_id: int):
        self.image_token_id = image_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.clone()
        scores[..., self.image_token_id] = -float("inf")
        return scores


class AgeVlmGenerationMixin(GenerationMixin):
    """`GenerationMixin` for a model that has an `image_grid`, and whose `model` has `find_image_tokens`."""

    @accepts_old_cache_name
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        *args,
        output_attention_maps: bool = False,
        **kwargs,
    ):
        """As `GenerationMixin.generate`; the image token is never generated, whatever the settings.

        Args:
            output_attention_maps: with `return_dict_in_generate=True`, return where the model looked when it predicted each
                token, see [`AgeVlmGenerateOutput`]: of the layers and heads that were aligned in training.

        Raises:
            ValueError: one sentence, for images in a prefill by chunks, assisted decoding on a cache that holds text, or maps
                of assisted decoding or without `return_dict_in_generate`.
        """

        def setting(name: str):
            configs = (generation_config, self.generation_config)
            given = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
            return next((value for value in given if value is not None), None)

        if setting("prefill_chunk_size") is not None and (kwargs.get("pixel_values") is not None or _encoded(kwargs)):
            raise ValueError(
                f"prefill_chunk_size: got {setting('prefill_chunk_size')} with images, expected None: a chunk would lose the "
                "images of the others."
            )
        names = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
        assisted = next((name for name in names if setting(name) is not None), None)
        cached = kwargs["cache"].get_seq_length() if kwargs.get("cache") is not None else 0
        if cached and assisted:
            raise ValueError(
                f"cache: got a cache of {cached} tokens for assisted decoding, expected an empty one: transformers (5.24) would "
                "read them a second time."
            )
        processors = LogitsProcessorList([*(logits_processor or ()), NoImageTokens(self.config.image_token_id)])
        returned = setting("return_dict_in_generate")
        if output_attention_maps and not returned:
            raise ValueError("output_attention_maps: got True, expected return_dict_in_generate=True with it.")
        if output_attention_maps and assisted:
            raise ValueError(
                f"output_attention_maps: got True with {assisted}, expected one of the two: several tokens come of one step."
            )
        # An assistant would be given the recorder, too.
        if assisted or not (returned and (output_attention_maps or setting("output_attentions"))):
            return super().generate(inputs, generation_config, processors, *args, **kwargs)
        recorder = AttentionRecorder(self._grid_of(kwargs) if output_attention_maps else None, self.alignment)
        output = super().generate(inputs, generation_config, processors, *args, **kwargs, attention_recorder=recorder)
        given = next((value for value in (inputs, kwargs.get("input_ids")) if value is not None), None)
        return recorder.completed(output, 0 if given is None else given.shape[1])

    def _grid_of(self, kwargs) -> tuple[int, int] | None:
        """Rows and columns of the image tokens of the images that are given or in the cache; None without any."""
        if kwargs.get("pixel_values") is not None:
            return self.image_grid(tuple(kwargs["pixel_values"].shape[-2:]))
        encoded, cached = _encoded(kwargs), cached_images(kwargs.get("cache"), self.config.cross_attention_layers[0])
        if encoded is None and cached is None:
            return None
        tokens = encoded.pooler_output.shape[1] if cached is None else cached.tokens_per_image()
        known = [self.image_grid(), *self.model.image_grids.values()]
        if (found := next((grid for grid in known if prod(grid) == tokens), None)) is None:
            raise ValueError(
                f"output_attention_maps: got images of {tokens} tokens, expected pixel_values, or images of "
                f"{' or '.join(f'{rows} x {columns}' for rows, columns in known)} tokens."
            )
        return found

    def prepare_inputs_for_generation(
        self,
        input_ids,
        cache=None,
        inputs_embeds=None,
        mm_encoder_outputs=None,
        image_token_mask=None,
        attention_recorder=None,
        is_first_iteration=False,
        **kwargs,
    ):
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, cache=cache, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if attention_recorder is not None and attention_recorder.grid is not None:
            given = model_inputs.get("inputs_embeds")
            given = model_inputs["input_ids"] if given is None else given
            batch = torch.arange(given.shape[0], device=given.device)
            # The last query of a row is the one that predicts.
            model_inputs["cross_attention_queries"] = torch.stack(
                [batch, torch.full_like(batch, given.shape[1] - 1)], -1
            )
        encoded = (mm_encoder_outputs or {}).get("image")
        if encoded is None or not (is_first_iteration or not kwargs.get("use_cache", True)):
            return model_inputs
        if model_inputs.get("inputs_embeds") is not None:
            is_image = self.model.find_image_tokens(None, inputs_embeds, image_token_mask)
            new_length = model_inputs["inputs_embeds"].shape[1]
            if image_token_mask is not None:
                model_inputs["image_token_mask"] = image_token_mask[:, -new_length:]
        else:
            is_image = self.model.find_image_tokens(input_ids)
            new_length = model_inputs["input_ids"].shape[1]
        if new_length < is_image.shape[1]:
            # A continued chat brings all its images again: those whose tokens are in the cache are there already.
            is_new = torch.zeros_like(is_image)
            is_new[:, -new_length:] = True
            keep = is_new[is_image]
            if len(keep) == len(encoded.pooler_output):
                kept = encoded.pooler_output[keep.to(encoded.pooler_output.device)]
                encoded = BaseModelOutputWithPooling(pooler_output=kept) if len(kept) else None
        model_inputs["mm_encoder_outputs"] = {"image": encoded}
        return model_inputs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        if model_kwargs.get("attention_recorder") is not None:
            model_kwargs["attention_recorder"].add(outputs)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids=None, **model_kwargs
    ):
        # transformers counts one text token for each token of an image; here one stands for the whole image.
        image_indices = model_kwargs.pop("image_indices", None)
        encoded = _encoded(model_kwargs)
        model_kwargs.pop("mm_encoder_outputs", None)
        images = None if encoded is None else encoded.pooler_output
        if images is not None and (image_indices is not None or expand_size > 1):
            has_ids = input_ids is not None and input_ids.numel() > 0
            embeds, given_mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("image_token_mask")
            mask = self.model.find_image_tokens(
                input_ids if has_ids else None, None if has_ids else embeds, None if has_ids else given_mask
            )
            given = images if image_indices is None else image_indices
            if len(given) < mask.sum() and model_kwargs.get("cache") is not None:
                # A continued chat may bring its new images alone.
                mask = mask[:, int(model_kwargs["cache"].get_seq_length()) :]
            counts = mask.sum(-1).tolist()
            check_image_count(sum(counts), len(images), image_indices)
            if image_indices is not None:
                # Each beam has its own images: shared ones become copies.
                images = images[image_indices]
            if expand_size > 1:
                # Each row's group is repeated as a whole, not each image.
                groups = torch.arange(sum(counts), device=images.device).split(counts)
                images = images[torch.cat([group.repeat(expand_size) for group in groups])]
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if images is not None:
            model_kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=images)}
        return input_ids, model_kwargs


def _encoded(model_kwargs) -> BaseModelOutputWithPooling | None:
    return (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
