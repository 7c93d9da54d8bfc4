"""How many planted faults the tests find: a sample of cosmic-ray's mutations of each module, each under that module's tests.

python benchmarks/mutation.py --sample 20 --seed 0 --jobs 2 --output docs/results/mutation-ENVIRONMENT.csv

Needs cosmic-ray, and fork. Nothing is written into the tree: a forked process, which already has torch and transformers, imports
the mutated source from memory. What survives is printed as a diff. Mutations of type hints and of docstrings are left out.
"""

import argparse
import ast
import csv
import difflib
import importlib.machinery
import os
import random
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parents[1]
MODEL_TESTS = [
    "modeling_agevlm/test_silent_mistakes.py",
    "modeling_agevlm/test_cross_attention_agevlm.py",
    "modeling_agevlm/test_image_masks_agevlm.py",
    "modeling_agevlm/test_visibility_agevlm.py",
    "modeling_agevlm/test_modeling_agevlm.py",
    "modeling_agevlm/test_gradients_agevlm.py",
    "modeling_agevlm/test_cache_agevlm.py",
    "modeling_agevlm/test_generation_agevlm.py",
    "modeling_agevlm/test_generation_fuzz.py",
]
TRAINER_TESTS = [
    "training/test_trainer.py",
    "training/test_trainer_evaluation.py",
    "training/test_trainer_wrapped_models.py",
    "training/test_trainer_bad_steps.py",
    "training/test_trainer_two_processes.py",
]
# Module -> its tests, those that end soonest first.
MODULES = {
    "configuration/configuration_agevlm.py": ["configuration", "commands/test_model_card.py"],
    "configuration/alignment_agevlm.py": ["configuration", "training/test_alignment.py"],
    "configuration/versions_agevlm.py": ["configuration/test_versions_agevlm.py"],
    "modeling_agevlm/backbones_agevlm.py": ["modeling_agevlm/test_from_backbones.py"],
    "modeling_agevlm/cache_agevlm.py": MODEL_TESTS,
    "modeling_agevlm/cross_attention_agevlm.py": MODEL_TESTS,
    "modeling_agevlm/attention_maps_agevlm.py": ["modeling_agevlm/test_attention_maps_agevlm.py"],
    "modeling_agevlm/components_agevlm.py": ["modeling_agevlm/test_components_agevlm.py"],
    "modeling_agevlm/generation_agevlm.py": MODEL_TESTS,
    "modeling_agevlm/image_masks_agevlm.py": MODEL_TESTS,
    "modeling_agevlm/modeling_agevlm.py": [*MODEL_TESTS, "modeling_agevlm/test_components_agevlm.py"],
    "modeling_agevlm/outputs_agevlm.py": ["modeling_agevlm/test_attention_maps_agevlm.py"],
    "modeling_agevlm/pretrained_agevlm.py": MODEL_TESTS,
    "modeling_agevlm/vision_agevlm.py": ["modeling_agevlm/test_from_backbones.py", *MODEL_TESTS],
    "processing/backbone_files_agevlm.py": ["modeling_agevlm/test_from_backbones.py"],
    "processing/chat_agevlm.py": ["processing/test_chat_agevlm.py"],
    "processing/image_geometry_agevlm.py": ["processing/test_image_geometry_agevlm.py"],
    "processing/image_settings_agevlm.py": ["processing/test_image_settings_agevlm.py"],
    "processing/images_agevlm.py": ["processing/test_images_agevlm.py"],
    "processing/processing_agevlm.py": ["processing/test_processing_agevlm.py", "modeling_agevlm/test_from_backbones.py"],
    "src/age_vlm/training/alignment.py": ["training/test_alignment.py"],
    "src/age_vlm/training/trainer.py": [*TRAINER_TESTS, "training/test_loss_watch.py"],
    "src/age_vlm/data/chat.py": ["data/test_chat.py"],
    "src/age_vlm/data/collator.py": ["data/collator"],
    "src/age_vlm/evaluation/answers.py": ["evaluation/test_answers.py"],
    "src/age_vlm/evaluation/benchmark.py": ["evaluation/test_benchmark.py"],
    "src/age_vlm/evaluation/grounding.py": ["evaluation/test_grounding.py"],
    "src/age_vlm/evaluation/metrics.py": ["evaluation/test_metrics.py"],
    "src/age_vlm/evaluation/pope.py": ["evaluation/test_pope.py"],
}  # fmt: skip
# One stands for the many that replace an operator by another; a number is made one more or less.
OPERATORS = [
    "AddNot", "ExceptionReplacer", "NumberReplacer", "RemoveDecorator", "ReplaceAndWithOr", "ReplaceBreakWithContinue",
    "ReplaceContinueWithBreak", "ReplaceFalseWithTrue", "ReplaceOrWithAnd", "ReplaceTrueWithFalse", "ZeroIterationForLoop",
    "ReplaceUnaryOperator_Delete_Not", "ReplaceUnaryOperator_USub_UAdd", "ReplaceUnaryOperator_Delete_USub",
    "ReplaceBinaryOperator_Add_Sub", "ReplaceBinaryOperator_Sub_Add", "ReplaceBinaryOperator_Mul_Div",
    "ReplaceBinaryOperator_Div_Mul", "ReplaceBinaryOperator_FloorDiv_Mul", "ReplaceBinaryOperator_Mod_Mul",
    "ReplaceBinaryOperator_Pow_Mul", "ReplaceBinaryOperator_BitOr_BitAnd", "ReplaceBinaryOperator_BitAnd_BitOr",
    "ReplaceComparisonOperator_Eq_NotEq", "ReplaceComparisonOperator_NotEq_Eq", "ReplaceComparisonOperator_Lt_LtE",
    "ReplaceComparisonOperator_LtE_Lt", "ReplaceComparisonOperator_Gt_GtE", "ReplaceComparisonOperator_GtE_Gt",
    "ReplaceComparisonOperator_Is_IsNot", "ReplaceComparisonOperator_IsNot_Is",
]  # fmt: skip


def mutations(source: str) -> list[str]:
    """Every mutated source that differs in more than type hints and docstrings."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    plain, found = _meaning(source), []
    for name in OPERATORS:
        operator = get_operator(f"core/{name}")()
        occurrence = 0
        while (mutated := mutate_code(source.encode(), operator, occurrence)) is not None:
            mutated = mutated if isinstance(mutated, str) else mutated.decode()
            try:
                if _meaning(mutated) != plain:
                    found.append(mutated)
            except SyntaxError:  # takes ** for an operator
                pass
            occurrence += 1
    return found


def _meaning(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            if getattr(node, field, None) is not None:
                setattr(node, field, ast.Constant(None))
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0].value.value = ""
    return ast.dump(tree)


def outcome(module: Path, source: str | None, tests: list[str], seconds: float) -> str:
    """`found`, `survived` or `timeout` (which counts as found), of one mutated source, in a process of its own."""
    child = os.fork()
    if child == 0:
        os.setsid()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            os._exit(_run(module, source, tests))
        except BaseException:
            os._exit(1)
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "survived" if os.waitstatus_to_exitcode(status) == 0 else "found"
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def _run(module: Path, source: str | None, tests: list[str]) -> int:
    import pytest

    get_code = importlib.machinery.SourceFileLoader.get_code

    def mutated_code(self, name):
        if source is not None and Path(self.path).resolve() == module:
            return compile(source, self.path, "exec")
        return get_code(self, name)

    importlib.machinery.SourceFileLoader.get_code = mutated_code
    paths = [str(ROOT / "tests" / test) for test in tests]
    # Where pytest-randomly is installed, it would make two runs differ.
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly"]
    return int(pytest.main([*options, "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), *paths]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=20, help="mutations of each module (default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="at once (default: 2)")
    parser.add_argument("--seconds", type=float, default=240, help="for the tests of one mutation (default: 240)")
    parser.add_argument("--only", nargs="+", default=[""], help="modules whose path has one of these")
    parser.add_argument("--output", help="CSV to write")
    options = parser.parse_args()

    import peft  # noqa: F401
    import pytest  # noqa: F401
    import timm  # noqa: F401
    import transformers.models.auto.modeling_auto
    import transformers.models.clip.modeling_clip
    import transformers.models.llama.modeling_llama
    import transformers.models.timm_wrapper.modeling_timm_wrapper
    import transformers.trainer  # noqa: F401

    console, scores = Console(soft_wrap=True), []
    header = ("module", "mutations", "sampled", "found", "timeout", "survived")
    took = {}  # seconds of the tests without a mutation: several modules have the same tests
    with ThreadPoolExecutor(options.jobs) as pool:
        for name, tests in MODULES.items():
            if not any(part in name for part in options.only):
                continue
            module = (ROOT / name).resolve()
            source = module.read_text("utf-8")
            if missing := [test for test in tests if not (ROOT / "tests" / test).exists()]:
                sys.exit(f"{name}: its tests are not there: {', '.join(missing)}.")
            every = mutations(source)
            sample = random.Random(f"{options.seed} {name}").sample(every, min(options.sample, len(every)))
            if tuple(tests) not in took:
                start = time.monotonic()
                if outcome(module, None, tests, 4 * options.seconds) != "survived":
                    sys.exit(f"{name}: its tests fail without a mutation.")
                took[tuple(tests)] = time.monotonic() - start
            # An endless loop need not take all of the time; a machine that others use may be slow.
            seconds = min(options.seconds, 30 + 5 * took[tuple(tests)])
            run = partial(outcome, module, tests=tests, seconds=seconds)
            results = list(pool.map(run, sample))
            counts = Counter(results)
            scores.append((name, len(every), len(sample), counts["found"], counts["timeout"], counts["survived"]))
            console.print(f"{name}: {len(sample) - counts['survived']} of {len(sample)} found", highlight=False)
            for mutated, result in zip(sample, results):
                if result == "survived":
                    lines = difflib.unified_diff(
                        source.splitlines(), mutated.splitlines(), name, "survived", n=0, lineterm=""
                    )
                    console.print("\n".join(list(lines)[2:]), markup=False, highlight=False)
            if options.output:  # after each module: a run that is stopped loses nothing
                with open(options.output, "w", newline="") as file:
                    csv.writer(file).writerows([header, *scores])
    table = Table(*header, "score")
    for row in scores:
        table.add_row(*map(str, row), f"{1 - row[-1] / row[2]:.2f}" if row[2] else "-")
    console.print(table)


if __name__ == "__main__":
    main()
