"""Checkpoints carry their own code: they load where age-vlm is not installed, and go to the Hub whole."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

import age_vlm
from age_vlm import AgeVlmForConditionalGeneration, AgeVlmModel, AgeVlmProcessor
from age_vlm.configuration.checkpoint_code_agevlm import AUTO_MAP, checkpoint_code


TEXT = "<|reserved_special_token_0|>What is it?"

# Runs in a process that finds transformers and not age-vlm.
LOAD_AND_SAVE_AGAIN = (
    """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "age_vlm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
source, target, inputs = sys.argv[1:]

import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=True)
assert type(AutoModel.from_pretrained(source, trust_remote_code=True)).__name__ == "AgeVlmModel"
assert type(AutoConfig.from_pretrained(source, trust_remote_code=True)).__name__ == "AgeVlmConfig"
assert "age_vlm" not in sys.modules
batch = processor(images=Image.open(inputs), text=%r, return_tensors="pt")
with torch.no_grad():
    torch.save({"logits": model(**batch).logits, **batch, "answer": model.generate(**batch, max_new_tokens=3)}, target + ".pt")
model.save_pretrained(target)
processor.save_pretrained(target)
"""
    % TEXT
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_model, processor):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.effect_mandelbrot((40, 30), (-2, -1.5, 1, 1.5), 50).save(path)
    return path


def python(code, *arguments, home):
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(home),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@torch.no_grad()
def test_loads_and_saves_where_age_vlm_is_not_installed(checkpoint, picture, tmp_path):
    model, processor = (
        AgeVlmForConditionalGeneration.from_pretrained(checkpoint),
        AgeVlmProcessor.from_pretrained(checkpoint),
    )
    batch = processor(images=Image.open(picture), text=TEXT, return_tensors="pt")
    expected = model(**batch).logits
    source = checkpoint
    for generation in ("first", "second"):
        target = tmp_path / generation
        home = tmp_path / f"modules_{generation}"
        home.mkdir()
        python(LOAD_AND_SAVE_AGAIN, source, target, picture, home=home)
        there = torch.load(f"{target}.pt")
        assert torch.equal(there["pixel_values"], batch["pixel_values"])
        assert torch.equal(there["input_ids"], batch["input_ids"])
        assert torch.equal(there["logits"], expected)
        assert torch.equal(there["answer"], model.generate(**batch, max_new_tokens=3))
        saved = {file.name: file.read_text() for file in target.glob("*.py")}
        assert saved == checkpoint_code(), "the copy is whole"
        source = target
    # And back where it is installed.
    again = AgeVlmForConditionalGeneration.from_pretrained(source)
    assert torch.equal(again(**batch).logits, expected)


def test_checkpoint_code_is_flat_and_imports_only_what_a_checkpoint_may():
    code = checkpoint_code()
    assert set(code) == {
        file.name
        for folder in ("configuration", "modeling_agevlm", "processing")
        for file in folder_of(folder).glob("*_agevlm.py")
    }
    for source in code.values():
        assert "from .." not in source
        for line in source.splitlines():
            if line.strip().startswith(("import age_vlm", "from age_vlm")):
                raise AssertionError(line)
            if line.strip().startswith("from .") and " import " in line:
                assert line.split()[1].lstrip(".") + ".py" in code
    for target in AUTO_MAP.values():
        module, name = target.split(".")
        assert f"class {name}(" in code[f"{module}.py"]


def folder_of(name) -> Path:
    return Path(__import__(f"age_vlm.{name}", fromlist=["x"]).__file__).parent


def test_saving_over_a_checkpoint_refreshes_its_code(make_config, tmp_path):
    (tmp_path / "modeling_agevlm.py").write_text("old")
    make_config().save_pretrained(tmp_path)
    assert (tmp_path / "modeling_agevlm.py").read_text() == checkpoint_code()["modeling_agevlm.py"]
    assert not list(tmp_path.glob("*.tmp"))


def test_auto_classes_know_age_vlm(checkpoint):
    assert isinstance(AutoConfig.from_pretrained(checkpoint), age_vlm.AgeVlmConfig)
    assert isinstance(AutoModel.from_pretrained(checkpoint), AgeVlmModel)
    assert isinstance(AutoModelForImageTextToText.from_pretrained(checkpoint), AgeVlmForConditionalGeneration)
    assert isinstance(AutoProcessor.from_pretrained(checkpoint), AgeVlmProcessor)


def test_pipeline_answers(checkpoint, picture):
    ask = pipeline("image-text-to-text", model=str(checkpoint))
    messages = [
        {"role": "user", "content": [{"type": "image", "path": str(picture)}, {"type": "text", "text": "What?"}]}
    ]
    answers = ask(text=[messages, messages], max_new_tokens=3, return_full_text=False)
    assert len(answers) == 2 and answers[0] == answers[1]
    assert isinstance((answers[0][0] if isinstance(answers[0], list) else answers[0])["generated_text"], str)


# Weights


@pytest.mark.parametrize("model_class", [AgeVlmForConditionalGeneration, AgeVlmModel])
@torch.no_grad()
def test_shards_are_read_back(make_model, make_batch, tmp_path, model_class):
    model = make_model()
    model = model if model_class is AgeVlmForConditionalGeneration else model.model
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = make_batch((2, 0, 1))
    assert torch.equal(loaded(**batch)[0], model(**batch)[0])


def test_language_model_weights_keep_llama_s_names(checkpoint):
    names = set(load_file(checkpoint / "model.safetensors"))
    layer = "model.language_model.layers.1."
    assert {
        f"{layer}self_attn.q_proj.weight",
        f"{layer}mlp.up_proj.weight",
        f"{layer}cross_attention.attn.q_proj.weight",
    } <= names
    assert not any("model.language_model.layers.0.cross_attention" in name for name in names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_on_load(checkpoint, dtype, make_batch):
    model = AgeVlmForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype)
    assert model.dtype == dtype and model.lm_head.weight.dtype == dtype
    assert model(**make_batch((1, 0))).logits.isfinite().all()


def test_generation_settings_are_saved(checkpoint):
    saved = json.loads((checkpoint / "generation_config.json").read_text())
    assert saved["suppress_tokens"] == [2]
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    assert model.generation_config.suppress_tokens == [2]
    assert model.generation_config.eos_token_id == 5 and model.generation_config.bos_token_id == 0


# Uploads


@pytest.fixture
def uploads(monkeypatch, tmp_path):
    """The Hub's side of an upload: every commit's files, by repository. Only the network boundary is replaced."""
    recorded = {}

    def create_repo(self, repo_id, **kwargs):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            data = operation.path_or_fileobj
            content = (
                data
                if isinstance(data, bytes)
                else Path(data).read_bytes()
                if isinstance(data, (str, Path))
                else data.read()
            )
            recorded.setdefault(repo_id, {})[operation.path_in_repo] = content
        return huggingface_hub.CommitInfo(
            commit_url=f"https://huggingface.co/{repo_id}/commit/0", commit_message="", commit_description="", oid="0"
        )

    def create_branch(self, *args, **kwargs):
        pass

    for function in (create_repo, create_commit, create_branch):
        monkeypatch.setattr(huggingface_hub.HfApi, function.__name__, function)
        name = function.__name__
        for module in list(sys.modules.values()):
            bound = getattr(module, name, None) if getattr(module, "__name__", "").startswith("transformers") else None
            if getattr(bound, "__self__", None).__class__ is huggingface_hub.HfApi:
                monkeypatch.setattr(module, name, function.__get__(huggingface_hub.HfApi()))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return recorded


def written(files: dict, folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_pushed_model_and_processor_are_a_whole_checkpoint(make_model, processor, make_batch, uploads, tmp_path):
    model = make_model()
    model.push_to_hub("someone/model")
    processor.push_to_hub("someone/model")
    files = uploads["someone/model"]
    assert set(checkpoint_code()) <= set(files)
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    } <= set(files)
    assert (
        json.loads(files["config.json"])["auto_map"] | json.loads(files["processor_config.json"])["auto_map"]
        == AUTO_MAP
    )
    folder = written(files, tmp_path)
    batch = make_batch((1, 0))
    with torch.no_grad():
        assert torch.equal(AutoModelForImageTextToText.from_pretrained(folder)(**batch).logits, model(**batch).logits)
    assert AutoProcessor.from_pretrained(folder).chat_template == processor.chat_template


def test_saving_with_push_uploads_the_same(make_config, processor, make_model, uploads, tmp_path):
    for saved, name in 2 * ((make_model(), "model"), (processor, "processor"), (make_config(), "config")):
        uploads.clear()  # the second time, into a folder that has the code already
        saved.save_pretrained(tmp_path / name, push_to_hub=True, repo_id=f"someone/{name}")
        assert set(uploads[f"someone/{name}"]) == {file.name for file in (tmp_path / name).iterdir()}
        assert set(checkpoint_code()) <= set(uploads[f"someone/{name}"])
