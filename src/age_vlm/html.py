"""Pages of HTML that need nothing else: a run's report, and the contact sheet of a teacher's masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render_page(template: str, filters: Mapping[str, Callable], **values: Any) -> str:
    """The page of `templates/<template>.html.jinja`, with the look that all pages share.

    Args:
        filters: what the template may apply to values, by name.
        values: what the template names; one that is missing is an error.
    """
    environment = Environment(
        loader=PackageLoader("age_vlm"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(f"{template}.html.jinja").render(values)
