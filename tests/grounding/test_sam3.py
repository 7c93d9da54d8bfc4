import numpy as np
import pytest
import torch
from transformers import Sam3VideoConfig, Sam3VideoModel

from age_vlm.grounding import Prompt, load_teacher


@pytest.fixture(scope="module")
def prompts():
    return [[Prompt("red dog"), Prompt("a cat")], [], [Prompt("red dog")]]


def test_a_phrase_becomes_masks_of_the_size_of_the_image(sam3_teacher, images, prompts):
    answers = sam3_teacher.ground(images, prompts)
    for image, asked, found in zip(images, prompts, answers):
        assert len(found) == len(asked)
        for own in found:
            assert len(own.masks) == len(own.scores) >= 1
            assert own.masks.shape[1:] == (image.height, image.width) and own.masks.dtype == bool
            assert (own.scores >= 0).all() and (own.scores <= 1).all()
    # Else the other tests would say nothing.
    assert answers[0][0].masks.shape != answers[0][1].masks.shape


def test_equals_the_model_asked_as_its_documentation_has_it(sam3_teacher, images, prompts):
    answers = sam3_teacher.ground(images, prompts)
    for image, asked, found in zip(images, prompts, answers):
        for prompt, own in zip(asked, found):
            inputs = sam3_teacher.processor(images=image, text=prompt.phrase, return_tensors="pt")
            with torch.no_grad():
                output = sam3_teacher.model(**{name: v for name, v in inputs.items() if name != "original_sizes"})
            (expected,) = sam3_teacher.processor.post_process_instance_segmentation(
                output, threshold=0.3, target_sizes=inputs["original_sizes"].tolist()
            )
            np.testing.assert_allclose(own.scores, expected["scores"].numpy(), atol=1e-4)
            assert (own.masks != expected["masks"].bool().numpy()).mean() < 0.002


def test_an_image_is_encoded_once(sam3_teacher, images, encoded):
    sizes = encoded(sam3_teacher.model.vision_encoder)
    sam3_teacher.ground(images, [[Prompt(f"dog {i}") for i in range(10)]] * 3)
    assert sizes == [3]


def test_batched_equals_alone(sam3_teacher, images, prompts, same):
    alone = [
        [sam3_teacher.ground([image], [[prompt]])[0][0] for prompt in asked] for image, asked in zip(images, prompts)
    ]
    same(sam3_teacher.ground(images, prompts), alone)


def test_the_best_is_told_however_low_its_score(sam3_teacher, images, monkeypatch):
    monkeypatch.setattr("age_vlm.grounding.sam3._LEAST_SCORE", 0.99)
    ((found,),) = sam3_teacher.ground(images[:1], [[Prompt("red dog")]])
    monkeypatch.undo()
    ((every,),) = sam3_teacher.ground(images[:1], [[Prompt("red dog")]])
    best = every.scores.argmax()
    assert len(every.scores) > 1 and found.scores.tolist() == [every.scores[best]]
    np.testing.assert_array_equal(found.masks[0], every.masks[best])


def test_only_what_is_in_the_box(sam3_teacher, images):
    ((every,),) = sam3_teacher.ground(images[:1], [[Prompt("red dog")]])
    shares = {bottom: every.masks[:, :bottom].sum((1, 2)) / every.masks.sum((1, 2)) for bottom in range(48)}
    bottom, share = next((bottom, share) for bottom, share in shares.items() if 0 < (share >= 0.5).sum() < len(share))
    asked = [Prompt("red dog", (0.0, 0.0, 64.0, float(bottom))), Prompt("red dog", (0, 0, 1, 1))]
    ((inside, nothing),) = sam3_teacher.ground(images[:1], [asked])
    np.testing.assert_array_equal(inside.masks, every.masks[share >= 0.5])
    assert nothing.masks.shape == (0, 48, 64) and nothing.union() is None


def test_phrases_longer_than_the_text_encoder_reads(sam3_teacher, images):
    ((long, cut),) = sam3_teacher.ground(images[:1], [[Prompt("dog" * 30), Prompt("dog" * 40)]])
    np.testing.assert_array_equal(long.masks, cut.masks)
    assert sam3_teacher.lacks(Prompt(" ")) == "it has no words" and sam3_teacher.lacks(Prompt("dog")) is None


def test_lower_precision(tiny_sam3, sam3_teacher, images, prompts):
    low = load_teacher("sam3", tiny_sam3, dtype="bfloat16", device="cpu")
    ((found, _), _, _), ((expected, _), _, _) = (t.ground(images, prompts) for t in (low, sam3_teacher))
    assert found.scores.max() == pytest.approx(expected.scores.max(), abs=0.1)
    assert low.identity()["dtype"] == "bfloat16"


def test_a_checkpoint_for_videos(small_memory, sam3_teacher, images, prompts, same, tmp_path):
    """Published SAM 3 checkpoints are of this type."""
    detector = sam3_teacher.model.config.to_dict()
    tracker = {
        "vision_config": detector["vision_config"],
        "prompt_encoder_config": {"hidden_size": 32, "image_size": 112, "patch_size": 14},
        "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32},
        "image_size": 112,
        **small_memory,
    }
    model = Sam3VideoModel(Sam3VideoConfig(detector_config=detector, tracker_config=tracker))
    model.detector_model.load_state_dict(sam3_teacher.model.state_dict())
    model.save_pretrained(tmp_path)
    sam3_teacher.processor.save_pretrained(tmp_path)
    same(load_teacher("sam3", tmp_path, device="cpu").ground(images, prompts), sam3_teacher.ground(images, prompts))
