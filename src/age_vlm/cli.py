"""The command `age-vlm`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; a user's error is one sentence on standard error and exit code 2."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes the overrides that stand before the first option only.
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    try:
        options.run(options)
    except ValueError as error:
        print(f"age-vlm: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        # Errors of libraries that call themselves one have a sentence instead of a number.
        said = error.strerror or " ".join(str(error).split()).rstrip(".") or type(error).__name__
        print(f"age-vlm: {error.filename or 'a file'} could not be written or read: {said}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="age-vlm", description="Small vision-language models that look at what they name."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train, evaluate and report on drawn scenes (about 10 minutes on 2 cores)")
    demo.set_defaults(run=_demo)
    train = commands.add_parser("train", help="train what a recipe says")
    train.add_argument("recipe", help="YAML file")
    train.set_defaults(run=_train)
    for command, folder in ((demo, "runs/demo"), (train, "runs/NAME, the recipe's name")):
        command.add_argument("overrides", nargs="*", help="recipe keys: section.key=value")
        command.add_argument("--output", help=f"run folder (default: {folder})")
        command.add_argument("--overwrite", action="store_true", help="replace an earlier run in that folder")

    ask = commands.add_parser("ask", help="ask about a picture, and see where the model looked")
    ask.add_argument("question")
    ask.add_argument("--image", required=True, help="path or URL")
    ask.add_argument("--model", help="folder or Hub id (default: the example checkpoint of the repository)")
    ask.add_argument("--overlay", help="write the picture with the attention of each content word here (PNG)")
    ask.add_argument("--max-new-tokens", type=int, default=64)
    ask.set_defaults(run=_ask)
    return parser


def _demo(options: argparse.Namespace) -> None:
    recipe = files(__package__) / "recipes" / "scenes.yaml"
    _run(recipe, options, options.output or "runs/demo")


def _train(options: argparse.Namespace) -> None:
    _run(options.recipe, options, options.output)


def _run(recipe_path, options: argparse.Namespace, output: str | None) -> None:
    from .training.recipe import load_recipe

    recipe = load_recipe(recipe_path, options.overrides)
    folder = Path(output or Path("runs") / recipe.name)

    from rich.console import Console
    from rich.table import Table

    from .training.pipeline import run_recipe, table_rows

    metrics = run_recipe(recipe, folder, overwrite=options.overwrite)
    table = Table("figure", *metrics, title=f"{recipe.name}, test part, seed {recipe.seed}")
    for row in table_rows(metrics):
        table.add_row(row["figure"], *(f"{row[name]:.3f}" if name in row else "-" for name in metrics))
    console = Console()
    console.print(table)
    console.print(f"Report: {folder / 'report.html'}", f"Checkpoint: {folder / 'checkpoint'}", sep="\n", soft_wrap=True)


def _ask(options: argparse.Namespace) -> None:
    from .ask import ask, load

    if options.overlay and not Path(options.overlay).absolute().parent.is_dir():
        raise ValueError(f"--overlay: '{options.overlay}' is not in a folder that exists.")
    model, processor = load(options.model)
    answer = ask(model, processor, options.image, options.question, max_new_tokens=options.max_new_tokens)
    print(answer.text)
    if options.overlay:
        answer.sheet(options.question).save(options.overlay)


if __name__ == "__main__":
    sys.exit(main())
