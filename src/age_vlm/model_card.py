"""The model card that goes with every checkpoint: what it is, how it was made, what it can and cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import StrictUndefined, Template

from . import __version__


if TYPE_CHECKING:
    from .configuration import AgeVlmConfig
    from .data.sources import DataSource
    from .modeling_agevlm import AgeVlmForConditionalGeneration
    from .training.recipe import Recipe

THIS_REPOSITORY = "THIS/REPOSITORY"
ANY_QUESTION = "what is in the picture?"


@dataclass(frozen=True)
class Part:
    """A pretrained model that an AGE-VLM was built from.

    Attributes:
        name: Hub id, or the folder it came from.
        license: as its own card says, `None` where that could not be read.
    """

    role: str
    name: str
    license: str | None

    @property
    def on_hub(self) -> bool:
        return is_hub_id(self.name)


def model_card(
    recipe: Recipe,
    metrics: Mapping[str, Mapping[str, float]],
    environment: Mapping[str, object],
    source: DataSource,
    config: AgeVlmConfig,
) -> str:
    """Markdown with the Hub's metadata in front, for a model that a recipe trained.

    Args:
        metrics: figures on the test part, by row.
        environment: versions and machine that they were measured with.
        config: of the model, which knows what it was built from, also where the recipe starts from a checkpoint.
    """
    names = list(dict.fromkeys(name for row in metrics.values() for name in row))
    questions = {"scenes": "is there a red circle in the picture ?"}
    if recipe.data.kind == "label_maps":
        questions["label_maps"] = f"is there a {recipe.data.classes[0]} ?"
    aligned = recipe.alignment.weight or recipe.alignment.final_weight
    return _render(
        parts=config_parts(config),
        title=recipe.name,
        language="en",
        question=questions.get(recipe.data.kind, ANY_QUESTION),
        aligned=", which was aligned\nwith masks of what the words name" if aligned else "",
        recipe=recipe,
        recipe_yaml=recipe.to_yaml(),
        columns=list(metrics),
        figures=[(name, [row.get(name) for row in metrics.values()]) for name in names],
        environment=environment,
        train_samples=len(source.train),
        test_pictures=len(source.test),
        from_scratch=recipe.model.text is None and recipe.model.checkpoint is None,
    )


def parts_card(model: AgeVlmForConditionalGeneration) -> str:
    """Markdown with the Hub's metadata in front, for a model of which no more is known than what it holds: one from
    `from_backbones`, whether or not it was trained since."""
    config = model.config
    blocks = [model.model.language_model.layers[index].cross_attention for index in config.cross_attention_layers]
    return _render(
        parts=config_parts(config),
        title="AGE-VLM",
        language=None,
        question=ANY_QUESTION,
        aligned="",
        recipe=None,
        layers=config.cross_attention_layers,
        parameters=model.num_parameters(),
        new_parameters=sum(parameter.numel() for block in blocks for parameter in block.parameters()),
        closed=not any(gate.weight.any() for block in blocks for gate in (block.attn_gate, block.mlp_gate)),
    )


def config_parts(config: AgeVlmConfig) -> list[Part]:
    """What `from_backbones` built the model of that configuration from, none for a model that began with random weights."""
    names = {"language model": config.text_config.name_or_path, "vision encoder": config.vision_config.name_or_path}
    return [Part(role, str(name), read_license(str(name))) for role, name in names.items() if name]


def read_license(name: str) -> str | None:
    """The licence in the metadata of a model's card, beside its weights or on the Hub; `None` if that cannot be read."""
    card = Path(name) / "README.md"
    try:
        if not card.is_file() and not is_hub_id(name):
            return None
        return ModelCard.load(card if card.is_file() else name, ignore_metadata_errors=True).data.license
    except (OSError, ValueError, HfHubHTTPError):
        return None


def is_hub_id(name: str) -> bool:
    """Whether `name` can be that of a repository of the Hub, and is no folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


def _render(parts: list[Part], title: str, language: str | None, **values) -> str:
    licenses = {part.license for part in parts}
    license = "apache-2.0" if not parts else licenses.pop() if len(licenses) == 1 and None not in licenses else "other"
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        license=license,
        # The Hub asks for a name where the licence is none of its list.
        license_name="that-of-its-parts" if license == "other" else None,
        base_model=[part.name for part in parts if part.on_hub] or None,
        tags=["age-vlm", "grounding", "hallucination"],
        language=language,
    )
    template = Template(
        files(__package__).joinpath("model_card.md.jinja").read_text("utf-8"),
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return template.render(
        metadata=data.to_yaml(), title=title, parts=parts, repository=THIS_REPOSITORY, version=__version__, **values
    )
