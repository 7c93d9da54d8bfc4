"""What the run of a recipe needs: memory of each device, computation, hours, cost, and what would make it fit."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from ...errors import UserError, one_of, reading
from ...modeling_agevlm import AgeVlmForConditionalGeneration
from ...modeling_agevlm.components_agevlm import COMPONENTS, component_of
from ...training.components import count_parameters
from ..pipeline import load_stages
from ..recipe import PREVIOUS, Recipe
from ..recipe_file import load_recipe
from .fake_step import BACKWARD, GRADIENTS, OPTIMIZER, PARAMETERS, StepFigures, fake_step
from .model import PlannedModel


# What each device holds a part of: ZeRO (Rajbhandari et al. 2020) and FSDP divide the same.
SHARDINGS = {
    "none": (),
    "zero2": (GRADIENTS, OPTIMIZER),
    "zero3": (PARAMETERS, GRADIENTS, OPTIMIZER),
}
COMMUNICATION, OVERHEAD = "communication buffers", "overhead"
# Dense bf16 of an A100, from its data sheet.
DEVICE_FLOPS = 312e12


@dataclass(frozen=True)
class Hardware:
    """
    Attributes:
        devices: each with the recipe's batch of its own.
        memory: bytes of each.
        sharding: `none` (every device holds all, as under DDP), `zero2` or `zero3` (as FSDP's `full_shard`).
        flops: peak floating point operations a second of each, for the precision of the recipe.
        utilisation: share of the peak that training reaches, recomputation of checkpointing counted as work.
        price: of one device for an hour, in any currency.
        overhead: share of the tensors' memory that is taken besides them: kernels' workspaces, gaps of the allocator.

    Raises:
        UserError: one sentence, for a value out of range.
    """

    devices: int = 1
    memory: float = 80e9
    sharding: str = "none"
    flops: float = DEVICE_FLOPS
    utilisation: float = 0.35
    price: float | None = None
    overhead: float = 0.1

    def __post_init__(self):
        if self.sharding not in SHARDINGS:
            raise UserError(f"sharding: got '{self.sharding}', expected {one_of(self.sharding, SHARDINGS)}.")
        if self.devices < 1:
            raise UserError(f"devices: got {self.devices}, expected at least 1.")
        for name in ("memory", "flops"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}: got {getattr(self, name)}, expected more than 0.")
        if not 0 < self.utilisation <= 1:
            raise UserError(f"utilisation: got {self.utilisation}, expected a share above 0 and at most 1.")
        for name in ("price", "overhead"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise UserError(f"{name}: got {getattr(self, name)}, expected at least 0.")


@dataclass(frozen=True)
class Plan:
    """
    Attributes:
        parameters, trainable: part -> number of parameters of the whole model, adapters included.
        weights, gradients, optimizer: part -> bytes on all devices together, before anything is sharded.
        memory: kind -> bytes of one device at the moment when it holds most.
        length, images: tokens of a row, padding included, and images of a batch.
        flops: part, `logits and loss` and `backward pass` -> operations of one batch; the last with recomputation.
        step_samples, step_tokens, run_tokens, run_flops: of all devices together.
        largest_batch: that fits on a device, the rest unchanged; 0 where none does.
        remedies: what makes it fit where it does not, or what is still missing.
    """

    name: str
    precision: str
    checkpointing: bool
    batch_size: int
    text: str
    hardware: Hardware
    parameters: dict[str, int]
    trainable: dict[str, int]
    weights: dict[str, int]
    gradients: dict[str, int]
    optimizer: dict[str, int]
    memory: dict[str, float]
    length: int
    images: int
    flops: dict[str, float]
    step_samples: int
    step_tokens: int
    run_tokens: int
    run_flops: float
    hours: float
    cost: float | None
    largest_batch: int
    remedies: list[str]

    @property
    def tensors(self) -> float:
        """Bytes of one device without overhead: what `torch.cuda.max_memory_allocated` would count."""
        return sum(size for kind, size in self.memory.items() if kind != OVERHEAD)

    @property
    def total(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.hardware.memory

    def to_dict(self) -> dict:
        derived = {"tensors": self.tensors, "total": self.total, "fits": self.fits}
        return {**dataclasses.asdict(self), **derived}


def plan(
    recipe: Recipe,
    hardware: Hardware | None = None,
    *,
    length: int | None = None,
    dtype: torch.dtype | None = None,
) -> Plan:
    """Runs the recipe's step on tensors without contents and counts.

    Evaluation and warm start are not in it.

    Args:
        length, dtype: see `PlannedModel`.

    Raises:
        UserError: as `PlannedModel`.
    """
    hardware = hardware or Hardware()
    planned = PlannedModel(recipe, length=length, dtype=dtype)
    training, model = recipe.training, planned.model
    batch = planned.batch(training.batch_size)
    figures = fake_step(planned.copy(), recipe, batch, shares(hardware.devices))
    memory = device_memory(figures, model, hardware, training.precision)

    flops = {**figures.forward, BACKWARD: figures.backward}
    rows, columns = batch["input_ids"].shape
    batches = training.gradient_accumulation * hardware.devices
    step_flops = sum(flops.values()) * batches
    hours = training.steps * step_flops / (hardware.flops * hardware.utilisation * hardware.devices) / 3600
    weights, gradients = _bytes(model, trainable=False), _bytes(model, trainable=True)
    result = Plan(
        name=recipe.name,
        precision=training.precision,
        checkpointing=training.gradient_checkpointing,
        batch_size=training.batch_size,
        text=planned.source_of_text,
        hardware=hardware,
        parameters=count_parameters(model),
        trainable=count_parameters(model, trainable=True),
        weights=weights,
        gradients=gradients,
        # AdamW's two moments, in the type of the weight.
        optimizer={part: 2 * size for part, size in gradients.items()},
        memory=memory,
        length=columns,
        images=len(batch["pixel_values"]),
        flops=flops,
        step_samples=rows * batches,
        step_tokens=rows * columns * batches,
        run_tokens=rows * columns * batches * training.steps,
        run_flops=step_flops * training.steps,
        hours=hours,
        cost=None if hardware.price is None else hours * hardware.devices * hardware.price,
        largest_batch=0,
        remedies=[],
    )
    other = 2 if training.batch_size == 1 else max(1, training.batch_size // 2)
    smaller = _figures_of(planned, recipe, other, hardware)
    sizes = {training.batch_size: figures, other: smaller}
    largest = _largest_batch(sizes, model, hardware, training.precision)
    return dataclasses.replace(
        result,
        largest_batch=largest,
        remedies=[] if result.fits else _remedies(planned, recipe, hardware, figures, largest),
    )


def plans(
    path: str | Path,
    overrides: Sequence[str] = (),
    hardware: Hardware | None = None,
    *,
    length: int | None = None,
) -> dict[str, Plan]:
    """Name -> plan, of one recipe, or of each in a folder of stages. Data that a recipe does not name yet are not needed.

    Raises:
        UserError: one sentence, for a recipe that does not load, or as `plan`.
    """
    path = Path(path)
    with reading("recipe", path):
        is_folder = path.is_dir()
    if is_folder:
        with reading("recipes", path):
            files = [file for file in path.iterdir() if file.suffix in (".yaml", ".yml")]
        blanks = [f"{file.stem}:{blank}" for file in files for blank in _blanks(file)]
        recipes = load_stages(path, [*blanks, *overrides])
    else:
        recipes = {path.stem: load_recipe(path, [*_blanks(path), *overrides])}
    planned, model = {}, None
    for name, recipe in recipes.items():
        if recipe.model.checkpoint == PREVIOUS and model is not None:
            # A stage changes values of weights, and no shapes: adapters are merged at its end.
            recipe = dataclasses.replace(recipe, model=model)
        model = recipe.model
        try:
            planned[name] = plan(recipe, hardware, length=length)
        except UserError as error:
            raise UserError(f"{name}: {error}" if len(recipes) > 1 else str(error)) from error
    return planned


def _blanks(path: Path) -> list[str]:
    """Overrides that name data for the sections of a recipe which leave that open."""
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
        sections = {"data": values.get("data") or {}}
        sections |= {f"mix.{number}": section for number, section in enumerate(values.get("mix") or ())}
        return [
            f"{name}.path=not-named-yet"
            for name, section in sections.items()
            if section.get("kind") == "dataset" and not section.get("path")
        ]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError):
        return []  # the loader says what is wrong


def shares(devices: int) -> dict[str, dict[str, float]]:
    """As `PeakMemory` takes them, of every sharding."""
    return {name: dict.fromkeys(kinds, 1 / devices) for name, kinds in SHARDINGS.items()}


def device_memory(
    figures: StepFigures, model: AgeVlmForConditionalGeneration, hardware: Hardware, precision: str
) -> dict[str, float]:
    """Kind -> bytes of one device at its peak, overhead and buffers of communication included."""
    memory = dict(figures.peaks[hardware.sharding])
    if hardware.devices > 1:
        memory[COMMUNICATION] = communication_bytes(model, hardware.sharding, precision)
    memory[OVERHEAD] = hardware.overhead * sum(memory.values())
    return memory


def communication_bytes(model: AgeVlmForConditionalGeneration, sharding: str, precision: str) -> float:
    """What sharding itself keeps: DDP's buckets, as large as the gradients; of `zero3` the whole weights of what runs, of
    the layer that is fetched next, and of what lies outside all layers."""
    if sharding == "none":
        return sum(_bytes(model, trainable=True).values())
    if sharding == "zero2":
        return 0.0
    layers = set(model._no_split_modules)
    wrapped = [module for module in model.modules() if type(module).__name__ in layers]
    inside = {id(parameter) for module in wrapped for parameter in module.parameters()}
    item = None if precision == "fp32" else 2

    def size(parameters) -> int:
        return sum(p.numel() * (item or p.element_size()) for p in parameters)

    largest = sorted((size(module.parameters()) for module in wrapped), reverse=True)[:2]
    return sum(largest) + size(p for p in model.parameters() if id(p) not in inside)


def _bytes(model: AgeVlmForConditionalGeneration, *, trainable: bool) -> dict[str, int]:
    sizes = Counter(dict.fromkeys(COMPONENTS, 0))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trainable:
            sizes[component_of(name)] += parameter.numel() * parameter.element_size()
    return dict(sizes)


def _figures_of(planned: PlannedModel, recipe: Recipe, batch_size: int, hardware: Hardware, **changes) -> StepFigures:
    training = dataclasses.replace(recipe.training, batch_size=batch_size, **changes)
    recipe = dataclasses.replace(recipe, training=training)
    return fake_step(planned.copy(), recipe, planned.batch(batch_size), shares(hardware.devices))


def _largest_batch(
    sizes: Mapping[int, StepFigures], model: AgeVlmForConditionalGeneration, hardware: Hardware, precision: str
) -> int:
    """By a straight line through two sizes: all but activations is the same for every batch."""
    (one, other) = sorted(sizes)
    low, high = (sum(device_memory(sizes[size], model, hardware, precision).values()) for size in (one, other))
    each = (high - low) / (other - one)
    if low > hardware.memory and one == 1:
        return 0
    return max(0, int(one + (hardware.memory - low) // each)) if each > 0 else other


def _remedies(
    planned: PlannedModel, recipe: Recipe, hardware: Hardware, figures: StepFigures, largest: int
) -> list[str]:
    """Each change alone, then all together."""
    training, model = recipe.training, planned.model

    def total(figures: StepFigures, sharding: str) -> float:
        changed = dataclasses.replace(hardware, sharding=sharding)
        return sum(device_memory(figures, model, changed, training.precision).values())

    def said(change: str, size: float) -> str:
        return f"{change}: {size / 1e9:.1f} GB{'' if size <= hardware.memory else ', which is still too much'}"

    remedies = []
    if largest and largest < training.batch_size:
        remedies.append(f"training.batch_size={largest} (with more gradient_accumulation for the same samples a step)")
    shardings = [
        name for name in list(SHARDINGS)[list(SHARDINGS).index(hardware.sharding) + 1 :] if hardware.devices > 1
    ]
    remedies += [said(f"--sharding {name}", total(figures, name)) for name in shardings]
    if not training.gradient_checkpointing:
        figures = _figures_of(planned, recipe, training.batch_size, hardware, gradient_checkpointing=True)
        remedies.append(said("training.gradient_checkpointing=true", total(figures, hardware.sharding)))
    if not any("too much" not in remedy for remedy in remedies):
        figures = _figures_of(planned, recipe, 1, hardware, gradient_checkpointing=True)
        sharding = "zero3" if hardware.devices > 1 else hardware.sharding
        words = f"batch size 1, gradient checkpointing{', zero3' if sharding == 'zero3' else ''}"
        remedies.append(said(f"all together ({words})", total(figures, sharding)))
    return remedies
