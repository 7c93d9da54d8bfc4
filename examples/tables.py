"""Results as files: a CSV row a run, and a Markdown table of medians and ranges over seeds."""

import csv
import io
import math
import re
import statistics
from pathlib import Path

from age_vlm.atomic_files import write_whole


def environment_name(environment: dict) -> str:
    """What the metrics depend on besides the code, short enough for a file name."""
    device = re.sub(r"[^a-z0-9]+", "-", str(environment["device"]).lower()).strip("-")
    return f"{device}-torch{environment['torch'].split('+')[0]}-transformers{environment['transformers']}"


def write_csv(path: Path, rows: list[dict]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns, restval="")
    writer.writeheader()
    writer.writerows(
        {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()} for row in rows
    )
    write_whole(path, file.getvalue())


def write_markdown(path: Path, rows: list[dict], *, by: str) -> None:
    """Metrics down, arms across; each cell is the median over seeds, with the lowest and highest in brackets."""
    groups = list(dict.fromkeys(row[by] for row in rows))
    counts = {group: sum(row[by] == group for row in rows) for group in groups}
    metrics = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in (by, "seed")]
    lines = [
        "| median (lowest to highest) | " + " | ".join(f"{group}, {counts[group]} runs" for group in groups) + " |",
        "|---" * (len(groups) + 1) + "|",
    ]
    for metric in metrics:
        cells = []
        for group in groups:
            values = [row.get(metric) for row in rows if row[by] == group]
            cells.append(_cell(values))
        lines.append(f"| {metric} | " + " | ".join(cells) + " |")
    path.write_text("\n".join(lines) + "\n", "utf-8")


def _cell(values: list) -> str:
    """`never` stands for a step that was not reached: later than any number."""
    numbers = [math.inf if value == "never" else value for value in values if value not in (None, "")]
    if not numbers:
        return "-"
    shown = [_number(value) for value in (statistics.median(numbers), min(numbers), max(numbers))]
    return shown[0] if shown[1] == shown[2] else f"{shown[0]} ({shown[1]} to {shown[2]})"


def _number(value: float) -> str:
    if math.isinf(value):
        return "never"
    return f"{value:.0f}" if abs(value) >= 10 or isinstance(value, int) else f"{value:.3g}"
