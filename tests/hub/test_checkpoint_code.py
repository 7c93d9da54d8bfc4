"""Checkpoints carry their own code: they load where age-vlm is not installed."""

from pathlib import Path

import torch
from PIL import Image
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


@torch.no_grad()
def test_loads_and_saves_where_age_vlm_is_not_installed(checkpoint, image, tmp_path, python):
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
