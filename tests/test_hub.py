"""Checkpoints carry their own code: they load where age-vlm is not installed, and go to the Hub whole."""

import json
import logging
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
from age_vlm.hub import push_checkpoint, save_checkpoint


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
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "image.png"
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
def test_loads_and_saves_where_age_vlm_is_not_installed(checkpoint, image, tmp_path):
    model, processor = (
        AgeVlmForConditionalGeneration.from_pretrained(checkpoint),
        AgeVlmProcessor.from_pretrained(checkpoint),
    )
    batch = processor(images=Image.open(image), text=TEXT, return_tensors="pt")
    expected = model(**batch).logits
    source = checkpoint
    for generation in ("first", "second"):
        target = tmp_path / generation
        home = tmp_path / f"modules_{generation}"
        home.mkdir()
        python(LOAD_AND_SAVE_AGAIN, source, target, image, home=home)
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


def test_pipeline_answers(checkpoint, image):
    ask = pipeline("image-text-to-text", model=str(checkpoint))
    messages = [{"role": "user", "content": [{"type": "image", "path": str(image)}, {"type": "text", "text": "What?"}]}]
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
@torch.no_grad()
def test_dtype_on_load(checkpoint, dtype, make_batch):
    batch = make_batch((1, 0))
    model = AgeVlmForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype)
    assert model.dtype == dtype and model.lm_head.weight.dtype == dtype
    whole = AgeVlmForConditionalGeneration.from_pretrained(checkpoint)
    logits, expected = model(**batch).logits, whole(**batch).logits
    assert logits.dtype == dtype and expected.dtype == torch.float32
    torch.testing.assert_close(logits.float(), expected, atol=0.1 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_dtype_of_the_file_is_kept_where_none_is_named(make_model, make_batch, tmp_path, dtype):
    make_model(dtype=dtype).save_pretrained(tmp_path)
    models = [
        AgeVlmForConditionalGeneration.from_pretrained(tmp_path, **options)
        for options in ({}, {"dtype": "auto"}, {"dtype": dtype})
    ]
    for model in models:
        gates = {
            name: parameter.dtype
            for name, parameter in model.named_parameters()
            if "_gate." in name and "cross" in name
        }
        gates = {name: kind for name, kind in gates.items() if "mlp.gate" not in name}
        assert set(gates.values()) == {torch.float32}
        assert {p.dtype for name, p in model.named_parameters() if name not in gates} == {dtype}
        assert torch.equal(model(**make_batch((1, 0))).logits, models[0](**make_batch((1, 0))).logits)


def test_generation_settings_are_saved(checkpoint):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    assert model.generation_config.eos_token_id == 5 and model.generation_config.bos_token_id == 0


# Uploads


class Uploads(dict):
    """Repository -> file -> content; `commits` has repository and branch of each commit."""


@pytest.fixture
def uploads(monkeypatch, tmp_path):
    """The Hub's side of an upload: every commit's files, by repository. Only the network boundary is replaced."""
    recorded, commits = Uploads(), []
    recorded.commits = commits

    def create_repo(self, repo_id, **kwargs):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            if isinstance(operation, huggingface_hub.CommitOperationDelete):
                del recorded[repo_id][operation.path_in_repo]
                continue
            data = operation.path_or_fileobj
            content = (
                data
                if isinstance(data, bytes)
                else Path(data).read_bytes()
                if isinstance(data, (str, Path))
                else data.read()
            )
            recorded.setdefault(repo_id, {})[operation.path_in_repo] = content
        commits.append((repo_id, kwargs.get("revision")))
        return huggingface_hub.CommitInfo(
            commit_url=f"https://huggingface.co/{repo_id}/commit/0", commit_message="", commit_description="", oid="0"
        )

    def create_branch(self, repo_id, *, branch, **kwargs):
        commits.append(("new branch", branch))

    def list_repo_files(self, repo_id, **kwargs):
        return list(recorded.get(repo_id, ()))

    for function in (create_repo, create_commit, create_branch, list_repo_files):
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
    model = make_model()
    for saved, name in 2 * ((model, "model"), (processor, "processor"), (make_config(), "config")):
        uploads.clear()  # the second time, into a folder that has the code already
        saved.save_pretrained(tmp_path / name, push_to_hub=True, repo_id=f"someone/{name}")
        card = {"README.md"} if saved is not model else set()  # as `push_to_hub` of a processor or configuration adds
        assert set(uploads[f"someone/{name}"]) == {file.name for file in (tmp_path / name).iterdir()} | card
        assert set(checkpoint_code()) <= set(uploads[f"someone/{name}"])


def test_a_pushed_checkpoint_is_one_commit_with_a_card(make_model, processor, make_batch, image, uploads, tmp_path):
    model = make_model()
    push_checkpoint(model, processor, "someone/model")
    assert uploads.commits == [("someone/model", None)]
    files = uploads["someone/model"]
    save_checkpoint(model, processor, tmp_path / "saved", "a card")
    assert set(files) == {file.name for file in (tmp_path / "saved").iterdir()}
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    assert card.data.pipeline_tag == "image-text-to-text" and card.data.library_name == "transformers"
    assert 'model="someone/model", trust_remote_code=True' in card.text and "THIS/REPOSITORY" not in card.text
    folder = written(files, tmp_path / "downloaded")
    with torch.no_grad():
        batch = make_batch((1, 0))
        assert torch.equal(AutoModelForImageTextToText.from_pretrained(folder)(**batch).logits, model(**batch).logits)
    # The card that a training run wrote, and weights in other files than those of last time.
    model.config.alignment = {"form": "nll"}
    push_checkpoint(model, processor, "someone/model", "see THIS/REPOSITORY", revision="next")
    assert uploads.commits[1:] == [("new branch", "next"), ("someone/model", "next")]
    assert uploads["someone/model"]["README.md"] == b"see someone/model"
    assert json.loads(uploads["someone/model"]["config.json"])["alignment"] == {"form": "nll"}


def test_weights_of_an_earlier_upload_do_not_stay(make_model, processor, uploads):
    model = make_model()
    uploads["someone/model"] = {
        "model-00001-of-00002.safetensors": b"",
        "model-00002-of-00002.safetensors": b"",
        "model.safetensors.index.json": b"",
        "notes.md": b"mine",
    }
    push_checkpoint(model, processor, "someone/model")
    weights = [name for name in uploads["someone/model"] if "safetensors" in name]
    assert weights == ["model.safetensors"] and uploads["someone/model"]["notes.md"] == b"mine"


# Revisions


@pytest.fixture(scope="module")
def revisions(make_model, processor, tmp_path_factory):
    """A Hub repository with two commits, as far as it was downloaded: the cache folder, and the models."""
    cache = tmp_path_factory.mktemp("hub")
    repository = cache / "models--someone--model"
    models = {"main": make_model(seed=1), "v0": make_model(seed=2, image_visibility="all_previous")}
    for number, (revision, model) in enumerate(models.items()):
        commit = f"{number + 1:040x}"
        save_checkpoint(model, processor, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        models[revision] = (commit, model)
    return cache, models


@pytest.mark.parametrize("revision", ["main", "v0"])
@torch.no_grad()
def test_a_revision_is_loaded_whole(revisions, make_batch, revision):
    cache, models = revisions
    commit, model = models[revision]
    batch = make_batch((2, 0))
    names = [{"revision": revision}, {"revision": commit}, *([{}] if revision == "main" else [])]
    for name in names:
        loaded = AutoModelForImageTextToText.from_pretrained("someone/model", cache_dir=cache, **name)
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
        assert loaded.config.image_visibility == model.config.image_visibility
        config = AutoConfig.from_pretrained("someone/model", cache_dir=cache, **name)
        assert config.image_visibility == model.config.image_visibility
        AutoProcessor.from_pretrained("someone/model", cache_dir=cache, **name)
    with pytest.raises(OSError, match="find them in the cached files"):
        AutoModelForImageTextToText.from_pretrained("someone/model", cache_dir=cache, revision="v9")


# Old checkpoints


FIXTURES = Path(__file__).parent / "fixtures"
OLD = pytest.mark.parametrize("old", sorted(FIXTURES.glob("age-vlm-*")), ids=lambda folder: folder.name)

# As `assert_as_it_was` below, in a process that finds transformers and not age-vlm.
LOAD_OLD = """
import json, sys
sys.modules["age_vlm"] = None
folder = sys.argv[1]

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

stored = load_file(f"{folder}/expected.safetensors")
messages = json.load(open(f"{folder}/expected.json"))["messages"]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
assert type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__ == "AgeVlmConfig"
text = processor.apply_chat_template(messages, add_generation_prompt=True)
batch = processor(images=[list(stored["picture"].permute(0, 3, 1, 2))], text=[text], return_tensors="pt")
with torch.no_grad():
    logits = model(stored["input_ids"], stored["pixel_values"]).logits
    answer = model.generate(**batch, do_sample=False, max_new_tokens=stored["answer"].shape[1])
torch.save({**batch, "logits": logits, "answer": answer[:, batch["input_ids"].shape[1]:]}, sys.argv[2])
"""


def assert_as_it_was(folder, got):
    stored = load_file(folder / "expected.safetensors")
    assert torch.equal(got["input_ids"], stored["input_ids"])
    assert torch.equal(got["answer"], stored["answer"])
    # Resizing differs by less than a grey level from one version of the libraries to another.
    torch.testing.assert_close(got["pixel_values"], stored["pixel_values"], atol=0.02, rtol=0)
    torch.testing.assert_close(got["logits"], stored["logits"], atol=1e-3, rtol=1e-4)


@OLD
def test_an_old_checkpoint_loads_in_this_version(old, caplog, monkeypatch):
    for name in ("transformers", "age_vlm"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    stored = load_file(old / "expected.safetensors")
    config, model = AutoConfig.from_pretrained(old), AutoModelForImageTextToText.from_pretrained(old)
    processor = AutoProcessor.from_pretrained(old)
    assert isinstance(config, age_vlm.AgeVlmConfig)
    assert isinstance(model, AgeVlmForConditionalGeneration) and isinstance(processor, AgeVlmProcessor)
    assert not caplog.text, "no weight and no key that this version does not know"
    # As JSON, whose keys are strings.
    saved, loaded = json.loads((old / "config.json").read_text()), json.loads(json.dumps(config.to_dict()))
    del saved["transformers_version"]
    for part in ("text_config", "vision_config"):
        values = saved.pop(part)
        assert {key: loaded[part].get(key) for key in values} == values
    assert {key: loaded.get(key) for key in saved} == saved

    text = processor.apply_chat_template(
        json.loads((old / "expected.json").read_text())["messages"], add_generation_prompt=True
    )
    batch = processor(images=[list(stored["picture"].permute(0, 3, 1, 2))], text=[text], return_tensors="pt")
    with torch.no_grad():
        logits = model(stored["input_ids"], stored["pixel_values"]).logits
        answer = model.generate(**batch, do_sample=False, max_new_tokens=stored["answer"].shape[1])
    assert_as_it_was(old, {**batch, "logits": logits, "answer": answer[:, batch["input_ids"].shape[1] :]})


@OLD
def test_an_old_checkpoint_loads_by_its_own_code(old, tmp_path):
    python(LOAD_OLD, old, tmp_path / "got.pt", home=tmp_path)
    assert_as_it_was(old, torch.load(tmp_path / "got.pt"))


@OLD
def test_an_old_checkpoint_is_small(old):
    assert sum(file.stat().st_size for file in old.iterdir()) <= 350_000
