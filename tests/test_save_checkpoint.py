import json
import logging
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    ViTConfig,
    ViTForImageClassification,
)

from age_vlm import AgeVlmForConditionalGeneration, AgeVlmModel, hub
from age_vlm.hub import load_checkpoint, save_adapter, save_checkpoint
from age_vlm.training.lora import lora_config


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_saved_checkpoint_is_whole_and_alone(make_model, processor, tmp_path):
    model = make_model()
    folder = save_checkpoint(model, processor, tmp_path / "deep" / "checkpoint", "# the card")
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]
    assert (folder / "README.md").read_text("utf-8") == "# the card"
    loaded, loaded_processor = load_checkpoint(folder)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert loaded_processor.chat_template == processor.chat_template


def test_a_checkpoint_replaces_the_one_before(make_model, processor, tmp_path):
    save_checkpoint(make_model(seed=1), processor, tmp_path / "checkpoint", "# first")
    first = content(tmp_path)
    (tmp_path / "checkpoint" / "stale.txt").write_text("of the first")
    save_checkpoint(make_model(seed=2), processor, tmp_path / "checkpoint")
    second = content(tmp_path)
    assert second["checkpoint/stale.txt"] == b"of the first" and "checkpoint/README.md" not in second
    assert first["checkpoint/model.safetensors"] != second["checkpoint/model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


FULL = textwrap.dedent(
    """
    import resource, sys
    from age_vlm.hub import load_checkpoint, save_checkpoint

    model, processor = load_checkpoint(sys.argv[1])
    for name in sys.argv[2:]:
        limit, name = name.split(":")
        # Any file that grows beyond this fails to be written, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
        try:
            save_checkpoint(model, processor, name)
        except ValueError as error:
            print("refused", error)
        else:
            print("saved")
    """
)


def test_no_space_left_leaves_the_checkpoint_before_byte_for_byte(make_model, processor, tmp_path):
    save_checkpoint(make_model(), processor, tmp_path / "checkpoint", "# before")
    before = content(tmp_path)
    sizes = sorted(len(data) for data in before.values())
    # The largest file, the weights, does not fit; then hardly any does.
    limits = [sizes[-1] - 1, 500]
    assert before["checkpoint/model.safetensors"] and len(before["checkpoint/model.safetensors"]) == sizes[-1]
    names = [f"{limit}:{tmp_path / name}" for limit in limits for name in ("checkpoint", "another")]
    command = [sys.executable, "-c", FULL, str(tmp_path / "checkpoint"), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # DeepSpeed, where it is installed, has a line of its own about what it runs on.
    lines = [
        line.removeprefix("refused ") for line in done.stdout.splitlines() if line.startswith(("refused", "saved"))
    ]
    assert len(lines) == 4
    for line, name in zip(lines, ("checkpoint", "another") * 2):
        assert line.startswith(f"checkpoint: '{tmp_path / name}' could not be written: ")
        assert line.endswith("is unchanged.") == (name == "checkpoint")
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


class Refused(type(Path())):
    """A folder whose move into place fails, as on a file system that went away."""

    def rename(self, target):
        raise self.error


@pytest.mark.parametrize("error", [OSError(5, "went away"), KeyboardInterrupt()])
def test_a_move_that_fails_puts_the_checkpoint_before_back(tmp_path, error):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "weights").write_bytes(b"before")
    new = Refused(tmp_path / "new")
    new.mkdir()
    new.error = error
    with pytest.raises(type(error)):
        hub._swap(new, folder)
    assert content(folder) == {"weights": b"before"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "new"]


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002])
def test_modes_are_those_of_any_file_and_folder(make_model, processor, tmp_path, umask):
    before = os.umask(umask)
    try:
        folder = save_checkpoint(make_model(), processor, tmp_path / "deep" / "checkpoint", "# the card")
        adapter = save_adapter(get_peft_model(make_model(), lora_config()), tmp_path / "adapter")
    finally:
        os.umask(before)
    for path in (folder.parent, folder, adapter):
        assert path.stat().st_mode & 0o777 == 0o777 & ~umask
    files = [*folder.iterdir(), *adapter.iterdir()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


def test_files_that_are_no_part_of_a_checkpoint_outlast_it(make_model, processor, tmp_path):
    folder = save_checkpoint(make_model(), processor, tmp_path / "checkpoint")
    kept = {
        ".git/config": b"a clone",
        ".env": b"KEY=1",
        "notes.txt": b"by hand",
        "notes/deep/more.txt": b"more",
        "mine.safetensors": b"other weights",
    }
    for name, text in kept.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    (folder / "link").symlink_to("nowhere")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"an earlier shard")
    (folder / ".env").chmod(0o600)
    for seed in (1, 2):
        save_checkpoint(make_model(seed=seed), processor, folder)
    assert {name: content(folder).get(name) for name in kept} == kept
    assert os.readlink(folder / "link") == "nowhere" and (folder / ".env").stat().st_mode & 0o777 == 0o600
    assert not (folder / "model-00001-of-00002.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_file_is_not_replaced_by_a_checkpoint(make_model, processor, tmp_path):
    (tmp_path / "thesis.pdf").write_bytes(b"years of work")
    with pytest.raises(ValueError, match="could not be written"):
        save_checkpoint(make_model(), processor, tmp_path / "thesis.pdf")
    assert content(tmp_path) == {"thesis.pdf": b"years of work"}


def test_what_a_killed_process_left_is_cleared_and_nothing_lost(tmp_path):
    folder, old = tmp_path / "checkpoint", tmp_path / ".checkpoint.old.abcd0123.part"
    others = [tmp_path / ".checkpoint.abc", tmp_path / ".checkpoint.old.part", tmp_path / ".git"]
    for path in (old, tmp_path / ".checkpoint.abcd0123.part", *others):
        path.mkdir()
        (path / "notes.txt").write_text(path.name)
    hub.recover_checkpoint(folder)
    assert (folder / "notes.txt").read_text() == old.name
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["checkpoint", *(path.name for path in others)])


def test_an_adapter_finds_its_base_and_does_not_say_where_it_lies(make_model, processor, tmp_path):
    base = save_checkpoint(make_model(), processor, tmp_path / "base")
    adapted = get_peft_model(load_checkpoint(base)[0], lora_config())
    adapter = save_checkpoint(adapted, processor, tmp_path / "deep" / "adapter")
    assert not [path for path in adapter.iterdir() if str(tmp_path).encode() in path.read_bytes()]
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "../../base"
    model, _ = load_checkpoint(adapter)
    assert torch.equal(model.state_dict()[GATE], make_model().state_dict()[GATE])
    # A base that has nothing but the root of the disk in common, and one of the Hub.
    for name, told in (("/proc", None), ("some/model", "some/model")):
        adapted.peft_config["default"].base_model_name_or_path = name
        settings = json.loads((save_adapter(adapted, tmp_path / "other") / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == told
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="it is an adapter that does not name its base model"):
        load_checkpoint(tmp_path / "other")


def test_a_place_that_cannot_be_written_is_one_sentence(make_model, processor, tmp_path):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(ValueError, match="^checkpoint: '.*' could not be written: .*[^.][.]$"):
        save_checkpoint(make_model(), processor, tmp_path / "file" / "checkpoint")


def test_other_models_and_broken_files_are_one_sentence(make_model, processor, tmp_path):
    model = make_model()
    LlamaForCausalLM(model.config.text_config).save_pretrained(tmp_path / "llama")
    broken = save_checkpoint(model, processor, tmp_path / "broken")
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    for name, words in (("llama", "it holds a model of type 'llama'"), ("broken", ""), ("none", "")):
        with pytest.raises(
            ValueError, match=f"^model: '.*{name}' could not be loaded as an AGE-VLM: .*{words}"
        ) as caught:
            load_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="unknown option"):
        load_checkpoint(tmp_path / "broken", cross_attention_layer=[1])


# Weights that do not fit


def change(folder, **weights):
    """Rewrites the weights of a checkpoint: `name=None` takes one out, with `__` for the dots of its name."""
    saved = load_file(folder / "model.safetensors")
    for name, value in weights.items():
        saved[name.replace("__", ".")] = value
    save_file({name: value for name, value in saved.items() if value is not None}, folder / "model.safetensors")


GATE = "model.language_model.layers.1.cross_attention.attn_gate.weight"
PATCHES = "model.vision_tower.timm_model.stem_0.weight"
EMBEDDINGS = "model.language_model.embed_tokens.weight"


@pytest.mark.parametrize("lacking", [[GATE], [PATCHES], [EMBEDDINGS], [GATE, PATCHES]])
def test_missing_weights_are_one_sentence_that_names_the_first(make_model, processor, tmp_path, lacking):
    folder = save_checkpoint(make_model(), processor, tmp_path / "checkpoint")
    change(folder, **dict.fromkeys(name.replace(".", "__") for name in lacking))
    for load in (AgeVlmForConditionalGeneration, AutoModelForImageTextToText, AgeVlmModel, AutoModel):
        with pytest.raises(
            ValueError, match=rf"^weights: '{folder}' lacks \d+ of AgeVlm\w+, first .*expected"
        ) as caught:
            load.from_pretrained(folder)
        assert "\n" not in str(caught.value)
        for name in lacking:
            assert name.removeprefix("model.") in str(caught.value)
    with pytest.raises(
        ValueError, match=rf"^model: '{folder}' could not be loaded .*: it lacks \d+ weights, first '\S+'"
    ):
        load_checkpoint(folder)
    # Who asks for the report has it instead, and the rest as it was saved.
    model, report = AgeVlmForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert set(lacking) <= set(report["missing_keys"]) <= {*lacking, "lm_head.weight"}
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], value)


def test_a_shard_that_is_not_there_is_one_sentence(make_model, processor, tmp_path):
    make_model().save_pretrained(tmp_path, max_shard_size="50KB")
    processor.save_pretrained(tmp_path)
    load_checkpoint(tmp_path)
    first, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    saved = load_file(first)
    gone = sorted(saved)[0]
    save_file({name: value for name, value in saved.items() if name != gone}, first)
    with pytest.raises(ValueError, match=f"it lacks 1 weights, first '{gone}'"):
        load_checkpoint(tmp_path)
    assert index["weight_map"].pop(gone) == first.name
    first.unlink()
    with pytest.raises(
        ValueError, match=f"^model: '{tmp_path}' could not be loaded as an AGE-VLM: .*{first.name}"
    ) as caught:
        load_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_head_alone_may_be_asked_for_beside_a_body(make_model, make_batch, tmp_path):
    untied = {"text": {"tie_word_embeddings": False}}
    whole, body = tmp_path / "whole", tmp_path / "body"
    model = make_model(**untied)
    model.save_pretrained(whole)
    model.model.save_pretrained(body)
    assert torch.equal(*(AgeVlmModel.from_pretrained(one)(**make_batch((1, 0)))[0] for one in (whole, body)))
    with pytest.raises(ValueError, match="lacks 1 of AgeVlmForConditionalGeneration, first lm_head.weight;"):
        AgeVlmForConditionalGeneration.from_pretrained(body)
    _, report = AgeVlmForConditionalGeneration.from_pretrained(body, output_loading_info=True)
    assert report["missing_keys"] == {"lm_head.weight"}
    # Tied, the head is the embeddings, which the body has.
    make_model().model.save_pretrained(body)
    AgeVlmForConditionalGeneration.from_pretrained(body)


def test_weights_of_the_caller_s_own_may_be_few(model):
    fresh = AgeVlmForConditionalGeneration.from_pretrained(None, config=model.config, state_dict={})
    assert not any(parameter.is_meta for parameter in fresh.parameters())


def test_weights_that_have_no_place_warn(make_model, processor, make_batch, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = make_model()
    folder = save_checkpoint(model, processor, tmp_path / "checkpoint")
    AgeVlmForConditionalGeneration.from_pretrained(folder)
    assert not caplog.text
    change(folder, model__language_model__layers__0__cross_attention__attn_gate__weight=torch.ones(1))
    loaded = AgeVlmForConditionalGeneration.from_pretrained(folder)
    assert "layers.0.cross_attention.attn_gate.weight" in caplog.text and "UNEXPECTED" in caplog.text
    assert torch.equal(loaded(**make_batch((1, 0))).logits, model(**make_batch((1, 0))).logits)


def test_weights_of_another_shape_are_one_sentence(make_model, processor, tmp_path):
    folder = save_checkpoint(make_model(), processor, tmp_path / "checkpoint")
    change(folder, **{GATE.replace(".", "__"): torch.ones(2)})
    with pytest.raises(ValueError, match=rf"AGE-VLM: its '{GATE}' has shape \(2,\), expected \(1,\)\.$"):
        load_checkpoint(folder)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # as for any model of transformers
        AgeVlmForConditionalGeneration.from_pretrained(folder)
    model = AgeVlmForConditionalGeneration.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert model.state_dict()[GATE].shape == (1,)


def test_blocks_that_the_checkpoint_has_not_are_not_made_up(make_model, processor, tmp_path):
    folder = save_checkpoint(make_model(), processor, tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"it lacks 13 weights, first 'model.language_model.layers.2.cross_attention"):
        load_checkpoint(folder, cross_attention_layers=[1, 2, 3])


def test_parts_that_lack_weights_build_nothing(tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=300)).save_pretrained(tmp_path / "text")
    vision = SiglipVisionConfig(**shape, image_size=64, patch_size=16).to_dict()
    SiglipModel(SiglipConfig(text_config={**shape, "vocab_size": 99}, vision_config=vision)).save_pretrained(
        tmp_path / "siglip"
    )
    ViTForImageClassification(ViTConfig(**shape, image_size=64, patch_size=16)).save_pretrained(tmp_path / "vit")
    for encoder, names in (("siglip", r"vision_model.*layers.1.mlp.fc1.weight$"), ("vit", r"layer.*\.1\..*weight$")):
        # The classifier has no pooler, whose output nothing reads.
        AgeVlmForConditionalGeneration.from_backbones(tmp_path / "text", tmp_path / encoder, image_token_id=2)
        for part, pattern in ((encoder, names), ("text", "layers.1.mlp.up_proj.weight$")):
            whole = (tmp_path / part / "model.safetensors").read_bytes()
            gone = next(name for name in load_file(tmp_path / part / "model.safetensors") if re.search(pattern, name))
            change(tmp_path / part, **{gone.replace(".", "__"): None})
            with pytest.raises(ValueError, match=r"^text, vision: 1 weights are not in .*layers\.1\.\S+'\.$"):
                AgeVlmForConditionalGeneration.from_backbones(tmp_path / "text", tmp_path / encoder, image_token_id=2)
            (tmp_path / part / "model.safetensors").write_bytes(whole)
