import numpy as np
import pytest
import torch
from transformers import Sam2VideoConfig, Sam2VideoModel

from age_vlm.grounding import Prompt, load_teacher


def test_masks_have_the_size_of_their_image(sam2_teacher, images, prompts):
    answers = sam2_teacher.ground(images, prompts)
    for image, asked, found in zip(images, prompts, answers):
        assert len(found) == len(asked)
        for own in found:
            assert own.masks.shape == (1, image.height, image.width) and own.masks.dtype == bool
            assert own.scores.shape == (1,) and 0 <= own.scores[0] <= 1
    # Else the other tests would say nothing.
    assert (answers[0][0].masks != answers[0][2].masks).any()


@pytest.mark.parametrize("number, place", [(0, 0), (0, 1), (2, 0), (2, 1)])
def test_equals_the_model_asked_as_its_documentation_has_it(sam2_teacher, images, prompts, number, place, same):
    prompt = prompts[number][place]
    told = {}
    if prompt.box:
        told["input_boxes"] = [[list(map(float, prompt.box))]]
    if prompt.points:
        told |= {
            "input_points": [[[list(map(float, p)) for p in prompt.points]]],
            "input_labels": [[list(prompt.labels)]],
        }
    inputs = sam2_teacher.processor(images=[images[number]], return_tensors="pt", **told)
    single = prompt.box is None and len(prompt.points) == 1
    with torch.no_grad():
        output = sam2_teacher.model(
            **{name: value for name, value in inputs.items() if name != "original_sizes"}, multimask_output=single
        )
    masks = sam2_teacher.processor.post_process_masks(output.pred_masks, inputs["original_sizes"])[0][0]
    assert len(masks) == (3 if single else 1)
    best = output.iou_scores[0, 0].argmax()
    found = sam2_teacher.ground(images, prompts)[number][place]
    assert (found.masks[0] != masks[best].numpy()).mean() < 0.002
    assert found.scores[0] == pytest.approx(output.iou_scores[0, 0, best].item(), abs=1e-4)


def test_an_image_is_encoded_once(sam2_teacher, images, encoded):
    sizes = encoded(sam2_teacher.model.vision_encoder)
    asked = [[Prompt(str(i), (i, i, i + 9, i + 9)) for i in range(20)] for _ in images]
    assert [len(found) for found in sam2_teacher.ground(images, asked)] == [20, 20, 20]
    assert sizes == [3]


def test_batched_equals_alone(sam2_teacher, images, prompts, same):
    batched = sam2_teacher.ground(images, prompts)
    alone = [
        [sam2_teacher.ground([image], [[prompt]])[0][0] for prompt in asked] for image, asked in zip(images, prompts)
    ]
    same(batched, alone)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision(tiny_sam2, sam2_teacher, images, prompts, dtype):
    low = load_teacher("sam2-transformers", tiny_sam2, dtype=dtype, device="cpu")
    for own, expected in zip(low.ground(images, prompts), sam2_teacher.ground(images, prompts)):
        for a, b in zip(own, expected):
            assert np.isfinite(a.scores).all() and (a.masks == b.masks).mean() > 0.8


def test_a_checkpoint_for_videos(small_memory, tiny_sam2, sam2_teacher, images, prompts, same, tmp_path):
    """Published SAM 2 checkpoints are of this type."""
    config = sam2_teacher.model.config.to_dict()
    parts = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    model = Sam2VideoModel(Sam2VideoConfig(**{part: config[part] for part in parts}, image_size=128, **small_memory))
    assert not model.load_state_dict(sam2_teacher.model.state_dict(), strict=False).unexpected_keys
    model.save_pretrained(tmp_path)
    sam2_teacher.processor.save_pretrained(tmp_path)
    same(
        load_teacher("sam2-transformers", tmp_path, device="cpu").ground(images, prompts),
        sam2_teacher.ground(images, prompts),
    )
