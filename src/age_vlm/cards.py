"""The model card that goes with every checkpoint: what it is, how it was made, what it can and cannot do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData, RepoCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import StrictUndefined, Template

from . import __version__
from .configuration import AgeVlmConfig
from .configuration.configuration_agevlm import LOCAL_FOLDER, is_local


if TYPE_CHECKING:
    from .modeling_agevlm import AgeVlmForConditionalGeneration

THIS_REPOSITORY = "THIS/REPOSITORY"
ANY_QUESTION = "what is in the picture?"
# The Hub knows the word.
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Component:
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


def components_card(model: AgeVlmForConditionalGeneration) -> str:
    """Markdown with the Hub's metadata in front, for a model of which no more is known than what it holds: one from
    `from_backbones`, whether or not it was trained since."""
    config = model.config
    blocks = [model.model.language_model.layers[index].cross_attention for index in config.cross_attention_layers]
    components = config_components(config)
    return render_card(
        components=components,
        licenses=[] if components else [None],
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


def config_components(config: AgeVlmConfig) -> list[Component]:
    """What `from_backbones` built the model of that configuration from, none for a model that began with random weights."""
    components = {"language model": config.text_config, "vision encoder": config.vision_config}
    return [
        Component(
            role, component.name_or_path, getattr(component, "license", None) or read_license(component.name_or_path)
        )
        for role, component in components.items()
        if component.name_or_path
    ]


def keep_licenses(config: object) -> None:
    """Notes in a configuration the licences of the local folders it was built from, whose paths are not saved with it."""
    if isinstance(config, AgeVlmConfig):
        for component in (config.text_config, config.vision_config):
            name = component.name_or_path
            if name and is_local(name) and name != LOCAL_FOLDER and (license := read_license(name)):
                component.license = license


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


def _license(licenses: Iterable[str | None]) -> str:
    """Of a whole: that of all its components, `other` where they differ, unknown where that of one is."""
    found = set(licenses)
    return UNKNOWN if None in found or not found else found.pop() if len(found) == 1 else "other"


def render_card(
    components: list[Component], licenses: list[str | None], title: str, language: str | None, **values
) -> str:
    license = _license([*licenses, *(component.license for component in components)])
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        license=license,
        # The Hub asks for a name where the licence is none of its list.
        license_name="that-of-its-components" if license == "other" else None,
        base_model=[component.name for component in components if component.on_hub] or None,
        tags=["age-vlm", "grounding", "hallucination"],
        language=language,
    )
    template = Template(
        files(__package__).joinpath("templates", "model_card.md.jinja").read_text("utf-8"),
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return template.render(
        metadata=data.to_yaml(),
        title=title,
        components=components,
        repository=THIS_REPOSITORY,
        version=__version__,
        **values,
    )
