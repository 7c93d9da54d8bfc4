"""AGE-VLM (Mahajan et al., arXiv 2511.17793): a Llama that looks at pictures through gated cross-attention."""

import os
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, Cache, GenerationMixin, LlamaForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithCrossAttentions
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from ..configuration.configuration_agevlm import AgeVlmConfig, unknown_option
from .compat_agevlm import accepts_old_cache_name
from .cross_attention_agevlm import AgeVlmGate, AgeVlmTextModel, AgeVlmTextModelOutput, nothing_placed
from .frozen_agevlm import keep_frozen_still
from .image_masks_agevlm import place_images
from .vision_agevlm import (
    AgeVlmMultiModalProjector,
    AgeVlmProjection,
    AgeVlmTimmWrapperModel,
    drop_unused_head,
    feature_map,
    image_shape,
    position_encoding_2d,
    token_grid,
    vision_encoder,
    vision_width,
)


logger = logging.get_logger(__name__)

# What the processor's chat template, that of Llama 3, has at the end of an answer.
END_OF_TURN = "<|eot_id|>"


@dataclass
class AgeVlmModelOutputWithPast(AgeVlmTextModelOutput):
    """`image_hidden_states`: (images, tokens, width) projected image tokens."""

    image_hidden_states: torch.FloatTensor | None = None


@dataclass
class AgeVlmCausalLMOutputWithPast(CausalLMOutputWithCrossAttentions):
    """
    Attributes:
        cross_attentions: one (batch, heads, length, image tokens) a block, for `output_attentions=True` under eager.
        cross_attention_maps: one (maps, heads, image tokens) a block, for `cross_attention_rows`, under every backend.
        image_hidden_states: (images, tokens, width).
        Others: as for any causal language model.
    """

    cross_attention_maps: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: torch.FloatTensor | None = None


class AgeVlmPreTrainedModel(PreTrainedModel):
    config: AgeVlmConfig
    config_class = AgeVlmConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer", "AgeVlmDecoderLayer", "AgeVlmTimmWrapperModel"]
    _keep_in_fp32_modules = ["attn_gate", "mlp_gate"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, AgeVlmGate):
            init.constant_(module.weight, module.start)
        elif isinstance(module, AgeVlmProjection):
            init.normal_(module.weight, std=module.in_features**-0.5)

    def train(self, mode: bool = True) -> "AgeVlmPreTrainedModel":
        """As `nn.Module.train`, but what does not learn has no dropout and keeps its running statistics; call it after
        `requires_grad_` has been."""
        super().train(mode)
        return keep_frozen_still(self) if mode else self

    def _set_gradient_checkpointing(self, enable: bool = True, *args, **kwargs) -> None:
        super()._set_gradient_checkpointing(enable, *args, **kwargs)
        # transformers switches its own layers, and leaves out an encoder of timm inside another model.
        for module in self.modules():
            if isinstance(module, AgeVlmTimmWrapperModel) and module.supports_gradient_checkpointing:
                module._set_gradient_checkpointing(enable)

    @classmethod
    def is_custom_code(cls) -> bool:
        # All weights start through `transformers.initialization`. Of code of which it cannot know that, transformers passes
        # over modules without parameters of their own, and a CLIP's attention would not start its projections.
        return False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info: bool = False, **kwargs):
        """As `PreTrainedModel.from_pretrained`, which logs what a checkpoint lacks and starts it at random: here it is an error.

        Raises:
            ValueError: one sentence, where weights are missing; with `output_loading_info=True` they are listed instead.
        """
        model, report = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        if output_loading_info:
            return model, report
        # Without a name the weights are the caller's own `state_dict`.
        if pretrained_model_name_or_path is not None and (missing := sorted(report["missing_keys"])):
            raise ValueError(
                f"weights: '{pretrained_model_name_or_path}' lacks {len(missing)} of {cls.__name__}, first "
                f"{', '.join(missing[:3])}; expected all of them (output_loading_info=True starts them at random)."
            )
        return model


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
        self.post_init()

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
        states = feature_map(self.vision_tower, last_hidden_state)
        tokens, rows, columns = token_grid(
            states, self.vision_tower, self.config.vision_config, tuple(pixel_values.shape[-2:])
        )
        tokens = self.multi_modal_projector(tokens)
        return BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state,
            pooler_output=tokens + position_encoding_2d(rows, columns, tokens.shape[-1], like=tokens),
            hidden_states=hidden_states,
            attentions=getattr(outputs, "attentions", None),
        )

    def image_token_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.FloatTensor | None
    ) -> torch.BoolTensor:
        """(batch, length): which tokens stand for a picture; from the embeddings where no ids are given."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token).to(inputs_embeds)).all(-1)

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
        cross_attention_rows: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AgeVlmModelOutputWithPast:
        """
        Args:
            input_ids: (batch, length), with one `image_token_id` for each picture.
            pixel_values: (images, channels, height, width), in the order of their tokens, row by row.
            position_ids: (batch, length); positions that restart, with no attention mask, are packed sequences: each
                sees only its own picture.
            image_indices: (image tokens,) which picture each image token stands for, where several share one.
            cross_attention_rows: (maps, 2) batch index and position of the text rows whose attention maps are wanted.
            mm_encoder_outputs: `{"image": output of get_image_features}` in the place of `pixel_values`.

        Raises:
            ValueError: one sentence, where shapes or numbers of pictures and image tokens disagree.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: expected exactly one of the two.")
        if kwargs.get("use_cache") is None:
            # Shared pictures and packed texts are for training, which has no use for a cache.
            kwargs["use_cache"] = self.config.use_cache and image_indices is None and not self.training
        encoded = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and encoded is not None:
            raise ValueError("pixel_values, mm_encoder_outputs: got both, expected one of the two.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        batch, length = inputs_embeds.shape[:2]
        _check_cache(cache, batch)
        _check_rows(cross_attention_rows, batch, length)

        if pixel_values is not None and len(pixel_values) == 0:
            _check_image_count(int(self.image_token_mask(input_ids, inputs_embeds).sum()), 0, image_indices)
        elif pixel_values is not None:
            encoded = self.get_image_features(pixel_values, return_dict=True)
        image_states = encoded.pooler_output if encoded is not None else None
        placed = None
        if image_states is not None:
            image_states = image_states.to(inputs_embeds.device, inputs_embeds.dtype)
            is_image = self.image_token_mask(input_ids, inputs_embeds)
            _check_image_count(int(is_image.sum()), image_states.shape[0], image_indices)
            past_length = cache.get_seq_length() if cache is not None else 0
            placed = place_images(is_image, image_indices, past_length)
        elif cache is None and not torch.compiler.is_compiling():
            if self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
                # All ranks must run, and reduce, the same parameters; a rank without a picture gives them zeros.
                blank = inputs_embeds.new_zeros(1, *image_shape(self.config.vision_config))
                image_states = self.get_image_features(blank, return_dict=True).pooler_output.to(inputs_embeds.dtype)
                placed = nothing_placed(batch, inputs_embeds.device)
            elif input_ids is not None and (input_ids == self.config.image_token_id).any():
                logger.warning_once("Got image tokens but no pictures: these rows are treated as text.")

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            image_states=image_states,
            placed_images=placed,
            cross_attention_rows=cross_attention_rows,
            **kwargs,
        )
        return AgeVlmModelOutputWithPast(**outputs, image_hidden_states=image_states)


class AgeVlmForConditionalGeneration(AgeVlmPreTrainedModel, GenerationMixin):
    """AGE-VLM with a language modelling head: answers questions about pictures, and says where it looked."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: AgeVlmConfig):
        super().__init__(config)
        self.model = AgeVlmModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        # The picture's token is an input only: an answer that contained one would ask for a picture.
        self.generation_config.suppress_tokens = [config.image_token_id]

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

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
        cross_attention_rows: torch.LongTensor | None = None,
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
            cross_attention_rows=cross_attention_rows,
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
            image_hidden_states=outputs.image_hidden_states,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids,
        cache=None,
        inputs_embeds=None,
        pixel_values=None,
        mm_encoder_outputs=None,
        is_first_iteration=False,
        **kwargs,
    ):
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if is_first_iteration or not kwargs.get("use_cache", True):
            # A continued chat brings all its pictures again: those whose tokens are in the cache are there already.
            keep = None
            if model_inputs.get("inputs_embeds") is not None:
                is_image = self.model.image_token_mask(None, inputs_embeds)
                new_length = model_inputs["inputs_embeds"].shape[1]
            else:
                is_image = self.model.image_token_mask(input_ids, None)
                new_length = model_inputs["input_ids"].shape[1]
            if new_length < is_image.shape[1]:
                is_new = torch.zeros_like(is_image)
                is_new[:, -new_length:] = True
                keep = is_new[is_image]
            if pixel_values is not None:
                if keep is not None and len(keep) == len(pixel_values):
                    pixel_values = pixel_values[keep.to(pixel_values.device)]
                model_inputs["pixel_values"] = pixel_values if len(pixel_values) else None
            if mm_encoder_outputs:
                encoded = mm_encoder_outputs.get("image")
                if encoded is not None and keep is not None and len(keep) == len(encoded.pooler_output):
                    kept = encoded.pooler_output[keep.to(encoded.pooler_output.device)]
                    encoded = BaseModelOutputWithPooling(pooler_output=kept) if len(kept) else None
                model_inputs["mm_encoder_outputs"] = {"image": encoded}
        return model_inputs

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        encoded = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
        if generation_config.prefill_chunk_size is not None and (
            encoded is not None or model_kwargs.get("pixel_values") is not None
        ):
            raise ValueError(
                f"prefill_chunk_size: got {generation_config.prefill_chunk_size} with pictures, expected None: a chunk would "
                "lose the pictures of the others."
            )
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _get_candidate_generator(self, *args, model_kwargs, **kwargs):
        cached = model_kwargs["cache"].get_seq_length()
        if cached > 0:
            raise ValueError(
                f"cache: got a cache of {cached} tokens for assisted decoding, expected an empty one: "
                "transformers (5.23) would read them a second time."
            )
        return super()._get_candidate_generator(*args, model_kwargs=model_kwargs, **kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids=None, **model_kwargs
    ):
        image_indices = model_kwargs.pop("image_indices", None)
        pixel_values = model_kwargs.pop("pixel_values", None)
        encoded = (model_kwargs.pop("mm_encoder_outputs", None) or {}).get("image")
        images = pixel_values if pixel_values is not None else encoded.pooler_output if encoded is not None else None
        if images is not None:
            if image_indices is not None or expand_size > 1:
                has_ids = input_ids is not None and input_ids.numel() > 0
                mask = self.model.image_token_mask(
                    input_ids if has_ids else None, None if has_ids else model_kwargs["inputs_embeds"]
                )
                given = images if image_indices is None else image_indices
                if len(given) < mask.sum() and model_kwargs.get("cache") is not None:
                    # A continued chat may bring its new pictures alone.
                    mask = mask[:, int(model_kwargs["cache"].get_seq_length()) :]
                counts = mask.sum(-1).tolist()
                _check_image_count(sum(counts), len(images), image_indices)
            if image_indices is not None:
                # Each beam has its own pictures: shared ones become copies.
                images = images[image_indices]
            if expand_size > 1:
                # Pictures are listed without a batch dimension: each row's group is repeated as a whole, not each picture.
                groups = torch.arange(sum(counts), device=images.device).split(counts)
                images = images[torch.cat([group.repeat(expand_size) for group in groups])]
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if images is not None:
            if pixel_values is not None:
                model_kwargs["pixel_values"] = images
            else:
                model_kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=images)}
        return input_ids, model_kwargs

    @classmethod
    def from_backbones(
        cls,
        text: str | os.PathLike,
        vision: str | os.PathLike,
        *,
        image_token_id: int | None = None,
        dtype: torch.dtype | str | None = None,
        **config_overrides,
    ) -> "AgeVlmForConditionalGeneration":
        """A new AGE-VLM from a pretrained language model and a pretrained vision encoder, their weights unchanged.

        Args:
            text: Hub id or folder of a `LlamaForCausalLM`.
            vision: Hub id or folder of a vision encoder, timm's own among them.
            image_token_id: token that stands for a picture. When left out: the first reserved special token of the
                tokenizer beside `text`.
            dtype: of the whole model, that of the language model's file when left out.
            config_overrides: fields of [`AgeVlmConfig`], `cross_attention_layers` for example.

        Raises:
            ValueError: one sentence, for a folder that is not there, a gated repository, or another kind of model.
        """
        if unknown := unknown_option(config_overrides):
            raise ValueError(unknown)
        text_config = load_part("text", text, AutoConfig)
        whole_vision_config = load_part("vision", vision, AutoConfig)
        vision_config = getattr(whole_vision_config, "vision_config", whole_vision_config)
        if text_config.model_type != "llama":
            raise ValueError(f"text: '{text}' is a '{text_config.model_type}' model, expected a Llama.")
        tokenizer = _tokenizer(text)
        if image_token_id is None:
            image_token_id = _image_token_id(text, text_config, tokenizer)
        language_model, text_report = load_part("text", text, LlamaForCausalLM, dtype=dtype, output_loading_info=True)
        dtype = language_model.dtype
        if vision_config.model_type == "timm_wrapper" and vision_config.model_args:
            # timm writes it into the arguments as well, where transformers would pass it twice.
            vision_config.model_args.pop("num_classes", None)
        vision_tower, vision_report = load_part(
            "vision", vision, AutoModel, dtype=dtype, config=whole_vision_config, output_loading_info=True
        )
        vision_tower = getattr(vision_tower, "vision_model", vision_tower)
        # Of a model with a text part too, only the whole knows it; the model card names what a model was built from.
        vision_tower.config.name_or_path = str(vision)
        config = cls.config_class(
            text_config=text_config,
            vision_config=vision_tower.config,
            image_token_id=image_token_id,
            **config_overrides,
        )
        # Not `.to(dtype)`: the rotary frequencies stay in float32, as in the language model.
        model = cls._from_config(config, dtype=dtype)
        drop_unused_head(vision_tower)
        # A pooler for example may be missing: it is dropped.
        vision_missing = {name.removeprefix("vision_model.") for name in vision_report["missing_keys"]}
        missing = [
            *sorted(text_report["missing_keys"]),
            *sorted(vision_missing & vision_tower.state_dict().keys()),
            *model.model.vision_tower.load_state_dict(vision_tower.state_dict(), strict=False).missing_keys,
            *model.model.language_model.load_state_dict(language_model.model.state_dict(), strict=False).missing_keys,
            *model.lm_head.load_state_dict(language_model.lm_head.state_dict(), strict=False).missing_keys,
        ]
        missing = [name for name in missing if ".cross_attention." not in name]
        if missing:
            raise ValueError(
                f"text, vision: {len(missing)} weights are not in '{text}' or '{vision}', first '{missing[0]}'."
            )
        suppressed = model.generation_config.suppress_tokens
        model.generation_config = language_model.generation_config
        model.generation_config.suppress_tokens = suppressed
        model.generation_config.eos_token_id = _with_end_of_turn(model.generation_config.eos_token_id, tokenizer)
        return model.eval()


def load_part(argument: str, name: str | os.PathLike, auto_class, **kwargs):
    """`auto_class.from_pretrained`, whose failure is one ValueError that says what to do about `argument`."""
    try:
        return auto_class.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{argument}: '{name}' could not be loaded; expected a folder with a saved model, or a Hub id that you may read "
            f"(for a gated one accept its licence at https://huggingface.co/{name} and run `hf auth login`): "
            f"{str(error).strip().splitlines()[0]}"
        ) from error


def _tokenizer(text: str | os.PathLike):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(text)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _with_end_of_turn(eos_token_id: int | list[int] | None, tokenizer) -> int | list[int] | None:
    """What else ends an answer of a chat: a base model's own configuration knows the end of a text alone."""
    ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or [])
    end_of_turn = None if tokenizer is None else tokenizer.get_vocab().get(END_OF_TURN)
    return eos_token_id if end_of_turn is None or end_of_turn in ends else [*ends, end_of_turn]


def _image_token_id(text: str | os.PathLike, text_config, tokenizer) -> int:
    if tokenizer is None:
        logger.warning(
            f"'{text}' has no tokenizer: the last token of the vocabulary, {text_config.vocab_size - 1}, stands for pictures."
        )
        return text_config.vocab_size - 1
    return reserved_image_token(tokenizer)[1]


def reserved_image_token(tokenizer) -> tuple[str, int]:
    """The first reserved special token of a Llama 3 tokenizer, as text and id: the vocabulary does not grow.

    Raises:
        ValueError: if the tokenizer reserves none; name a token of its vocabulary then.
    """
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    reserved = sorted((index, token) for token, index in added.items() if token.startswith("<|reserved_special_token_"))
    if not reserved:
        raise ValueError(
            "image_token_id: the tokenizer has no `<|reserved_special_token_...|>`, expected the id of a token that stands "
            "for a picture."
        )
    return reserved[0][1], reserved[0][0]


def _check_image_count(tokens: int, images: int, image_indices: torch.Tensor | None) -> None:
    if image_indices is not None:
        if len(image_indices) != tokens:
            raise ValueError(
                f"image_indices: got {len(image_indices)}, expected one for each of {tokens} image tokens."
            )
        wrong = image_indices[(image_indices < 0) | (image_indices >= images)]
        if len(wrong):
            raise ValueError(f"image_indices: got {int(wrong[0])}, expected indices of the {images} images.")
    elif tokens != images:
        # The words at the end are those that the tests of transformers' models look for.
        raise ValueError(
            f"pixel_values: got {images} images for {tokens} image tokens in the text, expected as many: Image features and "
            "image tokens do not match."
        )


def _check_cache(cache: Cache | None, batch: int) -> None:
    for layer in cache.layers if cache is not None else ():
        # A quantised layer may hold its text elsewhere.
        for states in (getattr(layer, "keys", None), getattr(layer, "image_keys", None)):
            if isinstance(states, torch.Tensor) and states.ndim == 4 and states.shape[0] != batch:
                raise ValueError(f"cache: got a cache of {states.shape[0]} rows, expected {batch}.")


def _check_rows(rows: torch.Tensor | None, batch: int, length: int) -> None:
    if rows is None or torch.compiler.is_compiling():
        return
    if rows.ndim != 2 or rows.shape[1] != 2:
        raise ValueError(
            f"cross_attention_rows: got shape {tuple(rows.shape)}, expected (maps, 2): batch index and position."
        )
    if len(rows) and ((rows < 0).any() or int(rows[:, 0].max()) >= batch or int(rows[:, 1].max()) >= length):
        raise ValueError(
            f"cross_attention_rows: got {rows[(rows < 0).any(-1) | (rows[:, 0] >= batch) | (rows[:, 1] >= length)][0].tolist()}, "
            f"expected a row of the {batch} x {length} text."
        )


__all__ = ["AgeVlmForConditionalGeneration", "AgeVlmModel", "AgeVlmPreTrainedModel"]
