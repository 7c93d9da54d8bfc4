"""Settings as other code shows and compares them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`section.key` -> value, of nested settings; an empty section stays as it is."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        nested = isinstance(value, Mapping) and value
        flat |= flattened(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
