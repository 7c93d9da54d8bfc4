"""Weights on disk or in CPU memory until they are needed: the same logits and the same answers."""

import accelerate
import pytest
import torch
from accelerate import infer_auto_device_map
from packaging.version import Version

from age_vlm import AgeVlmForConditionalGeneration


GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
LAYERS = "model.language_model.layers"
PARTS = [
    "model.vision_tower",
    "model.multi_modal_projector",
    "model.language_model.embed_tokens",
    *(f"{LAYERS}.{index}" for index in range(4)),
    "model.language_model.norm",
    "model.language_model.rotary_emb",
    "lm_head",
]
VIT = {
    "model_type": "vit",
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def on_disk(*parts):
    return {part: "disk" if part in parts else "cpu" for part in PARTS}


# `disk_offload` itself does it in every version.
whole_on_disk = pytest.mark.skipif(
    Version(accelerate.__version__) < Version("1.15"),
    reason="accelerate takes a `device_map` of disk alone from 1.15 on",
)
MAPS = {
    "everything": {"": "disk"},
    "vision encoder": on_disk("model.vision_tower", "model.multi_modal_projector"),
    "layers": on_disk(*(part for part in PARTS if part.startswith(LAYERS))),
    "layers with cross-attention": on_disk(f"{LAYERS}.1", f"{LAYERS}.3"),
    "layers without": on_disk(f"{LAYERS}.0", f"{LAYERS}.2"),
    "embeddings": on_disk("model.language_model.embed_tokens", "lm_head"),
}


@pytest.fixture(scope="module")
def saved(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model = make_model()
    # Several files: what is on disk is read from them, where it lies.
    model.save_pretrained(folder, max_shard_size="50KB")
    return folder, model


@torch.no_grad()
def assert_same(offloaded, model, batch):
    rows = torch.tensor([[0, batch["input_ids"].shape[1] - 1]])
    got, expected = (one(**batch, cross_attention_queries=rows) for one in (offloaded, model))
    assert torch.equal(got.logits, expected.logits)
    assert all(map(torch.equal, got.cross_attention_maps, expected.cross_attention_maps))
    for options in (GREEDY, GREEDY | {"num_beams": 2}):
        assert torch.equal(offloaded.generate(**batch, **options), model.generate(**batch, **options)), options


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map_on_load(saved, make_batch, device_map):
    folder, model = saved
    assert_same(
        AgeVlmForConditionalGeneration.from_pretrained(folder, device_map=device_map), model, make_batch((2, 0, 1))
    )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=whole_on_disk if name == "everything" else ()) for name in MAPS]
)
def test_disk_offload_on_load(saved, make_batch, tmp_path, name):
    folder, model = saved
    offloaded = AgeVlmForConditionalGeneration.from_pretrained(folder, device_map=MAPS[name], offload_folder=tmp_path)
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    assert_same(offloaded, model, make_batch((2, 0, 1)))


@whole_on_disk
def test_an_encoder_of_transformers_may_be_on_disk_too(make_model, make_batch, tmp_path):
    model = make_model(vision_config=VIT)
    model.save_pretrained(tmp_path / "saved")
    offloaded = AgeVlmForConditionalGeneration.from_pretrained(
        tmp_path / "saved", device_map={"": "disk"}, offload_folder=tmp_path / "offloaded"
    )
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    assert_same(offloaded, model, make_batch((2, 0, 1)))


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_accelerate_s_own_offload(saved, make_batch, tmp_path, kind):
    folder, model = saved
    whole = AgeVlmForConditionalGeneration.from_pretrained(folder)
    if kind == "cpu":
        offloaded = accelerate.cpu_offload(whole, execution_device="cpu")
    else:
        offloaded = accelerate.disk_offload(whole, tmp_path, execution_device="cpu")
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    assert_same(offloaded, model, make_batch((2, 0, 1)))


def test_automatic_maps_split_no_layer(saved, make_batch, tmp_path):
    folder, model = saved
    kept = {name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules}
    assert {f"{LAYERS}.{index}" for index in range(4)} < kept
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    splits = set()
    for share in range(1, 10):
        memory = {"cpu": size * share // 10, "disk": 10 * size}
        device_map = infer_auto_device_map(model, memory, no_split_module_classes=list(model._no_split_modules))
        assert not [part for part in device_map for whole in kept if part.startswith(f"{whole}.")]
        if len(set(device_map.values())) > 1:
            splits.add(str(device_map))
            offloaded = AgeVlmForConditionalGeneration.from_pretrained(
                folder, device_map="auto", max_memory=memory, offload_folder=tmp_path
            )
            assert "disk" in offloaded.hf_device_map.values()
    assert len(splits) > 2
    assert_same(offloaded, model, make_batch((2, 0, 1)))
