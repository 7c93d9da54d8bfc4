"""The published weights. Not part of a plain run: `pytest -m hub tests/grounding/test_hub.py`, with a connection."""

import urllib.request

import huggingface_hub
import numpy as np
import pytest

from age_vlm.data.scenes import draw_scene
from age_vlm.grounding import Prompt, load_teacher


pytestmark = pytest.mark.hub


@pytest.fixture(scope="module")
def _reachable():
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=5).close()
    except OSError as error:
        pytest.skip(f"the Hub cannot be reached: {error}")


@pytest.fixture(autouse=True)
def _online(_reachable, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture(scope="module")
def scenes():
    drawn = [draw_scene("test", number) for number in range(4)]
    # At the size of a photograph: the models were trained on such.
    images = [scene.image.resize((512, 512)) for scene in drawn]
    masks = [[np.kron(item.mask, np.ones((8, 8), bool)) for item in scene.objects] for scene in drawn]
    return drawn, images, masks


def overlaps(answers, masks):
    pairs = [(answer.union(0.5)[0], mask) for own, others in zip(answers, masks) for answer, mask in zip(own, others)]
    return [(found & mask).sum() / (found | mask).sum() for found, mask in pairs]


def boxes(masks):
    asked = []
    for mask in masks:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        asked.append(Prompt("a", (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)))
    return asked


def test_sam2_finds_drawn_things_in_their_boxes(scenes):
    _, images, masks = scenes
    teacher = load_teacher("sam2-transformers", "tiny", device="cpu")
    found = teacher.ground(images, [boxes(own) for own in masks])
    assert np.mean(overlaps(found, masks)) > 0.8


def test_both_sam2_agree(scenes):
    pytest.importorskip("sam2", reason="needs age-vlm[sam2]")
    _, images, masks = scenes
    asked = [[*boxes(own), Prompt("b", points=((256, 256),))] for own in masks]
    one, other = (
        load_teacher(name, "tiny", device="cpu").ground(images, asked) for name in ("sam2", "sam2-transformers")
    )
    agreement = overlaps(one, [[answer.union()[0] for answer in own] for own in other])
    assert np.mean(agreement) > 0.95


def test_sam3_finds_drawn_things_by_their_names(scenes):
    drawn, images, masks = scenes
    try:
        huggingface_hub.auth_check("facebook/sam3")
    except huggingface_hub.errors.GatedRepoError:
        pytest.skip("the terms of facebook/sam3 are not accepted")
    teacher = load_teacher("sam3", device="cpu")
    found = teacher.ground(images, [[Prompt(" ".join(item.kind)) for item in scene.objects] for scene in drawn])
    assert np.mean(overlaps(found, masks)) > 0.7
