"""The fine-tuning example, a few steps long, on scenes and on label maps; its errors; what it leaves behind."""

import importlib.util
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftConfig, PeftModel
from PIL import Image
from safetensors.torch import load_file

from age_vlm import AgeVlmForConditionalGeneration, AgeVlmProcessor
from age_vlm.commands.ask import bundled_checkpoint
from age_vlm.hub import load_checkpoint


SCRIPT = Path(__file__).parents[2] / "examples" / "lora_finetune.py"
SHORT = ["--steps", "2", "--batch-size", "2", "--validation", "3"]
ROWS = ["yes/no accuracy", "yes/no AUC", "attention mass in the mask", "pointing accuracy"]


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("lora_finetune", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def label_maps(tmp_path_factory) -> list[str]:
    """Options that name images of two kinds of stripes on a plain ground, either of which may be missing."""
    folder, rng = tmp_path_factory.mktemp("label maps"), np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir()
    colours = np.array([[90, 90, 90], [200, 40, 40], [40, 40, 200], [0, 0, 0]], np.uint8)
    for number in range(10):
        labels = np.zeros((36, 48), np.uint8)
        for index in (1, 2):
            if rng.random() < 0.7:
                left = rng.integers(40)
                labels[:, left : left + 8] = index
        labels[0] = 3
        Image.fromarray(labels).save(folder / "labels" / f"{number}.png")
        Image.fromarray(colours[labels]).save(folder / "images" / f"{number}.jpg")
    return [
        *("--images", str(folder / "images"), "--labels", str(folder / "labels")),
        *("--classes", "ground", "zebra stripe", "square", "--ignore", "3"),
    ]


def table(text: str) -> dict[str, list[str]]:
    lines = [re.split(r"\s*[│┃|]\s*", line.strip().strip("│┃|").strip()) for line in text.splitlines()]
    return {name: values for name, *values in lines if name in ROWS}


def loaded(folder: Path):
    """As the card says."""
    processor = AgeVlmProcessor.from_pretrained(folder)
    model = AgeVlmForConditionalGeneration.from_pretrained(bundled_checkpoint())
    before = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(len(processor.tokenizer))
    return PeftModel.from_pretrained(model, folder).eval(), processor, before


@pytest.mark.parametrize("kind", ["scenes", "label maps"])
def test_it_prints_the_metrics_and_saves_the_adapter(main, label_maps, kind, tmp_path, capsys):
    output = tmp_path / "adapter"
    options = (
        ["--target", "both", "--rank", "3"]
        if kind == "scenes"
        else ["--target", "cross_attention", "--dora", *label_maps]
    )
    base = shutil.copytree(bundled_checkpoint(), tmp_path / "base")
    assert main([*SHORT, *options, "--model", str(base), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    metrics = table(printed)
    assert list(metrics) == ROWS and all(len(values) == 4 for values in metrics.values())
    for before, after, blank, chance in metrics.values():
        assert all(value == "-" or 0 <= float(value) <= 1 for value in (before, after, blank, chance))
    card = (output / "README.md").read_text("utf-8")
    assert table(card) == metrics
    model, processor, known = loaded(output)
    trained = int(re.search(r"Parameters trained: ([\d,]+) of", printed)[1].replace(",", ""))
    assert f"{trained:,}" in card
    saved = load_file(output / "adapter_model.safetensors")
    assert trained == sum(value.numel() for value in saved.values())
    new = processor.tokenizer.convert_ids_to_tokens(range(known, len(processor.tokenizer)))
    assert new == ([] if kind == "scenes" else ["ground", "zebra", "stripe"])
    assert [len(rows) for name, rows in saved.items() if "embed_tokens" in name] == ([len(new)] if new else [])
    for text in (printed, card):
        assert ("ground, zebra, stripe." in text) == bool(new)
    asked = "is there a zebra stripe in the picture? a carpet of stripes" if new else "is there a red circle?"
    ids = processor.tokenizer(asked, add_special_tokens=False)["input_ids"]
    unknown = [asked.split().index(word) for word in ("carpet", "stripes") if word in asked]
    assert ids.count(processor.tokenizer.unk_token_id) == len(unknown), "whole words only"
    config = PeftConfig.from_pretrained(output)
    assert (config.r, config.use_dora) == ((3, False) if kind == "scenes" else (8, True))
    assert config.base_model_name_or_path == "../base", "by its path from the adapter"
    assert not [path for path in output.iterdir() if str(tmp_path).encode() in path.read_bytes()]
    # The one sentence that loads any checkpoint loads the adapter too.
    merged, again = load_checkpoint(output)
    assert again.tokenizer(asked)["input_ids"] == processor.tokenizer(asked)["input_ids"]
    inputs = {"input_ids": torch.tensor([[processor.image_token_id, *ids]]), "pixel_values": torch.rand(1, 3, 64, 64)}
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, model(**inputs).logits, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--rank", "0"], "--rank: got 0, expected at least 1."),
        (["--steps", "-3"], "--steps: got -3, expected at least 1."),
        (["--learning-rate", "nan"], "--learning-rate: got nan, expected more than 0."),
        (["--images", "x"], "--images, --labels, --classes: got --images, expected all three or none."),
        (
            ["--images", "none", "--labels", "none", "--classes", "a"],
            "images: got 'none', expected a folder",
        ),
        (["--model", "none/there"], "--model: 'none/there' could not be loaded as an AGE-VLM: "),
        (["--seed", "-1"], "--seed: got -1, expected at least 0."),
    ],
)
def test_bad_options_are_one_sentence(main, options, sentence, tmp_path, capsys):
    assert main([*options, "--output", str(tmp_path / "adapter")]) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith(f"lora_finetune: {sentence}") and captured.out == ""
    assert not list(tmp_path.iterdir())


def test_label_maps_of_one_class_are_one_sentence(main, label_maps, tmp_path, capsys):
    options = [*label_maps[:4], "--classes", "ground", "--ignore", "1", "2", "3"]
    assert main([*SHORT, *options, "--output", str(tmp_path / "adapter")]) == 2
    assert "lora_finetune: validation images: got none that shows one thing and" in capsys.readouterr().err


def test_what_is_there_is_replaced_only_when_asked_and_only_an_adapter(main, tmp_path, capsys):
    output = tmp_path / "adapter"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    for options, words in (
        ([], "exists, expected a new folder"),
        (["--overwrite"], "holds no adapter, and is not replaced"),
    ):
        assert main([*SHORT, *options, "--output", str(output)]) == 2
        assert words in capsys.readouterr().err
        assert [path.name for path in output.iterdir()] == ["thesis.txt"]
    (output / "adapter_config.json").write_text("{}")
    assert main([*SHORT, "--overwrite", "--output", str(output)]) == 0
    assert (output / "thesis.txt").read_text() == "years of work" and (output / "adapter_model.safetensors").is_file()
