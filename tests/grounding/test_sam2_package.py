import numpy as np
import pytest
import torch

from age_vlm.grounding import Prompt, load_teacher


pytest.importorskip("sam2", reason="needs age-vlm[sam2]")

from sam2.build_sam import build_sam2
from sam2.sam2_image_predictor import SAM2ImagePredictor

from age_vlm.grounding.sam2_package import Sam2PackageTeacher, _files


CONFIG = "configs/sam2.1/sam2.1_hiera_t.yaml"
# The predictor takes images of 1024 x 1024 only: what can be smaller is the trunk of the image encoder.
SMALL = [
    "++model.image_encoder.trunk.embed_dim=8",
    "++model.image_encoder.trunk.stages=[1,1,1,1]",
    "++model.image_encoder.trunk.global_att_blocks=[]",
    "++model.image_encoder.neck.backbone_channel_list=[64,32,16,8]",
]


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    model = build_sam2(CONFIG, ckpt_path=None, device="cpu", hydra_overrides_extra=SMALL)
    # With the usual small weights all masks are alike.
    for name, tensor in model.sam_mask_decoder.named_parameters():
        if tensor.ndim == 2:
            torch.nn.init.normal_(tensor, std=(2 / (1 if "token" in name else tensor.shape[1])) ** 0.5)
    return Sam2PackageTeacher(model)


@pytest.fixture(scope="module")
def answers(teacher, images, prompts):
    sizes = []
    hook = teacher.predictor.model.image_encoder.register_forward_pre_hook(
        lambda module, inputs: sizes.append(len(inputs[0]))
    )
    found = teacher.ground(images, prompts)
    hook.remove()
    return found, sizes


def test_masks_have_the_size_of_their_image(answers, images, prompts):
    for image, asked, found in zip(images, prompts, answers[0]):
        assert len(found) == len(asked)
        for own in found:
            assert own.masks.shape == (1, image.height, image.width) and own.masks.dtype == bool
            assert own.scores.shape == (1,) and 0 <= own.scores[0] <= 1
    assert (answers[0][0][0].masks != answers[0][0][2].masks).any()


def test_an_image_is_encoded_once(answers):
    # Two of the three images have prompts, of two kinds each.
    assert answers[1] == [2]


def test_equals_the_predictor_asked_one_by_one(teacher, answers, images, prompts, same):
    predictor = SAM2ImagePredictor(teacher.predictor.model)
    for image, asked, found in zip(images, prompts, answers[0]):
        if asked:
            predictor.set_image(image)
        for prompt, own in zip(asked, found):
            masks, scores, _ = predictor.predict(
                point_coords=np.array(prompt.points) if prompt.points else None,
                point_labels=np.array(prompt.labels) if prompt.points else None,
                box=None if prompt.box is None else np.array(prompt.box),
                multimask_output=prompt.box is None and len(prompt.points) == 1,
            )
            best = scores.argmax()
            assert (own.masks[0] != masks[best].astype(bool)).mean() < 0.002
            assert own.scores[0] == pytest.approx(scores[best], abs=1e-4)


def test_lower_precision(teacher, images):
    low = Sam2PackageTeacher(teacher.predictor.model, torch.bfloat16)
    ((found,),) = low.ground(images[:1], [[Prompt("a", (4, 6, 40, 30))]])
    assert {level.dtype for level in low.predictor._features["high_res_feats"]} == {torch.bfloat16}
    assert found.masks.shape == (1, 48, 64) and np.isfinite(found.scores).all()
    assert low.identity() == teacher.identity() | {"dtype": "bfloat16"}


def test_load_from_a_folder_with_the_published_file(tmp_path):
    torch.manual_seed(0)
    model = build_sam2(CONFIG, ckpt_path=None, device="cpu")
    file = tmp_path / "sam2.1_hiera_tiny.pt"
    torch.save({"model": model.state_dict()}, file)
    assert _files(str(file)) == _files(str(tmp_path)) == (CONFIG, file)
    loaded = load_teacher("sam2", tmp_path, device="cpu").predictor.model
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_folder_without_one(tmp_path):
    (tmp_path / "other.pt").touch()
    with pytest.raises(
        ValueError, match="model: .* cannot be loaded: it holds none of the files .*sam2.1_hiera_tiny.pt"
    ):
        load_teacher("sam2", tmp_path, device="cpu")
    with pytest.raises(ValueError, match="the package knows only facebook/sam2"):
        load_teacher("sam2", "some/one", device="cpu")
    with pytest.raises(
        ValueError, match="'facebook/sam2.1-hiera-tiny' is not in the cache and the Hub cannot be reached"
    ):
        load_teacher("sam2", "tiny", device="cpu")


def test_wants_a_place(teacher):
    assert teacher.lacks(Prompt("a")) is not None
