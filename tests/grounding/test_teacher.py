import re
import shutil
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file

from age_vlm.grounding import TEACHERS, VARIANTS, Masks, Prompt, load_teacher
from age_vlm.grounding.teacher import VisualTeacher, _alike, _refusal, weights_digest


def test_every_name_has_its_class():
    assert set(VARIANTS) == set(TEACHERS)
    for name in TEACHERS:
        if name == "sam2":
            pytest.importorskip("sam2", reason="needs age-vlm[sam2]")
        module, _, class_name = TEACHERS[name].partition(":")
        assert getattr(import_module(f"age_vlm.grounding.{module}"), class_name).name == name


def test_labels_of_points():
    assert Prompt("a", points=((1, 2), (3, 4))).labels == (1, 1)
    for labels in ((1,), (1, 2)):
        with pytest.raises(ValueError, match="labels: got"):
            Prompt("a", points=((1, 2), (3, 4)), labels=labels)


def test_union_of_masks():
    masks = np.zeros((3, 2, 2), bool)
    masks[0, 0, 0] = masks[1, 0, 1] = masks[2, 1, 1] = True
    found = Masks(masks, np.array([0.4, 0.9, np.nan], np.float32))
    mask, score = found.union(0.3)
    assert mask.tolist() == [[True, True], [False, False]] and score == pytest.approx(0.9)
    assert found.union(0.95)[0].tolist() == [[False, True], [False, False]]
    assert Masks(masks[:0], np.zeros(0, np.float32)).union() is None


def test_prompts_go_together_only_where_none_is_padded():
    box = (0, 0, 1, 1)
    asked = [
        Prompt("a", box),
        Prompt("b", box, ((1, 1),)),
        Prompt("c", box),
        Prompt("d", points=((1, 1),)),
        Prompt("e", box),
    ]
    assert list(_alike(asked, 2)) == [[0, 2], [4], [1], [3]]


def test_images_without_prompts_are_not_encoded(sam2_teacher, images, encoded):
    sizes = encoded(sam2_teacher.model.vision_encoder)
    answers = sam2_teacher.ground(images, [[], [Prompt("a", (1, 1, 9, 9))], []])
    assert [len(own) for own in answers] == [0, 1, 0] and sizes == [1]
    assert sam2_teacher.ground(images, [[], [], []]) == [[], [], []] and sizes == [1]


def test_masks_are_of_the_upright_image(sam2_teacher):
    turned = Image.new("RGB", (24, 40), "red")
    turned.getexif()[0x0112] = 6
    asked = [[Prompt("a", (2, 2, 20, 30))]]
    ((found,),) = sam2_teacher.ground([turned], asked)
    ((expected,),) = sam2_teacher.ground([Image.new("RGB", (40, 24), "red")], asked)
    assert found.masks.shape == (1, 24, 40)
    np.testing.assert_array_equal(found.masks, expected.masks)


def test_what_cannot_be_asked(sam2_teacher, images):
    with pytest.raises(ValueError, match="prompts: got 1 lists for 3 images"):
        sam2_teacher.ground(images, [[]])
    with pytest.raises(
        ValueError, match="'dog' cannot be grounded by 'sam2-transformers': there is neither a box nor a point"
    ):
        sam2_teacher.ground(images[:1], [[Prompt("dog")]])


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"name": "sam1"}, "teacher: got 'sam1', expected one of annotated, .*nearest: 'sam"),
        ({"name": "annotated", "model": "large"}, "model: got 'large', but the teacher 'annotated' has none"),
        (
            {"name": "sam3", "model": "larg"},
            "model: got 'larg', expected a Hub id, a folder that exists, or one of large .nearest: 'large'.",
        ),
        ({"name": "sam3", "model": "./nowhere"}, "model: got './nowhere'"),
        ({"name": "annotated", "dtype": "int8"}, "dtype: got 'int8'"),
        ({"name": "annotated", "device": "moon"}, "device: 'moon' cannot be used"),
        ({"name": "annotated", "device": "cuda:99"}, "device: 'cuda:99' cannot be used"),
        ({"name": "sam3"}, "model: 'facebook/sam3' is not in the cache and the Hub cannot be reached"),
        (
            {"name": "sam2-transformers", "model": "a/b"},
            "model: 'a/b' is not in the cache and the Hub cannot be reached",
        ),
    ],
)
def test_load_refuses(arguments, words):
    with pytest.raises(ValueError, match=words) as refused:
        load_teacher(**{"device": "cpu", **arguments})
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "kind, words",
    [
        (
            GatedRepoError,
            "'facebook/sam3' is gated, .*accept its terms on https://huggingface.co/facebook/sam3, .*hf auth log",
        ),
        (RepositoryNotFoundError, "'facebook/sam3' is neither a folder here nor a repository on the Hub"),
    ],
)
def test_what_the_hub_refuses(kind, words):
    try:
        try:
            raise kind.__new__(kind)
        except kind as error:
            # As transformers passes it on.
            raise OSError("You are trying to access a gated repo.\nMake sure ...") from error
    except OSError as error:
        assert re.search(words, _refusal("facebook/sam3", error))


def test_weights_of_another_model(tiny_sam2, tiny_sam3, tmp_path):
    for name, folder, kind in (("sam2-transformers", tiny_sam3, "sam3"), ("sam3", tiny_sam2, "sam2")):
        with pytest.raises(ValueError, match=f"model: '{folder}' cannot be loaded: it holds a model of type '{kind}'"):
            load_teacher(name, folder, device="cpu")
    with pytest.raises(ValueError, match=f"model: '{tmp_path}' cannot be loaded"):
        load_teacher("sam3", tmp_path, device="cpu")


@pytest.mark.parametrize("name, folder", [("sam2-transformers", "tiny_sam2"), ("sam3", "tiny_sam3")])
def test_weights_that_are_not_all_there(name, folder, request, tmp_path):
    folder = shutil.copytree(request.getfixturevalue(folder), tmp_path / "part")
    weights = load_file(folder / "model.safetensors")
    part = {key: value for key, value in weights.items() if key.startswith("vision_encoder")}
    assert 0 < len(part) < len(weights)
    save_file(part, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"model: '{folder}' cannot be loaded: it lacks {len(weights) - len(part)} w"):
        load_teacher(name, folder, device="cpu")


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sam2", None)
    for name in [name for name in sys.modules if name.startswith("sam2.")] + ["age_vlm.grounding.sam2_package"]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(
        ValueError, match="teacher: 'sam2' needs the package sam2, which is not installed: .*pip install"
    ):
        load_teacher("sam2", "tiny", device="cpu")


def test_identity_is_that_of_the_weights(tiny_sam2, sam2_teacher, tmp_path):
    copy = load_teacher("sam2-transformers", shutil.copytree(tiny_sam2, tmp_path / "copy"), device="cpu")
    assert copy.identity() == sam2_teacher.identity()
    with torch.no_grad():
        copy.model.no_memory_embedding += 1
    assert copy.identity() != sam2_teacher.identity()
    half = load_teacher("sam2-transformers", tiny_sam2, dtype="bfloat16", device="cpu")
    assert half.identity()["dtype"] == "bfloat16" and weights_digest(half.model) != weights_digest(sam2_teacher.model)


def test_visual_teachers_want_a_place():
    lacks = VisualTeacher.lacks
    assert lacks(None, Prompt("a", points=((1, 1),))) is None and lacks(None, Prompt("a", (0, 0, 1, 1))) is None
    assert lacks(None, Prompt("a")) is not None
