"""What is loaded of a checkpoint: shards, types, settings, revisions."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from age_vlm import AgeVlmForConditionalGeneration, AgeVlmModel
from age_vlm.hub import save_checkpoint


# Weights


@pytest.mark.parametrize("model_class", [AgeVlmForConditionalGeneration, AgeVlmModel])
@torch.no_grad()
def test_shards_are_read_back(make_model, make_batch, tmp_path, model_class):
    model = make_model()
    model = model if model_class is AgeVlmForConditionalGeneration else model.model
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = make_batch((2, 0, 1))
    assert torch.equal(loaded(**batch)[0], model(**batch)[0])


def test_language_model_weights_keep_llama_s_names(checkpoint):
    names = set(load_file(checkpoint / "model.safetensors"))
    layer = "model.language_model.layers.1."
    assert {
        f"{layer}self_attn.q_proj.weight",
        f"{layer}mlp.up_proj.weight",
        f"{layer}cross_attention.attn.q_proj.weight",
    } <= names
    assert not any("model.language_model.layers.0.cross_attention" in name for name in names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_dtype_on_load(checkpoint, dtype, make_batch):
    batch = make_batch((1, 0))
    model = AgeVlmForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype)
    assert model.dtype == dtype and model.lm_head.weight.dtype == dtype
    whole = AgeVlmForConditionalGeneration.from_pretrained(checkpoint)
    logits, expected = model(**batch).logits, whole(**batch).logits
    assert logits.dtype == dtype and expected.dtype == torch.float32
    torch.testing.assert_close(logits.float(), expected, atol=0.1 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_dtype_of_the_file_is_kept_where_none_is_named(make_model, make_batch, tmp_path, dtype):
    make_model(dtype=dtype).save_pretrained(tmp_path)
    models = [
        AgeVlmForConditionalGeneration.from_pretrained(tmp_path, **options)
        for options in ({}, {"dtype": "auto"}, {"dtype": dtype})
    ]
    for model in models:
        gates = {
            name: parameter.dtype
            for name, parameter in model.named_parameters()
            if "_gate." in name and "cross" in name
        }
        gates = {name: kind for name, kind in gates.items() if "mlp.gate" not in name}
        assert set(gates.values()) == {torch.float32}
        assert {p.dtype for name, p in model.named_parameters() if name not in gates} == {dtype}
        assert torch.equal(model(**make_batch((1, 0))).logits, models[0](**make_batch((1, 0))).logits)


def test_generation_settings_are_saved(checkpoint):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    assert model.generation_config.eos_token_id == 5 and model.generation_config.bos_token_id == 0


# Revisions


@pytest.fixture(scope="module")
def revisions(make_model, processor, tmp_path_factory):
    """A Hub repository with two commits, as far as it was downloaded: the cache folder, and the models."""
    cache = tmp_path_factory.mktemp("hub")
    repository = cache / "models--someone--model"
    models = {"main": make_model(seed=1), "v0": make_model(seed=2, image_visibility="all_previous")}
    for number, (revision, model) in enumerate(models.items()):
        commit = f"{number + 1:040x}"
        save_checkpoint(model, processor, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        models[revision] = (commit, model)
    return cache, models


@pytest.mark.parametrize("revision", ["main", "v0"])
@torch.no_grad()
def test_a_revision_is_loaded_whole(revisions, make_batch, revision):
    cache, models = revisions
    commit, model = models[revision]
    batch = make_batch((2, 0))
    names = [{"revision": revision}, {"revision": commit}, *([{}] if revision == "main" else [])]
    for name in names:
        loaded = AutoModelForImageTextToText.from_pretrained("someone/model", cache_dir=cache, **name)
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
        assert loaded.config.image_visibility == model.config.image_visibility
        config = AutoConfig.from_pretrained("someone/model", cache_dir=cache, **name)
        assert config.image_visibility == model.config.image_visibility
        AutoProcessor.from_pretrained("someone/model", cache_dir=cache, **name)
    with pytest.raises(OSError, match="find them in the cached files"):
        AutoModelForImageTextToText.from_pretrained("someone/model", cache_dir=cache, revision="v9")
