"""Reading a recipe: YAML, overrides, and values of the right types under keys that there are."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassFieldValidationError

from ..errors import UserError, checkpoint_errors, one_of, reading
from .recipe import Recipe


def load_recipe(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Reads a recipe; `overrides` are `section.key=value` with values in YAML, `mix.0.key=value` for items of a list.

    Raises:
        UserError: one sentence, for a file that is not there or no YAML, an unknown key (with the nearest one), or a
            value of another type.
    """
    path = Path(path)
    with reading("recipe", path):
        if not path.is_file():
            raise UserError(f"recipe: '{path}' is not a file, expected a YAML file.")
        text = path.read_bytes()
    try:
        values = yaml.safe_load(text.decode()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe: '{path}' is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise UserError(f"recipe: '{path}' holds {values!r}, expected keys and values.")
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise UserError(f"override: got '{override}', expected section.key=value.")
        *sections, name = key.split(".")
        target = values
        for section in sections:
            if isinstance(target, list):
                target = target[int(section)] if section.isdecimal() and int(section) < len(target) else None
            else:
                target = target.setdefault(section, {})
            if not isinstance(target, (dict, list)):
                raise UserError(f"override: '{section}' in '{override}' has no keys of its own.")
        if isinstance(target, list):
            raise UserError(f"override: '{name}' in '{override}' is no key, expected one after the number of an item.")
        try:
            target[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"override: the value in '{override}' is not YAML: {reason}.") from None
    return build(Recipe, values)


def build(cls: type, values: Any, where: str = ""):
    """A dataclass from plain values, strictly: unknown keys and values of another type are errors."""
    if not isinstance(values, dict):
        raise UserError(f"{where or 'recipe'}: got {values!r}, expected keys and values.")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in hints:
            raise UserError(f"{name}: unknown key, expected {one_of(key, hints)}.")
        arguments[key] = _converted(value, hints[key], name)
    with checkpoint_errors():
        return cls(**arguments)


def _converted(value: Any, hint: Any, name: str) -> Any:
    items = typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, name)
    if isinstance(value, list) and items and dataclasses.is_dataclass(items[0]):
        return [_item(items[0], each, f"{name}.{number}") for number, each in enumerate(value)]
    if hint is float or hint == float | None:
        value = _number(value)
    if hint == dict[str, float] and isinstance(value, dict):
        return {key: _converted(each, float, f"{name}.{key}") for key, each in value.items()}
    if not _fits(value, hint):
        raise UserError(f"{name}: got {value!r}, expected {_shown(hint)}.")
    return value


def _item(cls: type, values: Any, name: str):
    try:
        return build(cls, values, name)
    except UserError as error:
        # Data speaks of itself as of the section that it usually is.
        raise UserError(re.sub(r"^data\b(?=[.:])", name, str(error))) from None


def _number(value: Any) -> Any:
    """YAML 1.1 reads 2e-3, without a point, as text; whole numbers are floats where one is wanted."""
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    return value


def _fits(value: Any, hint: Any) -> bool:
    try:
        validate_typed_dict(typing.TypedDict("Values", {"value": hint}), {"value": value})
    except StrictDataclassFieldValidationError:
        return False
    return not isinstance(value, float) or math.isfinite(value)


def _shown(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
