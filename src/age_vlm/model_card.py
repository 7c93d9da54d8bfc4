"""The model card that goes with every checkpoint: what it is, how it was made, what it can and cannot do."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from huggingface_hub import DatasetCard, ModelCard, ModelCardData, RepoCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import StrictUndefined, Template

from . import __version__
from .configuration import AgeVlmConfig
from .configuration.configuration_agevlm import LOCAL_FOLDER, is_local


if TYPE_CHECKING:
    from .data.sources import DataSource
    from .modeling_agevlm import AgeVlmForConditionalGeneration
    from .training.recipe import DataRecipe, Recipe

THIS_REPOSITORY = "THIS/REPOSITORY"
ANY_QUESTION = "what is in the picture?"
# The Hub knows the word.
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Part:
    """A pretrained model that an AGE-VLM was built from.

    Attributes:
        name: Hub id, or a folder.
        license: as its own card says, `None` where that is not known.
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
    # What it was trained on, and the checkpoint that it began with: that knows what went into it.
    licenses = [data_license(data) for data in (recipe.data, *recipe.mix)]
    if recipe.model.checkpoint is not None:
        licenses.append(read_license(str(config.name_or_path)))
    return _render(
        parts=config_parts(config),
        licenses=licenses,
        title=recipe.name,
        language="en",
        question=questions.get(recipe.data.kind, ANY_QUESTION),
        aligned=", which was aligned\nwith masks of what the words name" if aligned else "",
        recipe=recipe,
        data_name=recipe.data.path and _shown(recipe.data.path),
        recipe_yaml=yaml.safe_dump(_without_paths(dataclasses.asdict(recipe)), sort_keys=False),
        columns=list(metrics),
        figures=[(name, [row.get(name) for row in metrics.values()]) for name in names],
        environment=environment,
        train_samples=source.train_samples,
        test_pictures=len(source.test),
        from_scratch=recipe.model.text is None and recipe.model.checkpoint is None,
    )


def parts_card(model: AgeVlmForConditionalGeneration) -> str:
    """Markdown with the Hub's metadata in front, for a model of which no more is known than what it holds: one from
    `from_backbones`, whether or not it was trained since."""
    config = model.config
    blocks = [model.model.language_model.layers[index].cross_attention for index in config.cross_attention_layers]
    parts = config_parts(config)
    return _render(
        parts=parts,
        licenses=[] if parts else [None],
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
    parts = {"language model": config.text_config, "vision encoder": config.vision_config}
    return [
        Part(role, part.name_or_path, getattr(part, "license", None) or read_license(part.name_or_path))
        for role, part in parts.items()
        if part.name_or_path
    ]


def keep_licenses(config: object) -> None:
    """Notes in a configuration the licences of the local folders it was built from, whose paths are not saved with it."""
    if isinstance(config, AgeVlmConfig):
        for part in (config.text_config, config.vision_config):
            name = part.name_or_path
            if name and is_local(name) and name != LOCAL_FOLDER and (license := read_license(name)):
                part.license = license


def data_license(data: DataRecipe) -> str | None:
    """The licence of what a recipe trains on: as it says, or as the data set's own card does; `None` where neither does."""
    if data.license is not None or data.kind == "label_maps":
        return data.license
    # Drawn scenes come with age-vlm.
    return "apache-2.0" if data.kind == "scenes" else read_license(data.path, DatasetCard)


def read_license(name: str, kind: type[RepoCard] = ModelCard) -> str | None:
    """The licence in the metadata of a card, in a folder or on the Hub; `None` if that cannot be read or is not known."""
    card = Path(name) / "README.md"
    try:
        if not card.is_file() and not is_hub_id(name):
            return None
        license = kind.load(card if card.is_file() else name, ignore_metadata_errors=True).data.license
    except (OSError, ValueError, HfHubHTTPError):
        return None
    license = license[0] if isinstance(license, list) and len(license) == 1 else license
    return license if isinstance(license, str) and license != UNKNOWN else None


def is_hub_id(name: str) -> bool:
    """Whether `name` can be that of a repository of the Hub, and is no folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


def _shown(name: str) -> str:
    """A name as a card may show it to anyone: that of a local folder or file says nothing but where it lay."""
    return LOCAL_FOLDER if is_local(name) else name


def _without_paths(value, key: str = ""):
    if isinstance(value, dict):
        return {name: _without_paths(each, name) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(each) for each in value]
    if not isinstance(value, str) or not (key in _NAMES or os.path.isabs(value) or value.startswith("~")):
        return value
    return LOCAL_FOLDER if key in _FOLDERS else _shown(value)


# Keys of a recipe that name something to be read: always a folder, or else perhaps a repository of the Hub.
_FOLDERS = ("images", "labels", "instances")
_NAMES = (*_FOLDERS, "text", "vision", "checkpoint", "path", "name_or_path", "_name_or_path")


def _license(licenses: Iterable[str | None]) -> str:
    """Of a whole: that of all its parts, `other` where they differ, unknown where that of one is."""
    found = set(licenses)
    return UNKNOWN if None in found or not found else found.pop() if len(found) == 1 else "other"


def _render(parts: list[Part], licenses: list[str | None], title: str, language: str | None, **values) -> str:
    license = _license([*licenses, *(part.license for part in parts)])
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
