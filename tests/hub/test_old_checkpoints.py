"""Checkpoints of earlier versions load, in this version and by their own code."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import age_vlm
from age_vlm import AgeVlmForConditionalGeneration, AgeVlmProcessor


FIXTURES = Path(__file__).parents[1] / "fixtures"
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
def test_an_old_checkpoint_loads_by_its_own_code(old, tmp_path, python):
    python(LOAD_OLD, old, tmp_path / "got.pt", home=tmp_path)
    assert_as_it_was(old, torch.load(tmp_path / "got.pt"))


@OLD
def test_an_old_checkpoint_is_small(old):
    assert sum(file.stat().st_size for file in old.iterdir()) <= 350_000
