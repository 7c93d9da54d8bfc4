"""The model card that goes with every checkpoint: what it is, how it was made, what it can and cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import TYPE_CHECKING

from huggingface_hub import ModelCardData
from jinja2 import StrictUndefined, Template


if TYPE_CHECKING:
    from .data.sources import DataSource
    from .training.recipe import Recipe


def model_card(
    recipe: Recipe, metrics: Mapping[str, Mapping[str, float]], environment: Mapping[str, object], source: DataSource
) -> str:
    """Markdown with the Hub's metadata in front.

    Args:
        metrics: figures on the test part, by row.
        environment: versions and machine that they were measured with.
    """
    base = [name for name in (recipe.model.text, recipe.model.vision) if name and "/" in name]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        license="apache-2.0" if not base else "other",
        base_model=base or None,
        tags=["age-vlm", "grounding", "hallucination"],
        language="en",
    )
    names = list(dict.fromkeys(name for row in metrics.values() for name in row))
    template = Template(
        files(__package__).joinpath("model_card.md.jinja").read_text("utf-8"),
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return template.render(
        metadata=data.to_yaml(),
        recipe=recipe,
        recipe_yaml=recipe.to_yaml(),
        columns=list(metrics),
        figures=[(name, [row.get(name) for row in metrics.values()]) for name in names],
        environment=environment,
        test_pictures=len(source.test),
        from_scratch=recipe.model.text is None and recipe.model.checkpoint is None,
    )
