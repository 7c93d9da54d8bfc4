import pytest
import torch

from age_vlm.evaluation.attention import chosen_heads, picture_attention


CELLS = 12


def test_picture_attention_is_that_of_each_rows_own_slot():
    maps = [torch.rand(3, 2, 4 * CELLS) for _ in range(3)]
    slots = torch.tensor([2, 0, 3])
    attention = picture_attention(maps, slots, CELLS, [2, 0])
    assert attention.shape == (3, 2, 2, CELLS)
    for row, slot in enumerate(slots.tolist()):
        for place, layer in enumerate((2, 0)):
            own = maps[layer][row, :, slot * CELLS : (slot + 1) * CELLS]
            assert torch.equal(attention[row, place], own)


def test_blocks_heads_and_tokens_that_the_model_lacks_are_refused():
    maps = [torch.rand(1, 2, CELLS).softmax(-1)] * 2
    slot = torch.tensor([0])
    for layer in (2, -1):
        with pytest.raises(ValueError, match=f"^alignment.layers: got {layer}, expected 0 to 1: the model has 2"):
            picture_attention(maps, slot, CELLS, [0, layer])
    with pytest.raises(ValueError, match="^alignment.layers: got 3, expected"):
        picture_attention(maps, slot, CELLS, [0, 3, 2])  # the first of several is named
    for heads in ([0, 5], [0, 5, 4]):
        with pytest.raises(ValueError, match="^alignment.heads: got 5, expected 0 to 3"):
            chosen_heads(heads, 4)
    with pytest.raises(ValueError, match="^grounding_coverage: got 5 image tokens"):
        picture_attention(maps, slot, 5, [0])
