"""Outputs of a frozen encoder on disk: the same as computed, for the same weights and pixels only."""

import pytest
import torch

from age_vlm.training.encoder_cache import encoder_cache


@pytest.fixture
def tower(make_model):
    return make_model().model.vision_tower.requires_grad_(False).eval()


def _calls(tower):
    """Numbers of images that the encoder itself was given."""
    calls = []
    tower.timm_model.stem_0.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    return calls


def test_an_image_is_encoded_once_and_comes_back_as_it_was(tower, make_model, tmp_path):
    images = torch.randn(3, 3, 32, 32)
    expected = tower(images).last_hidden_state[-1]
    calls = _calls(tower)
    with encoder_cache(tower, tmp_path):
        for _ in range(2):
            torch.testing.assert_close(tower(images).last_hidden_state, expected)
        some = torch.cat([images[2:], torch.randn(1, 3, 32, 32), images[:1], images[:1]])
        torch.testing.assert_close(tower(some).last_hidden_state[[0, 2, 3]], expected[[2, 0, 0]])
    assert calls == [3, 1]
    again = make_model().model.vision_tower.requires_grad_(False).eval()
    calls_again = _calls(again)
    with encoder_cache(again, tmp_path):  # another process, the same weights
        torch.testing.assert_close(again(images).last_hidden_state, expected)
    assert calls_again == []
    tower(images)
    assert calls == [3, 1, 3] and "forward" not in vars(tower)


def test_other_weights_and_types_have_files_of_their_own(tower, tmp_path):
    images = torch.randn(2, 3, 32, 32)
    calls = _calls(tower)
    with encoder_cache(tower, tmp_path):
        tower(images)
        with torch.autocast("cpu", torch.bfloat16):
            half = tower(images).last_hidden_state
            torch.testing.assert_close(tower(images).last_hidden_state, half, rtol=0, atol=0)
    with torch.no_grad():
        next(tower.parameters()).mul_(2)
    with encoder_cache(tower, tmp_path):
        tower(images)
    assert calls == [2, 2, 2]


def test_a_damaged_file_is_made_again(tower, tmp_path):
    images = torch.randn(1, 3, 32, 32)
    with encoder_cache(tower, tmp_path):
        expected = tower(images).last_hidden_state
        (path,) = tmp_path.rglob("*.safetensors")
        path.write_bytes(path.read_bytes()[:-5])
        torch.testing.assert_close(tower(images).last_hidden_state, expected)
        torch.testing.assert_close(tower(images).last_hidden_state, expected)
    assert len(list(tmp_path.rglob("*"))) == 2  # its folder, and the file whole again


def test_an_encoder_that_learns_is_refused(tower, tmp_path):
    with pytest.raises(ValueError, match="vision_tower: got one that is trained"):
        with encoder_cache(tower.requires_grad_(True), tmp_path):
            pass


def test_training_is_the_same_with_and_without(make_trainer, weights_after, assert_same, tmp_path, make_model):
    def trained(cached):
        model = make_model()
        model.freeze("vision")
        trainer = make_trainer(model=model, steps=4, batch=4)
        if not cached:
            return weights_after(trainer)
        with encoder_cache(model.model.vision_tower, tmp_path):
            return weights_after(trainer)

    plain = trained(False)
    for _ in range(2):
        assert_same(trained(True), plain, rtol=1e-4, atol=1e-6)
    assert list(tmp_path.rglob("*.safetensors"))
