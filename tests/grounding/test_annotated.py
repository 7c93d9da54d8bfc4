import numpy as np

from age_vlm.data.masks import encode_mask
from age_vlm.grounding import Prompt, load_teacher


def test_masks_come_back_as_they_are(images):
    teacher = load_teacher("annotated")
    mask = np.random.default_rng(0).random((48, 64)) < 0.5
    ((found,), (), ()) = teacher.ground(images, [[Prompt("a", mask=encode_mask(mask))], [], []])
    np.testing.assert_array_equal(found.masks, mask[None])
    assert found.scores.tolist() == [1.0]
    assert teacher.lacks(Prompt("a")) == "the data has no mask for it"
    assert teacher.identity() == {"teacher": "annotated"}
