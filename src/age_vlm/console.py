"""What commands print: names as they are, whatever rich would read in them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table


def plain_console(**options) -> Console:
    """A console that takes brackets and colons for what they are; `options` are those of `rich.console.Console`."""
    return Console(markup=False, emoji=False, **options)


def plain_table(headers: Sequence[str], title: str | None = None) -> Table:
    """A table without rows, for a `plain_console`; what is too long for a column goes on in the next line."""
    return Table(*(Column(header, overflow="fold") for header in headers), title=title)
