import copy

import pytest
import torch
from transformers import AutoModel

from age_vlm.configuration import preset_config
from age_vlm.data.scene_datasets import IconsDataset
from age_vlm.data.scenes import SceneConfig
from age_vlm.processing import whole_image_processor
from age_vlm.training.warm_start import VisionClassifier, warm_start


LABELS = len(SceneConfig().kinds)


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return AutoModel.from_config(preset_config("age-vlm-tiny").vision_config)


def warm(tower, images, folder, **settings):
    options = {"steps": 2, "batch_size": 8, "learning_rate": 2e-3, "seed": 0, "progress": False, **settings}
    return warm_start(tower, whole_image_processor(64), images, LABELS, folder=str(folder), **options)


def test_the_tower_itself_learns_and_nothing_is_left_behind(tower, tmp_path):
    before = copy.deepcopy(tower.state_dict())
    losses = [warm(tower, IconsDataset(8), tmp_path, steps=steps, learning_rate=4e-3) for steps in (1, 40)]
    assert losses[1] < 0.7 * losses[0]
    moved = [name for name, value in tower.state_dict().items() if not torch.equal(value, before[name])]
    assert len(moved) == len(before)
    assert list(tmp_path.iterdir()) == []


def test_the_seed_decides(tower, tmp_path):
    towers = [copy.deepcopy(tower) for _ in range(3)]
    for each, seed in zip(towers, (1, 1, 2)):
        torch.manual_seed(0)
        warm(each, IconsDataset(24), tmp_path, seed=seed)
    weights = [torch.cat([p.flatten() for p in each.parameters()]) for each in towers]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


class Counted(IconsDataset):
    drawn = 0

    def __getitem__(self, index):
        self.drawn += 1
        return super().__getitem__(index)


def test_no_more_images_are_drawn_than_are_seen(tower, tmp_path):
    images = Counted(8000)
    warm(tower, images, tmp_path, steps=2, batch_size=3)
    assert images.drawn == 6


def test_the_score_of_an_image_is_a_soft_maximum_of_its_cells(tower):
    classifier = VisionClassifier(tower, 5)
    pixels = torch.randn(2, 3, 64, 64)
    labels = torch.tensor([1, 4])
    outputs = classifier(pixels, labels)
    assert outputs["logits"].shape == (2, 5)
    states = tower(pixels, return_dict=True).last_hidden_state
    cells = (states[-1] if isinstance(states, (list, tuple)) else states).flatten(2).transpose(1, 2)
    scores = classifier.classifier(classifier.norm(cells))
    torch.testing.assert_close(outputs["logits"], scores.exp().sum(1).log())
    torch.testing.assert_close(outputs["loss"], torch.nn.functional.cross_entropy(outputs["logits"], labels))
    assert classifier(pixels)["loss"] is None
