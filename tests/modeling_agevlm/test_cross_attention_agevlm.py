"""The cross-attention by itself: maps, gates and the start of the projector keep their precision and their scale."""

import pytest
import torch

from age_vlm import AgeVlmForConditionalGeneration
from age_vlm.modeling_agevlm.cross_attention_agevlm import image_attention_maps
from age_vlm.modeling_agevlm.vision_agevlm import AgeVlmMultiModalProjector


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_maps_are_computed_in_float32(dtype):
    """A bfloat16 softmax over many tokens is off by a percent, which the logarithm of a small mass does not forgive."""
    queries, keys = (torch.randn(2, heads, length, 16, dtype=dtype) for heads, length in ((4, 5), (2, 300)))
    visible = torch.ones(2, 5, 300, dtype=torch.bool)
    visible[:, :, 200:] = False
    rows = torch.tensor([[0, 4], [1, 2]])
    maps = image_attention_maps(rows, queries, keys, visible, 0.7)
    assert maps.dtype == torch.float32
    exact = image_attention_maps(rows, queries.double().float(), keys.double().float(), visible, 0.7)
    scores = torch.einsum(
        "mhd,mhkd->mhk", queries[rows[:, 0], :, rows[:, 1]].double(), keys[rows[:, 0]].double().repeat_interleave(2, 1)
    )
    expected = (0.7 * scores).masked_fill(~visible[:, :1], float("-inf")).softmax(-1)
    torch.testing.assert_close(maps.double(), expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(maps, exact, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_maps_of_a_model_in_half_precision_are_float32(make_model, make_batch, dtype):
    batch = make_batch((1, 2))
    model = make_model().to(dtype)
    maps = model(**batch, cross_attention_queries=torch.tensor([[0, 13]])).cross_attention_maps
    assert all(each.dtype == torch.float32 for each in maps)
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(1, 4), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_are_loaded_in_float32(make_model, tmp_path, dtype):
    model = make_model()
    value = 0.1 + 2**-20  # half precision has no such number
    for name, parameter in model.named_parameters():
        if "_gate." in name and "cross_attention" in name and ".mlp." not in name:
            torch.nn.init.constant_(parameter, value)
    model.save_pretrained(tmp_path)
    loaded = AgeVlmForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    gates = [p for n, p in loaded.named_parameters() if n.endswith(("attn_gate.weight", "mlp_gate.weight"))]
    assert len(gates) == 4
    assert all(gate.dtype == torch.float32 and gate == torch.tensor([value]) for gate in gates)
    assert loaded.lm_head.weight.dtype == dtype


@pytest.mark.parametrize("width", [16, 400])
def test_the_projector_starts_at_the_scale_of_what_comes_in(make_model, width):
    """Whatever the encoder's width, and whatever the range of the language model's weights."""
    model = make_model(text={"initializer_range": 0.003, "hidden_size": 64})
    projector = AgeVlmMultiModalProjector(width, 64)
    model._init_weights(projector.linear)
    projected = projector(5 + 3 * torch.randn(200, width))
    assert 0.8 < float(projected.std()) < 1.25
    assert float(projector.linear.bias.abs().max()) == 0.0
    inside = model.model.multi_modal_projector.linear
    assert float(inside.weight.std()) == pytest.approx(inside.in_features**-0.5, rel=0.15)
