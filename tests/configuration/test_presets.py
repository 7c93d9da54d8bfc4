import pytest
import torch

from age_vlm import AgeVlmForConditionalGeneration, preset_config
from age_vlm.configuration import IMAGE_SIZES, PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_sees_an_image(name):
    config = preset_config(name)
    with torch.device("meta"):
        model = AgeVlmForConditionalGeneration(config)
        size = IMAGE_SIZES[name]
        features = model.get_image_features(torch.zeros(1, 3, size, size)).pooler_output
    assert features.shape == (
        1,
        {"age-vlm-1b": 24 * 24, "age-vlm-135m": 12 * 12, "age-vlm-tiny": 8 * 8}[name],
        config.text_config.hidden_size,
    )


def test_the_paper_s_model_has_the_paper_s_parts():
    config = preset_config("age-vlm-1b")
    with torch.device("meta"):
        model = AgeVlmForConditionalGeneration(config).model
    new = [name for name, _ in model.language_model.named_parameters() if ".cross_attention." in name]
    assert {int(name.split(".")[1]) for name in new} == {2, 6, 10, 14}
    # Llama-3.2-1B has 1.2358 billion parameters, embeddings counted once.
    old = sum(p.numel() for name, p in model.language_model.named_parameters() if name not in new)
    assert round(old / 1e9, 4) == 1.2358


def test_overrides_replace_fields():
    assert preset_config("age-vlm-tiny", cross_attention_layers=[0]).cross_attention_layers == [0]
    assert preset_config("age-vlm-tiny").cross_attention_layers == [1, 2]


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("age-vlm-tny", {}, ["preset", "age-vlm-tny", "'age-vlm-tiny'"]),
        ("age-vlm-tiny", {"image_visibilty": "latest"}, ["image_visibilty", "'image_visibility'"]),
    ],
)
def test_unknown_names_are_one_sentence_with_the_nearest(name, settings, words):
    with pytest.raises(ValueError) as error:
        preset_config(name, **settings)
    assert all(word in str(error.value) for word in words)
