"""Checkpoints go to the Hub whole."""

import json
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from age_vlm.configuration.checkpoint_code_agevlm import AUTO_MAP, checkpoint_code
from age_vlm.hub import push_checkpoint, save_checkpoint


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
