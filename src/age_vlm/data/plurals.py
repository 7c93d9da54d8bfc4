"""English plurals, for every text that names things."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import inflect

# What the library does not know.
_IRREGULAR = {
    "(.*)gentleman": "$1gentlemen",
    "(.*)thief": "$1thieves",
    "passer-by": "passers-by",
    "german": "germans",
    "cattle": "cattle",
    "i": "is",  # the letter
}


@cache
def plural(name: str) -> str:
    """The plural of an English noun in lower case, "wine glass" -> "wine glasses"; of one that is a plural, itself."""
    engine = _engine()
    several, one = engine.plural_noun(name), engine.singular_noun(name)
    # It adds another "s" to a plural, "skis" -> "skiss", but never to a singular, "bus" -> "buses".
    doubled = any(said.endswith("s") and more == f"{said}s" for said, more in zip(name.split(), several.split()))
    already = one not in (False, name) and not name.endswith("s")
    return name if doubled or already else several


@cache
def _engine() -> inflect.engine:
    # Takes a moment to import, and not all data have plurals.
    import inflect

    engine = inflect.engine()
    for one, several in _IRREGULAR.items():
        engine.defnoun(one, several)
    return engine
