"""Runs of two processes, as `accelerate launch` starts them, against the run of one with the same samples in each step."""

import json
import os
import re
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import datasets
import pytest
import torch
import transformers
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from age_vlm.commands.recipe_file import load_recipe
from age_vlm.commands.sources import load_sources
from age_vlm.data.schema import FEATURES, assistant_message, user_message


pytestmark = pytest.mark.timeout(900)

CONFIGURATIONS = Path(__file__).parents[2] / "examples" / "accelerate"
SMALL = {
    "text_config": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
    },
    "cross_attention_layers": [0, 1],
}

# As `accelerate launch` would, but forked after all imports, which take longer than the runs: arguments are jobs in JSON.
LAUNCHER = textwrap.dedent(
    """
    import json, os, signal, sys, time, traceback
    from pathlib import Path
    import torch
    from accelerate import PartialState
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import DistributedType
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
    from age_vlm.cli import main
    import age_vlm.commands.ask, age_vlm.commands.train

    def environment(job):
        if job["configuration"] is None:
            return [os.environ]
        words = ["--config_file", job["configuration"], "-m", "age_vlm", *job["words"]]
        arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
        if arguments.use_deepspeed:
            arguments.deepspeed_fields_from_accelerate_config = ""
            variables = prepare_deepspeed_cmd_env(arguments)[1]
        else:
            variables = prepare_multi_gpu_env(arguments)
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(arguments.main_process_port), "WORLD_SIZE": "2"}
        return [variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]

    def run(job, variables, name):
        os.environ.clear()
        os.environ.update(variables)
        torch.set_num_threads(1)
        for number, stream in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{name}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        if job.get("as_gpu"):
            # accelerate shards on GPUs only: the processor is passed off as one.
            os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
            torch.distributed.init_process_group("gloo")
            backend = PartialState._prepare_backend
            PartialState._prepare_backend = lambda *arguments: (
                ("gloo", DistributedType.MULTI_GPU) if "LOCAL_RANK" in os.environ else backend(*arguments)
            )
        if "zero" in (job["configuration"] or ""):
            import deepspeed
            # It would compile C++ first, for exchange between processors.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        try:
            code = main(job["words"])
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)

    codes = {}
    for job in json.loads(sys.argv[1]):
        ranks = {}
        for rank, variables in enumerate(environment(job)):
            pid = os.fork()
            if not pid:
                run(job, dict(variables), f"{job['name']}.{rank}")
            ranks[pid] = rank
        codes[job["name"]] = [None] * len(ranks)
        while ranks:
            time.sleep(0.02)
            if Path(job.get("kill_at", "nowhere")).exists():
                for pid in ranks:
                    os.kill(pid, signal.SIGKILL)
            for pid in list(ranks):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[job["name"]][ranks.pop(pid)] = os.waitstatus_to_exitcode(status)
    print(json.dumps(codes))
    """
)


def job(name, configuration, recipe, output, *words, **options):
    path = None if configuration is None else str(CONFIGURATIONS / configuration)
    words = ["pipeline" if recipe.is_dir() else "train", str(recipe), *words, "--output", str(output)]
    return {"name": name, "configuration": path, "words": words, **options}


def launch(folder, jobs):
    """Exit codes of the processes of each job; what they print is in `<job>.<rank>.out` and `.err`."""
    (folder / "launcher.py").write_text(LAUNCHER)
    command = [sys.executable, str(folder / "launcher.py"), json.dumps(jobs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def said(folder, name):
    return "".join(path.read_text()[-3000:] for path in sorted(folder.glob(f"{name}.*.err")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With `recipe.yaml`: drawn scenes and a few texts without an image or a mask, and `recipes`: so, and again from there."""
    folder = tmp_path_factory.mktemp("processes")
    text = {
        "id": "text",
        "images": [],
        "messages": [user_message("is a dog an animal"), assistant_message("yes")],
        "groundings": [],
    }
    image = {
        "id": "image",
        "images": [Image.new("RGB", (64, 64), "red")],
        "messages": [user_message("is there a red circle in the picture", images=1), assistant_message("no")],
        "groundings": [],
    }
    datasets.Dataset.from_list([text, text, image, image], features=FEATURES).save_to_disk(folder / "texts")
    values = {
        "name": "processes",
        "seed": 3,
        "model": {"config": SMALL},
        "data": {"train": 16, "validation": 1, "test": 1},
        "mix": [{"kind": "dataset", "path": str(folder / "texts"), "held_out": 0.0, "weight": 0.25}],
        "warm_start": {"steps": 1, "batch_size": 4},
        "training": {
            "steps": 5,
            "batch_size": 1,
            "log_every": 1,
            "evaluate_every": 2,
            "save_every": 2,
            "language_model": "lora",
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    (folder / "recipes").mkdir()
    (folder / "recipes" / "stage1.yaml").write_text(yaml.safe_dump(values))
    values |= {"seed": 4, "model": {"checkpoint": "previous"}, "warm_start": {}}
    (folder / "recipes" / "stage2.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture(scope="module")
def codes(folder):
    """Job -> exit codes, of all runs at once: imports take longer than the runs."""
    recipe, missing = folder / "recipe.yaml", folder / "missing.yaml"
    missing.write_text("data: {kind: dataset, path: nowhere/at/all}\n")
    both = ["training.batch_size=2"]
    drawn = load_sources(load_recipe(recipe, both)).train
    # In the step of a sample without an image, or a mask, the other process has both.
    shown = [(len(drawn[index]["images"]), bool(drawn[index]["groundings"])) for index in range(len(drawn))]
    assert [each for each in sorted(shown) if each != (1, True)] == [(0, False), (1, False)]
    assert all((1, True) in shown[step : step + 2] for step in range(0, len(shown), 2))

    def killed(name, configuration, *words, **options):
        kill_at = str(folder / name / "trainer" / "checkpoint-2" / "whole")
        return job(f"{name} killed", configuration, recipe, folder / name, *words, kill_at=kill_at, **options)

    jobs = [
        job("one", None, recipe, folder / "one", *both),
        killed("ddp", "ddp.yaml"),
        job("by one", None, recipe, folder / "ddp", "--resume"),
        job("sharded", "fsdp2.yaml", recipe, folder / "ddp", "--resume"),
        job("exists", "ddp.yaml", recipe, folder / "one"),
        job("stages by one", None, folder / "recipes", folder / "stages by one", *both),
        job("stages", "ddp.yaml", folder / "recipes", folder / "stages"),
        job("no data", "ddp.yaml", missing, folder / "new"),
    ]
    for name in SHARDED:
        if name == "fsdp2" or find_spec("deepspeed"):
            again = job(f"{name} resumed", f"{name}.yaml", recipe, folder / name, "--resume", as_gpu=True)
            jobs += [killed(name, f"{name}.yaml", as_gpu=True), again]
    return launch(folder, jobs)


SHARDED = ("fsdp2", "zero2", "zero3")


def assert_same_run(one, several):
    """Curves up to rounding. Adam turns the rounding of gradients that are near zero into whole steps: weights differ more."""
    logs = [(run / "log.jsonl").read_text("utf-8").splitlines() for run in (one, several)]
    lines, others = ([json.loads(line) for line in log] for log in logs)
    assert [line["step"] for line in others] == [1, 2, 3, 4, 5, 5] == [line["step"] for line in lines]
    for line, other in zip(lines[:-1], others[:-1]):
        assert line.keys() == other.keys() and "alignment_loss" in line
        for name, value in line.items():
            assert other[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (line["step"], name)
    records = [json.loads((run / "metrics.json").read_text("utf-8")) for run in (one, several)]
    first, second = (record["validation_curve"] for record in records)
    assert [point["step"] for point in second] == [2, 4, 5]
    for point, other in zip(first, second):
        assert other == pytest.approx(point, rel=1e-4)
    assert {path.name for path in one.iterdir()} == {path.name for path in several.iterdir()}
    for name in ("checkpoint/model.safetensors", "adapter/adapter_model.safetensors"):
        whole, other = (load_file(run / name) for run in (one, several))
        assert whole.keys() == other.keys()
        for key, value in whole.items():
            assert value.dtype == other[key].dtype
            torch.testing.assert_close(
                other[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
            )
    assert records[1]["environment"]["processes"] == 2
    AutoModelForImageTextToText.from_pretrained(several / "checkpoint")


@pytest.mark.parametrize(
    "name, kind, expected",
    [
        ("ddp.yaml", "MULTI_GPU", {}),
        (
            "fsdp2.yaml",
            "FSDP",
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
                "FSDP_RESHARD_AFTER_FORWARD": "true",
                "FSDP_OFFLOAD_PARAMS": "false",
                "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
                "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
            },
        ),
        ("zero2.yaml", "DEEPSPEED", {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
        (
            "zero3.yaml",
            "DEEPSPEED",
            {
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
                "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
                "ACCELERATE_GRADIENT_CLIPPING": "auto",
            },
        ),
    ],
)
def test_accelerate_reads_the_files_as_they_are_meant(name, kind, expected):
    path = CONFIGURATIONS / name
    words = ["--config_file", str(path), "-m", "age_vlm", "train", "recipe.yaml"]
    arguments, configuration, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert configuration.distributed_type == kind and arguments.num_processes == 2
    assert not configuration.use_cpu and arguments.mixed_precision == "no"
    if kind == "DEEPSPEED":
        arguments.deepspeed_fields_from_accelerate_config = ""
        variables = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        variables = prepare_multi_gpu_env(arguments)
    assert {key: variables.get(key) for key in expected} == expected
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("  "):
            assert "#" in line or "zero_stage" in line or "fsdp_version" in line or "zero3_init" in line, line


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="transformers 5.16 loads the optimizer of several processes without an accelerator to cpu:0, which torch refuses",
)
def test_ddp_killed_and_resumed_by_accelerate_is_the_run_of_one(folder, codes):
    assert codes["one"] == [0] and codes["ddp killed"] == [-9, -9], said(folder, "ddp killed")
    assert not (folder / "ddp" / "metrics.json").exists()
    words = ["launch", "--config_file", str(CONFIGURATIONS / "ddp.yaml"), "-m", "age_vlm"]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words]
    command += ["train", str(folder / "recipe.yaml"), "--output", str(folder / "ddp"), "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(folder / "one", folder / "ddp")
    assert done.stdout.count("Checkpoint: ") == 1


def test_stages_by_several_processes_are_those_by_one(folder, codes):
    assert codes["stages by one"] == [0], said(folder, "stages by one")
    assert codes["stages"] == [0, 0], said(folder, "stages")
    for name in ("stage1", "stage2"):
        assert_same_run(folder / "stages by one" / name, folder / "stages" / name)
    output = "".join(path.read_text() for path in folder.glob("stages.*.out"))
    assert output.count("stage2: started") == 1


@pytest.mark.parametrize(
    "name, words",
    [
        ("exists", "run folder: '.*one' exists, expected a new one"),
        ("no data", "data.path: 'nowhere/at/all'"),
        ("by one", r"run folder: '.*ddp' was begun by 2 processes \(DDP\), expected the same to resume it, got 1"),
        ("sharded", "accelerate: got FSDP on processors, expected DDP"),
    ],
)
def test_what_is_wrong_ends_all_processes_and_is_said_once(folder, codes, name, words):
    assert set(codes[name]) == {2}, said(folder, name)
    lines = [line for line in said(folder, name).splitlines() if line.startswith("age-vlm: ")]
    assert len(lines) == 1 and re.match(f"age-vlm: {words}", lines[0]), said(folder, name)
    assert not (folder / "new").exists()


@pytest.mark.skipif(Version(torch.__version__) < Version("2.7"), reason="torch 2.6 shards on accelerators only")
@pytest.mark.parametrize("name", SHARDED)
def test_sharded_killed_and_resumed_it_is_the_run_of_one(folder, codes, name):
    if f"{name} killed" not in codes:
        pytest.skip("deepspeed is not installed")
    assert codes[f"{name} killed"] == [-9, -9] and codes[f"{name} resumed"] == [0, 0], said(folder, f"{name} resumed")
    assert_same_run(folder / "one", folder / name)
    lines = (folder / f"{name} resumed.1.out").read_text().splitlines()
    assert [line for line in lines if "real_accelerator.py" not in line] == []  # DeepSpeed says what it runs on
