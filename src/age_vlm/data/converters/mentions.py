"""Where a text literally names a category: by its name, a synonym, or the plural of either."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from ..plurals import plural


class Vocabulary:
    """The words that stand for categories.

    Args:
        words: category -> names of it, singular or plural; a name may stand for several categories.
    """

    def __init__(self, words: Mapping[str, Iterable[str]]) -> None:
        categories: dict[str, set[str]] = defaultdict(set)
        for category, names in words.items():
            for name in names:
                if key := _key(name):
                    categories[key].add(category)
                    categories[_key(plural(key))].add(category)
        self.categories = {key: frozenset(found) for key, found in categories.items()}
        # The longest name first: in "hot dog" there is no dog, whether or not the image shows one.
        names = sorted(self.categories, key=len, reverse=True)
        pattern = "|".join(re.escape(name).replace(r"\ ", "[ -]") for name in names)
        self._pattern = re.compile(rf"(?<!\w)(?:{pattern})(?!\w)" if names else "(?!)", re.IGNORECASE)

    def find(self, text: str) -> list[tuple[int, int, frozenset[str]]]:
        """Character span [start, end) of every mention, and the categories it may mean."""
        found = []
        for match in self._pattern.finditer(text):
            # A letter that only case folding makes equal may still have another key: "ſ" is an "s" to the pattern.
            if categories := self.categories.get(_key(match.group())):
                found.append((*match.span(), categories))
        return found


def _key(name: str) -> str:
    return " ".join(re.split(r"[\s-]+", name.casefold().strip()))
