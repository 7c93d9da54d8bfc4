import io
import re

import pytest
from rich.console import Console

from age_vlm.commands.planning.plan import Hardware, plan
from age_vlm.commands.planning.table import parse_size, plan_table


@pytest.mark.parametrize(
    "text, size",
    [("80GB", 80e9), ("24 GiB", 24 * 2**30), ("1.5tb", 1.5e12), ("4096", 4096), ("2KiB", 2048), ("7 mb", 7e6)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "80 GX", "8O GB", "1e9", "80GB GB"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match=f"memory: got '{re.escape(text)}', expected a size"):
        parse_size(text)


def test_rows_of_parts_and_sums(make_recipe):
    result = plan(make_recipe({"vision": "frozen"}), Hardware(devices=2, price=1.0, memory=1e6), length=16)
    console = Console(width=100, file=io.StringIO())
    console.print(plan_table({"here": result}))
    rows = {}
    for line in console.file.getvalue().splitlines():
        cells = [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        if len(cells) == 2:
            rows.setdefault(cells[0], []).append(cells[1])
    # Among the parameters; what is nothing in every column, as here among those that learn, has no row.
    assert rows["vision"] == [f"{result.parameters['vision'] / 1e3:.3g} K"]
    assert rows["communication buffers"] == [f"{sum(result.gradients.values()) / 1e6:.3g} MB"]
    assert rows["all"][1] == f"{result.total / 1e6:.3g} MB"
    assert rows["fits"] == ["no"] and rows["largest batch that fits"] == ["none"]
    assert rows["cost"] == [f"{result.cost:,.2f}"] and rows["rows x tokens"] == ["2 x 16"]
