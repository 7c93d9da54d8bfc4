"""Plans as a table, one column a recipe, and sizes as they are written by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping

from rich.table import Table

from ...console import plain_table
from ...errors import UserError
from ...modeling_agevlm.components_agevlm import COMPONENTS
from .fake_step import KINDS
from .plan import COMMUNICATION, OVERHEAD, Plan


_UNITS = {"": 1, **{f"{unit}B": 1000**power for power, unit in enumerate("KMGT", start=1)}}
_UNITS |= {f"{unit}iB": 1024**power for power, unit in enumerate("KMGT", start=1)}


def parse_size(text: str) -> float:
    """`80GB`, `24GiB` or plain bytes -> bytes.

    Raises:
        UserError: one sentence, for anything else.
    """
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?b|)", text.strip().lower())
    if match is None:
        raise UserError(f"memory: got '{text}', expected a size such as 80GB or 24GiB.")
    return float(match[1]) * units[match[2]]


def plan_table(plans: Mapping[str, Plan]) -> Table:
    """Memory is of one device, in units of 1000; `-` stands for nothing."""
    table = plain_table(["", *plans], title=_title(next(iter(plans.values()))))
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for title, rows in _sections(list(plans.values())):
        table.add_section()
        table.add_row(title, style="bold")
        for name, cells in rows:
            if any(cell != "-" for cell in cells):
                table.add_row(f" {name}", *cells)
    return table


def _title(plan: Plan) -> str:
    hardware = plan.hardware
    devices = f"{hardware.devices} device{'s' if hardware.devices > 1 else ''} of {_bytes(hardware.memory)}"
    sharding = f", {hardware.sharding}" if hardware.sharding != "none" else ""
    return f"{devices}{sharding}, {hardware.flops / 1e12:g} TFLOP/s at {hardware.utilisation:.0%}"


def _sections(plans: list[Plan]):
    def rows(values, shown, name="{}"):
        keys = {key for plan in plans for key in values(plan)}
        ordered = [key for key in (*KINDS, COMMUNICATION, OVERHEAD) if key in keys]
        return [(_words(key, name), [shown(values(plan).get(key, 0)) for plan in plans]) for key in ordered]

    def row(name, value):
        return name, [value(plan) for plan in plans]

    yield (
        "parameters",
        [
            *rows(lambda plan: plan.parameters, _count),
            row("all", lambda plan: _count(sum(plan.parameters.values()))),
        ],
    )
    yield "parameters that learn", rows(lambda plan: plan.trainable, _count)
    yield (
        "bytes before sharding",
        [
            *rows(lambda plan: plan.weights, _bytes, "weights of {}"),
            row("weights", lambda plan: _bytes(sum(plan.weights.values()))),
            row("gradients", lambda plan: _bytes(sum(plan.gradients.values()))),
            row("optimizer states", lambda plan: _bytes(sum(plan.optimizer.values()))),
        ],
    )
    yield (
        "batch of one device",
        [
            row("rows x tokens", lambda plan: f"{plan.batch_size} x {plan.length}"),
            row("images", lambda plan: str(plan.images)),
            row("precision", lambda plan: plan.precision),
            row("gradient checkpointing", lambda plan: "on" if plan.checkpointing else "off"),
        ],
    )
    yield (
        "peak of one device",
        [
            *rows(lambda plan: plan.memory, _bytes, "activations of {}"),
            row("all", lambda plan: _bytes(plan.total)),
            row("fits", lambda plan: "yes" if plan.fits else "[red]no[/red]"),
            row(
                "largest batch that fits", lambda plan: f"about {plan.largest_batch}" if plan.largest_batch else "none"
            ),
        ],
    )
    yield (
        "FLOP of a batch",
        [
            *rows(lambda plan: plan.flops, _count, "forward: {}"),
            row("all", lambda plan: _count(sum(plan.flops.values()))),
        ],
    )
    yield (
        "the run, all devices",
        [
            row("samples a step", lambda plan: _count(plan.step_samples)),
            row("tokens a step", lambda plan: _count(plan.step_tokens)),
            row("tokens", lambda plan: _count(plan.run_tokens)),
            row("FLOP", lambda plan: _count(plan.run_flops)),
            row("hours", lambda plan: _number(plan.hours)),
            row("device hours", lambda plan: _number(plan.hours * plan.hardware.devices)),
            row("cost", lambda plan: "-" if plan.cost is None else f"{plan.cost:,.2f}"),
        ],
    )


def _words(key: str, part: str) -> str:
    if key not in COMPONENTS:
        return key
    return part.format("cross-attention" if key == "cross_attention" else key.replace("_", " "))


def _scaled(value: float, units: list[str], base: str = "") -> str:
    if not value:
        return "-"
    for unit in units:
        if abs(value) < 999.5:
            return f"{value:.3g} {unit}{base}".strip()
        value /= 1000
    return f"{value * 1000:,.0f} {units[-1]}{base}"


def _bytes(value: float) -> str:
    return _scaled(value, ["", "K", "M", "G", "T"], "B")


def _count(value: float) -> str:
    return _scaled(value, ["", "K", "M", "G", "T", "P", "E", "Z"])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
