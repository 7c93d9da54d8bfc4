"""age-vlm: the package's metadata, and the three top-level folders that travel inside every checkpoint."""

import re
from pathlib import Path

from setuptools import find_packages, setup


HERE = Path(__file__).parent
CHECKPOINT_CODE = {
    "age_vlm.configuration": "configuration",
    "age_vlm.modeling_agevlm": "modeling_agevlm",
    "age_vlm.processing": "processing",
}

# The range of transformers stands where a checkpoint takes it along. Read, not imported: a build has no transformers.
TESTED = (HERE / "configuration" / "versions_agevlm.py").read_text("utf-8")
FIRST, BEYOND = re.search(r'^TESTED_TRANSFORMERS = \("(.+)", "(.+)"\)$', TESTED, re.MULTILINE).groups()

# Upper bounds stand where a new major release may break what is used here, lower ones at the oldest release with it.
INSTALL_REQUIRES = [
    "torch>=2.6,<3",  # first release whose SDPA and flex attention transformers 5 relies on
    "torchvision>=0.21,<1",  # goes with torch 2.6; timm and the image processors need it
    # From the release that calls the cache `cache`, to the next minor release: each may break a model outside of it.
    f"transformers>={FIRST},<{BEYOND}",
    "timm>=1.0.21,<2",  # first release whose ConvNeXt can be built on the meta device
    "datasets>=4.0,<6",  # `List` features
    "accelerate>=1.10,<2",  # required by transformers.Trainer 5
    "safetensors>=0.8,<1",  # sharded, atomic weight files; required by transformers 5.24
    "huggingface-hub>=1.31,<3",  # required by transformers 5.24
    "peft>=0.20,<1",  # LoRA; first release whose AutoPeftModel takes `import_allowlist`, for classes outside transformers
    "pillow>=10.1,<15",  # ImageOps.exif_transpose(in_place) and modern resampling names
    "pycocotools>=2.0.8,<3",  # wheels for NumPy 2
    "torchmetrics>=1.5,<2",  # AUROC as the field computes it
    "jinja2>=3.1.6,<4",  # chat templates and the report; required by transformers 5.24
    "matplotlib>=3.8,<4",  # curves and colour maps
    "rich>=13,<16",  # tables on the terminal
    "pyyaml>=6,<7",  # recipes
    "numpy>=2,<3",  # masks and drawing; pyarrow's wheels, which datasets needs, are for NumPy 2
    "tokenizers>=0.23.1,<1",  # the word-level tokenizer of models from scratch; required by transformers 5.24
    "inflect>=7.3,<8",  # English plurals in generated texts
    "ijson>=3.3,<4",  # annotation files that are larger than memory
    "tqdm>=4.66,<5",  # progress bars
    "packaging>=24.2,<27",  # versions and ranges; has the licenses that setuptools asks for, with which torch compiles
]

EXTRAS_REQUIRE = {
    # the `sam2` package of Meta builds from source against the installed torch
    "sam2": ["sam2>=1.1"],
    # ZeRO-2 and ZeRO-3; builds from source, too; older releases have not been tried
    "deepspeed": ["deepspeed>=0.19,<1"],
    # hqq quantises caches on a CPU, where optimum-quanto first compiles C++ for over a minute
    # xdist for a test process on each core; tensorboard to read back what was logged; torch 2.6 compiles flex attention
    # with setuptools
    "test": [
        "pytest>=8",
        "hypothesis>=6.100",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6,<4",
        "hqq>=0.2.8,<1",
        "minijinja>=2.5,<3",
        "gguf>=0.10",
        "tensorboard>=2.18,<3",
        "setuptools>=77",
    ],
    "dev": ["ruff>=0.14,<1", "import-linter>=2.5,<3", "pre-commit>=4", "build>=1.2", "nox[uv]>=2025.2"],
}
EXTRAS_REQUIRE["dev"] += EXTRAS_REQUIRE["test"]

setup(
    name="age-vlm",
    version="0.1.0",
    description="AGE-VLM for the Hugging Face stack: a small vision-language model whose cross-attention is aligned with masks",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    package_dir={"": "src", **CHECKPOINT_CODE},
    packages=[*find_packages("src"), *CHECKPOINT_CODE],
    package_data={"age_vlm": ["**/*.jinja", "**/*.yaml"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["age-vlm = age_vlm.cli:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
