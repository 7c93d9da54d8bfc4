"""What the models share: how they are loaded, trained and frozen."""

import torch
from transformers import PreTrainedModel
from transformers import initialization as init

from ..configuration.alignment_agevlm import AlignmentConfig
from ..configuration.configuration_agevlm import AgeVlmConfig
from .components_agevlm import freeze_components, keep_frozen_still
from .cross_attention_agevlm import AgeVlmGate
from .parts_agevlm import (
    check_parts,
    expect_left_out,
    fetch_left_out,
    ignored_keys,
    left_out,
    low_rank_change,
    low_rank_state,
    mark_left_out,
    unchanged_components,
    without_components,
)
from .vision_agevlm import AgeVlmProjection, AgeVlmTimmWrapperModel


class AgeVlmPreTrainedModel(PreTrainedModel):
    config: AgeVlmConfig
    config_class = AgeVlmConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer", "AgeVlmDecoderLayer", "AgeVlmTimmWrapperModel"]
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

    def freeze(self, *components: str) -> "AgeVlmPreTrainedModel":
        """Freezes components: `vision`, `projector`, `cross_attention`, `language_model`. They get no gradients, and stay in
        evaluation mode while the others train.

        Raises:
            ValueError: one sentence, for a component that is not there.
        """
        freeze_components(self, components)
        return self

    @property
    def alignment(self) -> AlignmentConfig:
        """How the cross-attention was aligned in training, and so whose maps show where the model looks; the defaults where
        the configuration does not say."""
        return AlignmentConfig(**(self.config.alignment or {}))

    def activation_checkpointing_enable(self, *args, **kwargs) -> None:
        super().activation_checkpointing_enable(*args, **kwargs)
        self._checkpoint_timm_encoder(True)

    def activation_checkpointing_disable(self) -> None:
        super().activation_checkpointing_disable()
        self._checkpoint_timm_encoder(False)

    def _checkpoint_timm_encoder(self, enable: bool) -> None:
        # transformers switches its own layers, and leaves out an encoder of timm inside another model.
        for module in self.modules():
            if isinstance(module, AgeVlmTimmWrapperModel) and module.supports_gradient_checkpointing:
                module.timm_model.set_grad_checkpointing(enable)

    def post_init(self):
        super().post_init()
        expect_left_out(self)
        self._keys_to_ignore_on_load_missing.update(ignored_keys(self.config))

    def tie_weights(self, missing_keys: set[str] | None = None, **kwargs):
        # Where a checkpoint leaves the language model out, both of the tied pair are missing until it is fetched. The set is
        # the caller's, who goes on with what is left in it.
        if missing_keys and "language_model" in left_out(self.config):
            for key in [key for key in missing_keys if key.endswith("language_model.embed_tokens.weight")]:
                missing_keys.discard(key)
        return super().tie_weights(missing_keys=missing_keys, **kwargs)

    def save_pretrained(self, save_directory, *args, parts: str = "all", **kwargs):
        """As `PreTrainedModel.save_pretrained`.

        Args:
            parts: `"all"`, or `"new"` for all but the pretrained components that are still as they were when the model was
                built from them: loading takes these from where they came from. Of a language model that was trained by
                LoRA, only its factors are written.

        Raises:
            ValueError: one sentence, for anything else.
        """
        if parts not in ("all", "new"):
            raise ValueError(f"parts: got {parts!r}, expected 'all' or 'new'.")
        unchanged = unchanged_components(self) if parts == "new" else []
        if not unchanged:
            return super().save_pretrained(save_directory, *args, **kwargs)
        state = without_components(kwargs.get("state_dict") or self.state_dict(), unchanged)
        kwargs["state_dict"] = {**state, **low_rank_state(self, unchanged)}
        config = self.config
        self.config = mark_left_out(config, unchanged, low_rank_change(self))
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config = config

    @classmethod
    def is_custom_code(cls) -> bool:
        # All weights start through `transformers.initialization`. Of code of which it cannot know that, transformers passes
        # over modules without parameters of their own, and a CLIP's attention would not start its projections.
        return False

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, output_loading_info: bool = False, parts=None, **kwargs
    ):
        """As `PreTrainedModel.from_pretrained`, which logs what a checkpoint lacks and starts it at random: here it is an error.

        Args:
            parts: of a checkpoint that leaves pretrained components out, their folders or Hub ids, `text` and `vision`; where
                the model was built from when left out.

        Raises:
            ValueError: one sentence, where weights are missing; with `output_loading_info=True` they are listed instead.
        """
        parts = check_parts(parts)
        model, report = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        fetch_left_out(model, parts)
        if output_loading_info:
            return model, report
        # Without a name the weights are the caller's own `state_dict`.
        if pretrained_model_name_or_path is not None and (missing := sorted(report["missing_keys"])):
            raise ValueError(
                f"weights: '{pretrained_model_name_or_path}' lacks {len(missing)} of {cls.__name__}, first "
                f"{', '.join(missing[:3])}; expected all of them (output_loading_info=True starts them at random)."
            )
        return model
