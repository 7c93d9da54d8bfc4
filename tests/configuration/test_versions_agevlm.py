"""The tested range of transformers: one place says it, and whoever loads a checkpoint outside of it is told."""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from packaging.requirements import Requirement
from packaging.version import Version

from age_vlm import AgeVlmConfig
from age_vlm.configuration import versions_agevlm
from age_vlm.configuration.versions_agevlm import TESTED_TRANSFORMERS, supported_range, untested_release


FIRST, BEYOND = TESTED_TRANSFORMERS
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("release", [FIRST, f"{FIRST}.post1"])
def test_a_tested_release_is_silent(release):
    assert untested_release(release) is None


@pytest.mark.parametrize("release", ["4.57.6", "5.23.0", BEYOND, f"{BEYOND}.0", f"{BEYOND}.0.dev0", "5.40.0", "6.0.0"])
def test_any_other_release_is_named_in_one_sentence(release):
    sentence = untested_release(release)
    assert sentence.startswith(f"transformers: got {release}, expected {supported_range()}") and "\n" not in sentence


def test_upper_bound_is_the_next_minor_release():
    first, beyond = Version(FIRST), Version(BEYOND)
    assert (first.major, len(beyond.release)) == (beyond.major, 2) and beyond > first


def test_setup_allows_what_was_tested_and_nothing_else():
    required = {Requirement(line).name: Requirement(line) for line in importlib.metadata.requires("age-vlm")}
    assert required["transformers"].specifier == Requirement(f"transformers{supported_range()}").specifier


def test_every_session_of_nox_but_next_stays_inside():
    sessions = (ROOT / "noxfile.py").read_text()
    assert "versions_agevlm.py" in sessions, "nox reads the range where it stands"
    assert not re.search(r"transformers[=<>]=?\d", sessions)


def test_a_checkpoint_records_the_range(make_config, tmp_path):
    make_config().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tested_transformers"] == supported_range()
    assert "tested_transformers" not in vars(AgeVlmConfig.from_pretrained(tmp_path)), (
        "that of the code which loads counts"
    )


def test_making_a_configuration_warns_outside_of_the_range(make_config, monkeypatch):
    said = []
    monkeypatch.setattr(versions_agevlm.logger, "warning_once", said.append)
    make_config()
    assert not said
    monkeypatch.setattr(versions_agevlm, "TESTED_TRANSFORMERS", ("5.1.0", "5.2"))
    make_config()
    assert said[0].startswith(f"transformers: got {transformers.__version__}, expected >=5.1.0,<5.2, ")


# In a process that finds no age-vlm, and takes the installed transformers for another release.
LOAD_ELSEWHERE = """
import sys
sys.modules["age_vlm"] = None
import transformers
transformers.__version__ = "5.99.0"
from transformers import AutoConfig
AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
"""


def test_the_code_of_a_checkpoint_says_so_where_age_vlm_is_not_installed(make_config, tmp_path):
    make_config().save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", LOAD_ELSEWHERE, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"transformers: got 5.99.0, expected {supported_range()}, ") == 1
