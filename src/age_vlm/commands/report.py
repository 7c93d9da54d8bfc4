"""One HTML file that says what a run did: settings, metrics, curves and example images. It needs no network."""

from __future__ import annotations

import base64
import io
import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from ..atomic_files import write_whole
from ..errors import UserError
from ..html import render_page
from ..settings import flattened


# Colours that stay apart for readers with any colour vision (Okabe and Ito, 2008).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def write_report(
    path: str | Path,
    *,
    title: str,
    settings: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    curves: Mapping[str, Sequence[tuple[float, float]]],
    examples: Sequence[Mapping[str, Any]],
    notes: Sequence[str] = (),
) -> Path:
    """Write a self-contained HTML report; an existing file is replaced in one step or left as it was.

    Args:
        path: the file to write; its folder must exist.
        title: heading of the page.
        settings: name to value; nested mappings become dotted names.
        metrics: rows of one table, each from column to value. Columns are those of all rows, in order of first
            appearance; a float is shown with three decimals, what is missing as a dash.
        curves: name to (step, value) points; one small plot each.
        examples: each has `image` (PIL), `question`, `answer`, `expected`, and optionally `sheet` (PIL) from
            `overlay_sheet`, shown instead of the image; it needs no title, as question and answer stand above it.
        notes: sentences under the title, such as limits of the metrics.

    Returns:
        The path written.

    Raises UserError when the folder does not exist, and OSError when it cannot be written; the old file then survives.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise UserError(f"path: got {str(path)!r}, expected a file in an existing folder.")
    page = render_page(
        "report",
        {"value": _shown},
        title=title,
        notes=[notes] if isinstance(notes, str) else list(notes),
        settings=flattened(settings),
        columns=list(dict.fromkeys(column for row in metrics for column in row)),
        metrics=metrics,
        curves=[(name, _curve(points, _COLOURS[i % len(_COLOURS)])) for i, (name, points) in enumerate(curves.items())],
        examples=[_example(example) for example in examples],
    )
    write_whole(path, page)
    return path


def _shown(value: Any, decimals: int | None = None) -> str:
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, numbers.Integral):
        return str(value)
    if isinstance(value, numbers.Real):
        if value != value:
            return "—"
        return f"{float(value):.{decimals}f}" if decimals is not None else f"{float(value):g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_shown(item) for item in value)
    return str(value)


def _example(example: Mapping[str, Any]) -> dict[str, Any]:
    shown = example.get("sheet") or example["image"]
    answer, expected = str(example["answer"]), str(example["expected"])
    return {
        "question": example["question"],
        "answer": answer,
        "expected": expected,
        "right": answer.strip().rstrip(".").lower() == expected.strip().rstrip(".").lower(),
        "source": _data_url(shown),
        # A drawn scene is shown enlarged; a sheet already has its size.
        "width": 256 if shown.width < 200 else shown.width,
        "small": shown.width < 200,
    }


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    (image if image.mode in ("RGB", "RGBA", "L") else image.convert("RGB")).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _curve(points: Sequence[tuple[float, float]], colour: str) -> str:
    """A plot of the points as the data URL of an SVG."""
    figure = Figure(figsize=(3.5, 2.05), layout="constrained")
    axes = figure.subplots()
    steps, values = [step for step, _ in points], [value for _, value in points]
    axes.plot(steps, values, color=colour, linewidth=1.6, marker="o" if len(points) < 25 else "", markersize=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b8bfc7")
    axes.grid(axis="y", color="#e7eaee", linewidth=0.8)
    axes.tick_params(labelsize=8, colors="#59636e", length=3)
    axes.set_xlabel("step", fontsize=8, color="#59636e")
    if values and min(values) >= 0:
        axes.set_ylim(0, max(values) * 1.05 or 1)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
