"""Building an AGE-VLM from a pretrained language model and a pretrained vision encoder."""

import copy
import os
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from ..configuration.configuration_agevlm import unknown_option
from ..processing.backbone_files_agevlm import add_image_token, is_unreadable, load_component
from ..processing.chat_agevlm import default_template, stop_at_end_of_turn, template_with_images
from .origins_agevlm import language_model_state, origin
from .vision_agevlm import drop_unused_head


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class BackboneFiles:
    """The pretrained components: Hub ids, folders, or models that are loaded; see [`from_backbones`]."""

    text: str | os.PathLike | LlamaForCausalLM
    vision: str | os.PathLike | PreTrainedModel
    gguf_file: str | None = None
    text_revision: str | None = None
    vision_revision: str | None = None

    def language_model(self, dtype) -> tuple[LlamaForCausalLM, list[str]]:
        """The language model, and the names of weights that its file lacks."""
        files = {"gguf_file": self.gguf_file, "revision": self.text_revision}
        model, missing, name = self.text, [], getattr(getattr(self.text, "config", None), "name_or_path", "")
        if isinstance(self.text, (str, os.PathLike)):
            name = self.text
            config = load_component("text", self.text, AutoConfig, **files)
            if config.model_type == "llama":  # looked at first: another would be read with random weights
                model, report = load_component(
                    "text", self.text, LlamaForCausalLM, dtype=dtype, output_loading_info=True, **files
                )
                missing = sorted(report["missing_keys"])
        else:
            config = getattr(self.text, "config", None)
        if not isinstance(model, LlamaForCausalLM):
            kind = getattr(config, "model_type", type(self.text).__name__)
            raise ValueError(f"text: '{name}' is a '{kind}' model, expected a Llama.")
        if not all(parameter.is_floating_point() for parameter in model.parameters()):
            raise ValueError(f"text: '{name}' is quantised, expected floating point weights (see its `dequantize`).")
        return model, missing

    def vision_encoder(self, dtype) -> tuple[PreTrainedModel, set[str]]:
        """The vision encoder alone, and the names of weights that its file lacks."""
        if not isinstance(self.vision, (str, os.PathLike)):
            return copy.deepcopy(getattr(self.vision, "vision_model", self.vision)).to(dtype), set()
        whole = load_component("vision", self.vision, AutoConfig, revision=self.vision_revision)
        config = getattr(whole, "vision_config", whole)
        if config.model_type == "timm_wrapper" and config.model_args:
            # timm writes it into the arguments as well, where transformers would pass it twice.
            config.model_args.pop("num_classes", None)
        tower, report = load_component(
            "vision",
            self.vision,
            AutoModel,
            dtype=dtype,
            config=whole,
            output_loading_info=True,
            revision=self.vision_revision,
        )
        tower = getattr(tower, "vision_model", tower)
        # Of a model that reads text too, only the whole knows it; the model card names what a model was built from.
        tower.config.name_or_path = str(self.vision)
        return tower, {name.removeprefix("vision_model.") for name in report["missing_keys"]}

    def tokenizer(self):
        """The language model's tokenizer, None where it has none."""
        name = self.text if isinstance(self.text, (str, os.PathLike)) else self.text.config.name_or_path
        if not name:
            return None
        files = {"gguf_file": self.gguf_file, "revision": self.text_revision}
        try:
            return AutoTokenizer.from_pretrained(name, **{key: value for key, value in files.items() if value})
        except Exception as error:
            if not is_unreadable(error):
                raise
            if os.path.isdir(name) and any(file.startswith("tokenizer") for file in os.listdir(name)):
                return load_component("text", name, AutoTokenizer, **files)  # which says what is wrong with it
            return None


def model_from_backbones(
    model_class,
    files: BackboneFiles,
    processor,
    image_token: str | None,
    dtype: torch.dtype | str | None,
    config_overrides: dict,
):
    """See [`AgeVlmForConditionalGeneration.from_backbones`]; `model_class` is the class that it is called on."""
    if unknown := unknown_option(config_overrides):
        raise ValueError(unknown)
    language_model, missing = files.language_model(dtype)
    if dtype in (None, "auto") or isinstance(files.text, (str, os.PathLike)):
        dtype = language_model.dtype
    elif isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    vision_tower, vision_missing = files.vision_encoder(dtype)
    text_config = copy.deepcopy(language_model.config)
    if hasattr(text_config, "quantization_config"):  # of a GGUF, whose weights are dequantised
        del text_config.quantization_config
    vocabulary = text_config.vocab_size
    tokenizer, template, image_token_id = _image_token(files, processor, image_token, vocabulary)
    text_config.vocab_size = max(vocabulary, image_token_id + 1)
    drop_unused_head(vision_tower)
    head = None if text_config.tie_word_embeddings else language_model.lm_head
    components = {
        "language_model": origin(
            files, "language_model", language_model.config, language_model_state(language_model.model, head)
        ),
        "vision": origin(files, "vision", vision_tower.config, vision_tower.state_dict()),
    }
    config = model_class.config_class(
        **{
            "text_config": text_config,
            "vision_config": vision_tower.config,
            "image_token_id": image_token_id,
            "components": components,
            **config_overrides,
        }
    )
    # Not `.to(dtype)`: the rotary frequencies stay in float32, as in the language model.
    model = model_class._from_config(config, dtype=dtype)
    # A pooler for example may be missing: it is dropped.
    missing += [
        *sorted(vision_missing & vision_tower.state_dict().keys()),
        *fill_vision_tower(model, vision_tower),
        *fill_language_model(model, language_model),
    ]
    if missing:
        raise ValueError(
            f"text, vision: {len(missing)} weights are not in '{files.text}' or '{files.vision}', first '{missing[0]}'."
        )
    model.generation_config = copy.deepcopy(language_model.generation_config)
    if tokenizer is not None:
        # A base model's own configuration knows the end of a text alone.
        try:
            stop_at_end_of_turn(model.generation_config, tokenizer, template)
        except ValueError as error:
            logger.warning(f"text: answers of '{files.text}' do not stop by themselves: {error}")
    return model.eval()


def _image_token(files: BackboneFiles, processor, image_token: str | None, vocabulary: int):
    """The tokenizer, its chat template with images, and the id of the token that stands for an image."""
    if processor is not None:
        return processor.tokenizer, processor.chat_template, processor.image_token_id
    tokenizer = files.tokenizer()
    if tokenizer is None:
        logger.warning(
            f"'{files.text}' has no tokenizer: the last token of the vocabulary, {vocabulary - 1}, stands for images."
        )
        return None, None, vocabulary - 1
    token, index = add_image_token(tokenizer, image_token)
    template = default_template(tokenizer)
    if isinstance(template, dict):
        template = template.get("default")
    return tokenizer, template and template_with_images(tokenizer, template, token), index


def fill_language_model(model, language_model: LlamaForCausalLM) -> list[str]:
    """Copies the weights of a Llama into the model, whose tokens beyond the Llama's vocabulary start at the mean of all
    others; returns the names of weights that it lacks.

    Raises:
        ValueError: one sentence, for a Llama of another shape.
    """
    base = getattr(model, model.base_model_prefix, model)
    missing = _fill("text", base.language_model, language_model.model.state_dict(), model.config.text_config.vocab_size)
    if hasattr(model, "lm_head"):
        missing += _fill(
            "text", model.lm_head, language_model.lm_head.state_dict(), model.config.text_config.vocab_size
        )
    return [name for name in missing if ".cross_attention." not in name]


def fill_vision_tower(model, vision_tower: PreTrainedModel) -> list[str]:
    """Copies the weights of a vision encoder into the model; returns the names of weights that it lacks.

    Raises:
        ValueError: one sentence, for an encoder of another shape.
    """
    base = getattr(model, model.base_model_prefix, model)
    return _fill("vision", base.vision_tower, vision_tower.state_dict())


def _fill(
    argument: str, module: torch.nn.Module, states: dict[str, torch.Tensor], rows: int | None = None
) -> list[str]:
    wanted = module.state_dict()
    for name, value in states.items():
        if rows is not None and name in ("embed_tokens.weight", "weight") and len(value) < rows:
            states[name] = value = _with_mean_rows(value, rows)
        if name in wanted and wanted[name].shape != value.shape:
            raise ValueError(
                f"{argument}: '{name}' has shape {tuple(value.shape)}, expected {tuple(wanted[name].shape)}, that of the model."
            )
    return module.load_state_dict(states, strict=False).missing_keys


def _with_mean_rows(table: torch.Tensor, rows: int) -> torch.Tensor:
    """(vocabulary, width) -> (rows, width): what is new is the mean of what is there."""
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(rows - len(table), -1)])
