"""The command `age-vlm`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from .errors import UserError, check_new_file, run_command, writing


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command, see `run_command`."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes the overrides that stand before the first option only.
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return run_command("age-vlm", lambda: options.run(options), debug=options.debug)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="age-vlm", description="Small vision-language models that look at what they name."
    )
    parser.add_argument("--debug", action="store_true", help="show where in the code an error comes from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train, evaluate and report on drawn scenes (about 10 minutes on 2 cores)")
    demo.set_defaults(run=_demo)
    train = commands.add_parser("train", help="train what a recipe says")
    train.add_argument("recipe", help="YAML file")
    train.set_defaults(run=_train)
    for command, folder in ((demo, "runs/demo"), (train, "runs/NAME, the recipe's name")):
        command.add_argument("overrides", nargs="*", help="recipe keys: section.key=value")
        command.add_argument("--output", help=f"run folder (default: {folder})")
        again = command.add_mutually_exclusive_group()
        again.add_argument("--overwrite", action="store_true", help="replace an earlier run in that folder")
        again.add_argument("--resume", action="store_true", help="go on where a run in that folder was stopped")

    pipeline = commands.add_parser("pipeline", help="train a folder of recipes in turn; run again, it continues")
    pipeline.add_argument("recipes", help="folder of YAML files, run in the order of their names")
    pipeline.add_argument(
        "overrides", nargs="*", help="recipe keys: section.key=value for all, RECIPE:section.key=value for one"
    )
    pipeline.add_argument("--output", required=True, help="folder with a run folder for each recipe")
    pipeline.set_defaults(run=_pipeline)

    plan = commands.add_parser("plan", help="memory, computation, hours and cost of a recipe, before it is run")
    plan.add_argument("recipe", help="YAML file, or a folder of them as for pipeline")
    plan.add_argument("overrides", nargs="*", help="recipe keys, as for train or pipeline")
    plan.add_argument("--devices", type=int, default=1, help="each with the recipe's batch (default: 1)")
    plan.add_argument("--memory", default="80GB", help="of a device, such as 80GB or 24GiB (default: 80GB)")
    plan.add_argument("--sharding", default="none", help="none (DDP), zero2 or zero3 (default: none)")
    plan.add_argument("--length", type=int, help="tokens of a text (default: those of the data, or the recipe's limit)")
    plan.add_argument(
        "--device-flops", type=float, default=312e12, help="peak FLOP/s (default: 312e12, an A100's bf16)"
    )
    plan.add_argument("--utilisation", type=float, default=0.35, help="share of the peak reached (default: 0.35)")
    plan.add_argument("--price", type=float, help="of a device for an hour, in any currency")
    plan.add_argument("--overhead", type=float, default=0.1, help="share of memory beside tensors (default: 0.1)")
    plan.add_argument("--json", help="write the plan here, too")
    plan.set_defaults(run=_plan)

    ground = commands.add_parser("ground", help="make masks for the phrases of a data set; run again, it continues")
    ground.add_argument("data", help="folder or Hub id: columns of the schema, or image and phrases (and boxes)")
    ground.add_argument("--teacher", required=True, help="annotated, sam2, sam2-transformers or sam3")
    ground.add_argument("--model", help="tiny, small, base-plus, large, a Hub id or a folder (default: large)")
    ground.add_argument("--output", default="runs/masks", help="folder of the run (default: runs/masks)")
    ground.add_argument("--split", default="train", help="split of the data set (default: train)")
    ground.add_argument("--min-score", type=float, default=0.5, help="least score of a mask (default: 0.5)")
    ground.add_argument("--min-area", type=float, default=0.0, help="least share of the image (default: 0)")
    ground.add_argument("--max-area", type=float, default=1.0, help="largest share of the image (default: 1)")
    ground.add_argument("--batch-size", type=int, default=8, help="images encoded at once (default: 8)")
    ground.add_argument("--shard-size", type=int, default=200, help="samples in a file (default: 200)")
    ground.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default: float32)")
    ground.add_argument("--device", help="such as cuda:0 or cpu (default: the one accelerate chooses)")
    ground.set_defaults(run=_ground)

    ask = commands.add_parser("ask", help="ask about an image, and see where the model looked")
    ask.add_argument("question")
    ask.add_argument("--image", required=True, help="path or URL")
    ask.add_argument("--model", help="folder or Hub id (default: the example checkpoint of the repository)")
    ask.add_argument("--text", help="of a checkpoint without its language model: the folder or Hub id of that")
    ask.add_argument("--vision", help="of a checkpoint without its vision encoder: the folder or Hub id of that")
    ask.add_argument("--overlay", help="write the image with the attention of each content word here (PNG)")
    ask.add_argument("--max-new-tokens", type=int, default=64)
    ask.set_defaults(run=_ask)

    check = commands.add_parser(
        "check", help="whether a model answers as it should with the packages that are installed"
    )
    check.add_argument("--model", help="folder or Hub id (default: the example checkpoint of the repository)")
    check.set_defaults(run=_check)
    for command in commands.choices.values():
        # Without a default, which would undo one that stands before the command.
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _demo(options: argparse.Namespace) -> None:
    recipe = files(__package__) / "recipes" / "scenes.yaml"
    _run(recipe, options, options.output or "runs/demo")


def _train(options: argparse.Namespace) -> None:
    _run(options.recipe, options, options.output)


def _run(recipe_path, options: argparse.Namespace, output: str | None) -> None:
    from .commands.recipe_file import load_recipe

    recipe = load_recipe(recipe_path, options.overrides)
    folder = Path(output or Path("runs") / recipe.name)

    from .commands.train import run_recipe
    from .training.distributed import is_main, leave

    metrics = run_recipe(recipe, folder, overwrite=options.overwrite, resume=options.resume)
    leave()
    if not is_main():
        return
    _print_metrics(metrics, f"{recipe.name}, test split, seed {recipe.seed}", folder)


def _print_metrics(metrics: dict[str, dict[str, float]], title: str, folder: Path) -> None:
    from .commands.train import table_rows
    from .console import plain_console, plain_table

    table = plain_table(["metric", *metrics], title=title)
    for row in table_rows(metrics):
        table.add_row(row["metric"], *(f"{row[name]:.3f}" if name in row else "-" for name in metrics))
    console = plain_console()
    console.print(table)
    console.print(f"Report: {folder / 'report.html'}", f"Checkpoint: {folder / 'checkpoint'}", sep="\n", soft_wrap=True)


def _pipeline(options: argparse.Namespace) -> None:
    from .commands.pipeline import load_stages

    stages = load_stages(options.recipes, options.overrides)

    from .commands.pipeline import run_stages
    from .console import plain_console
    from .training.distributed import is_main, leave

    console = plain_console(quiet=not is_main())
    metrics = run_stages(
        stages, options.output, on_stage=lambda name, state: console.print(f"{name}: {state}", soft_wrap=True)
    )
    leave()
    if is_main():
        _print_metrics(metrics, "test split of each recipe's own data", Path(options.output) / list(stages)[-1])


def _plan(options: argparse.Namespace) -> None:
    from .commands.planning.plan import Hardware, plans
    from .commands.planning.table import parse_size, plan_table

    hardware = Hardware(
        devices=options.devices,
        memory=parse_size(options.memory),
        sharding=options.sharding,
        flops=options.device_flops,
        utilisation=options.utilisation,
        price=options.price,
        overhead=options.overhead,
    )
    if options.json:
        check_new_file("--json", options.json)
    made = plans(options.recipe, options.overrides, hardware, length=options.length)

    from .atomic_files import write_whole
    from .console import plain_console

    console = plain_console()
    console.print(plan_table(made))
    for name, plan in made.items():
        console.print(f"{name}: {plan.text}.", soft_wrap=True, highlight=False)
        if not plan.fits:
            console.print(f"{name} does not fit. What changes that:", *plan.remedies, sep="\n  ", soft_wrap=True)
    console.print(
        f"Overhead ({hardware.overhead:.0%} of the tensors) and utilisation ({hardware.utilisation:.0%}) are assumptions. "
        "Evaluation and warm start are not counted.",
        soft_wrap=True,
        highlight=False,
    )
    if options.json:
        with writing("--json", options.json):
            write_whole(Path(options.json), json.dumps({name: plan.to_dict() for name, plan in made.items()}, indent=2))


def _ground(options: argparse.Namespace) -> None:
    from .data.stored import load_stored
    from .grounding import load_teacher
    from .grounding.run import GroundSettings, ground

    settings = GroundSettings(options.min_score, options.min_area, options.max_area, options.shard_size)
    data = load_stored(options.data, options.split)
    teacher = load_teacher(options.teacher, options.model, dtype=options.dtype, device=options.device)
    summary = ground(data, options.output, teacher, settings, batch_size=options.batch_size)
    if summary is None:
        return

    from .console import plain_console, plain_table

    table = plain_table(["samples and phrases", "number"], title=f"masks by {options.teacher}")
    table.add_row("samples written", f"{summary.samples:,}")
    table.add_row("phrases with a mask", f"{summary.phrases:,}")
    for kind, rejects in (("samples", summary.rejected_samples), ("phrases", summary.rejected_phrases)):
        for reason, count in rejects.counts.most_common():
            table.add_row(f"{kind} left out: {reason}", f"{count:,}")
    if summary.iou is not None:
        table.add_row("mean IoU with the masks of the data", f"{summary.iou:.3f}")
    console = plain_console()
    console.print(table)
    load = f'datasets.load_dataset({json.dumps(str(summary.folder), ensure_ascii=False)}, split="train")'
    console.print(f"Report: {summary.report}", f"Load it with: {load}", sep="\n", soft_wrap=True, highlight=False)


def _ask(options: argparse.Namespace) -> None:
    import PIL.Image

    from .atomic_files import replaced
    from .commands.ask import ask, load

    if options.overlay:
        check_new_file("--overlay", options.overlay)
        kind = PIL.Image.registered_extensions().get(Path(options.overlay).suffix.lower())
        if kind not in PIL.Image.SAVE:
            raise UserError(f"--overlay: got '{options.overlay}', expected the name of an image, such as where.png.")
    parts = {name: value for name in ("text", "vision") if (value := getattr(options, name))}
    model, processor = load(options.model, parts)
    answer = ask(model, processor, options.image, options.question, max_new_tokens=options.max_new_tokens)
    print(answer.text)
    if options.overlay:
        with writing("--overlay", options.overlay), replaced(Path(options.overlay)) as file:
            answer.sheet(options.question).save(file, kind)


def _check(options: argparse.Namespace) -> None:
    from .commands.check import check

    if not check(options.model):
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
