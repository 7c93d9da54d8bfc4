"""English plurals and articles, for every text that names things."""

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
# What is not counted: "is there broccoli", not "a broccoli".
_MASS = frozenset("broccoli bread cheese food furniture grass gravel hay luggage mud rice sand snow water".split())
# Plurals that end in no "s", and singulars that end in one and are their own plural.
_PLURALS, _SINGULARS = frozenset(["cattle", "police"]), frozenset(["series", "species"])


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
def is_plural(name: str) -> bool:
    """Whether an English noun is a plural, "skis", or has no singular, "scissors"; not what may be either, "sheep"."""
    last = name.split()[-1]
    if last in _PLURALS or last in _SINGULARS:
        return last in _PLURALS
    return plural(name) == name and (name.endswith("s") or _engine().singular_noun(name) not in (False, name))


def is_countable(name: str) -> bool:
    """Whether "how many" of it is a question about single things: "dog", but neither "scissors" nor "broccoli"."""
    return name.split()[-1] not in _MASS and not is_plural(name)


@cache
def indefinite(name: str) -> str:
    """An English noun with its indefinite article, where it takes one: "a dog", "an umbrella", "skis", "broccoli"."""
    return _engine().a(name) if is_countable(name) else name


@cache
def _engine() -> inflect.engine:
    # Takes a moment to import, and not all data have plurals.
    import inflect

    engine = inflect.engine()
    for one, several in _IRREGULAR.items():
        engine.defnoun(one, several)
    return engine
