"""A checkpoint, and processes that read one without age-vlm."""

import os
import subprocess
import sys
import textwrap

import pytest
from PIL import Image


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


def _python(code, *arguments, home):
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


@pytest.fixture(scope="session")
def python():
    """Runs code in another process, whose home is a folder."""
    return _python
