"""LoRA and DoRA through PEFT: what is adapted, what is trained, and where adapters go and come back from."""

import json
import re
import shutil
import sys
from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
import transformers
from packaging import version
from peft import AutoPeftModel, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from age_vlm import AgeVlmForConditionalGeneration
from age_vlm.hub import load_checkpoint, save_checkpoint
from age_vlm.modeling_agevlm.cross_attention_agevlm import AgeVlmCrossAttentionBlock
from age_vlm.training.lora import GATES, LORA_TARGETS, lora_config


CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
# A model whose gates were random would be worse than the one sentence that says so.
loads_adapters = pytest.mark.skipif(
    version.parse(peft.__version__) < version.parse(MIN_PEFT_VERSION),
    reason=f"transformers {transformers.__version__} itself loads adapters with PEFT {MIN_PEFT_VERSION} and newer alone",
)
EVERY_KIND = [(target, dora) for target in LORA_TARGETS for dora in (False, True)]


@pytest.fixture(scope="module")
def adapted(base, load_model, trained_parameters):
    """Settings -> a model with an adapter that is far from its start, where an adapter changes nothing."""

    def make(target="cross_attention", **settings) -> PeftModel:
        torch.manual_seed(0)
        model = get_peft_model(load_model(base), lora_config(target, rank=3, **settings))
        with torch.no_grad():
            for parameter in trained_parameters(model).values():
                parameter += 0.1 * torch.randn_like(parameter)
        return model.eval()

    return make


def linears(module, prefix="") -> set[str]:
    return {f"{prefix}{name}" for name, child in module.named_modules() if isinstance(child, torch.nn.Linear)}


# What is adapted


@pytest.mark.parametrize("vision", [None, CLIP])
@pytest.mark.parametrize("inner", [False, True], ids=["with head", "without head"])
def test_patterns_match_their_part_whole_and_nothing_else(make_model, vision, inner):
    model = make_model(**({"vision_config": vision} if vision else {}))
    model = model.model if inner else model
    blocks, layers = set(), set()
    for name, module in model.named_modules():
        if isinstance(module, AgeVlmCrossAttentionBlock):
            blocks |= linears(module, f"{name}.")
        elif isinstance(module, LlamaDecoderLayer):
            layers |= linears(module, f"{name}.")
    layers -= blocks
    assert len(blocks) == 2 * 7 and len(layers) == 4 * 7
    assert not vision or any("vision_tower" in name and name.endswith("q_proj") for name in linears(model))
    expected = {"cross_attention": blocks, "language_model": layers, "both": blocks | layers}
    for target, pattern in LORA_TARGETS.items():
        # As PEFT matches patterns.
        assert {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)} == expected[target]


@pytest.mark.parametrize("target, dora", EVERY_KIND)
def test_a_new_adapter_changes_nothing_and_trains_only_itself_and_the_gates(
    base, make_batch, target, dora, load_model, trained_parameters
):
    plain, batch, text = load_model(base), make_batch((2, 0, 1)), make_batch((0, 0), seed=1)
    model = get_peft_model(load_model(base), lora_config(target, rank=3, use_dora=dora))
    adapters = {name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert adapters == {name for name, _ in plain.named_modules() if re.fullmatch(LORA_TARGETS[target], name)}
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch).logits, plain(**batch).logits)
        untouched = plain(**text).logits
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=1e-2)
    for _ in range(2):  # the first moves only one factor of each adapter: the other is zero
        model.train()(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    gates = {
        name for name in changed if name.split(".")[-4:-1] in [[gate, "modules_to_save", "default"] for gate in GATES]
    }
    kinds = ("lora_A", "lora_B", "lora_magnitude_vector") if dora else ("lora_A", "lora_B")
    assert len(gates) == 4
    assert changed - gates == {f"base_model.model.{name}.{kind}.default.weight" for name in adapters for kind in kinds}
    with torch.no_grad():
        assert torch.equal(model.eval()(**text).logits, untouched) == (target == "cross_attention")


def test_what_is_trained_besides_is_chosen(base, load_model, trained_parameters):
    names = trained_parameters(get_peft_model(load_model(base), lora_config(gates=False)))
    assert names and all(".lora_" in name for name in names)
    config = lora_config("both", rank=4, dropout=0.1, modules_to_save=["multi_modal_projector"], use_rslora=True)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (4, 8, 0.1, True)
    projector = load_model(base).model.multi_modal_projector
    names = [
        name for name in trained_parameters(get_peft_model(load_model(base), config)) if "multi_modal_projector" in name
    ]
    assert len(names) == len(list(projector.parameters()))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"target": "crossattention"}, "target: got 'crossattention', expected one of .*nearest: 'cross_attention'"),
        ({"rank": 0}, "rank: got 0, expected at least 1"),
        ({"alpha": 0}, "alpha: got 0, expected more than 0"),
        ({"dropout": 1.0}, "dropout: got 1.0, expected a share"),
    ],
)
def test_bad_settings_are_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}.*[.]$"):
        lora_config(**settings)


def test_on_a_model_in_half_precision_adapters_are_in_full(base, make_batch, trained_parameters):
    model = AgeVlmForConditionalGeneration.from_pretrained(base, dtype=torch.bfloat16)
    model = get_peft_model(model, lora_config("both", use_dora=True)).train()
    batch = make_batch((2, 1))
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for name, parameter in trained_parameters(model).items():
        assert parameter.grad.isfinite().all(), name
        assert ".lora_" not in name or parameter.dtype == torch.float32, name


# Where adapters go and come back from


def renamed(adapter: Path, base) -> None:
    """An adapter that calls another place its base."""
    settings = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    settings["base_model_name_or_path"] = str(base)
    (adapter / "adapter_config.json").write_text(json.dumps(settings), "utf-8")


@pytest.mark.parametrize("target, dora", EVERY_KIND)
@torch.no_grad()
def test_adapters_come_back_and_merge_into_a_whole_checkpoint(
    adapted, base, processor, make_batch, tmp_path, target, dora, load_model, trained_parameters
):
    batch = make_batch((2, 0, 1))
    model = adapted(target, use_dora=dora)
    expected, plain = model(**batch).logits, load_model(base)(**batch).logits
    assert (expected - plain).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, plain)
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(value.numel() for value in saved.values()) == sum(
        value.numel() for value in trained_parameters(model).values()
    )
    assert not list(tmp_path.rglob("model.safetensors"))
    for again in (
        PeftModel.from_pretrained(load_model(base), tmp_path / "adapter"),
        AutoPeftModel.from_pretrained(str(tmp_path / "adapter"), import_allowlist=["age_vlm"]),
    ):
        assert torch.equal(again.eval()(**batch).logits, expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-3, rtol=1e-4)
    whole, _ = load_checkpoint(save_checkpoint(merged, processor, tmp_path / "whole"))
    assert whole.state_dict().keys() == load_model(base).state_dict().keys()
    assert torch.equal(whole(**batch).logits, merged(**batch).logits)


@loads_adapters
@torch.no_grad()
def test_transformers_loads_lora_adapters_itself(adapted, base, make_batch, tmp_path, load_model):
    batch = make_batch((2, 0, 1))
    model = adapted("both")
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).logits, expected)
    added = load_model(base)
    added.load_adapter(tmp_path)
    assert torch.equal(added(**batch).logits, expected)
    added.disable_adapters()
    assert torch.equal(added(**batch).logits, load_model(base)(**batch).logits)


@loads_adapters
@torch.no_grad()
def test_transformers_loads_a_dora_adapter_right_or_not_at_all(adapted, make_batch, tmp_path):
    # transformers 5.23 leaves the magnitudes out, of a plain Llama's adapter too: weights are missing, which is refused.
    batch, model = make_batch((2, 0, 1)), adapted("both", use_dora=True)
    model.save_pretrained(tmp_path)
    try:
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    except ValueError as error:
        assert "lacks" in str(error) and "lora_magnitude_vector" in str(error)
    else:
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@loads_adapters
@torch.no_grad()
def test_adapters_lie_beside_a_whole_checkpoint(adapted, base, make_batch, tmp_path, load_model):
    batch = make_batch((1, 2))
    model = adapted()
    expected = model(**batch).logits
    whole = shutil.copytree(base, tmp_path / "whole")
    model.save_pretrained(whole / "adapter")
    assert torch.equal(load_model(whole)(**batch).logits, load_model(base)(**batch).logits), (
        "one in a folder below is not asked for"
    )
    assert torch.equal(PeftModel.from_pretrained(load_model(whole), whole / "adapter")(**batch).logits, expected)
    # In the same folder it is part of what the folder holds, and the base is the one beside it.
    model.save_pretrained(whole)
    renamed(whole, "someone/elsewhere")
    assert torch.equal(AutoModelForImageTextToText.from_pretrained(whole)(**batch).logits, expected)


@torch.no_grad()
def test_an_adapter_is_loaded_by_its_folder_alone(adapted, base, processor, make_batch, tmp_path):
    batch, model = make_batch((2, 0, 1)), adapted(use_dora=True)
    expected = model(**batch).logits
    folder = save_checkpoint(model, processor, tmp_path / "adapter", "# the card")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert (folder / "README.md").read_text("utf-8") == "# the card"
    assert not (folder / "model.safetensors").exists() and not (folder / "config.json").exists()
    model.save_pretrained(tmp_path / "bare")  # as a trainer saves it: the processor is the base model's
    for name in ("adapter", "bare"):
        loaded, its_processor = load_checkpoint(tmp_path / name)
        assert type(loaded) is AgeVlmForConditionalGeneration
        torch.testing.assert_close(loaded(**batch).logits, expected, atol=1e-3, rtol=1e-4)
        assert its_processor.chat_template == processor.chat_template
    renamed(shutil.copytree(folder, tmp_path / "orphan"), tmp_path / "gone")
    with pytest.raises(ValueError, match="^model: '.*orphan' could not be .*: its base model: '.*gone' could not be "):
        load_checkpoint(tmp_path / "orphan")


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_new_words_come_with_the_adapter(
    make_model, tokenizer, make_batch, tmp_path, tied, load_model, trained_parameters
):
    save = tmp_path / "base"
    make_model(text={"tie_word_embeddings": tied}).save_pretrained(save)
    model, words = load_model(save), [300, 301]
    model.resize_token_embeddings(302)
    rows = {"embed_tokens": words} if tied else {"embed_tokens": words, "lm_head": words}
    model = get_peft_model(model, lora_config("cross_attention", rank=3, trainable_token_indices=rows)).eval()
    for parameter in trained_parameters(model).values():
        parameter += 0.1 * torch.randn_like(parameter)
    batch = make_batch((1, 2))
    batch["input_ids"][:, -2:] = torch.tensor(words)
    expected = model(**batch).logits
    assert expected.shape[-1] == 302
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert max(len(value) for name, value in saved.items() if "token" in name or "head" in name) == 2
    fresh = load_model(save)
    fresh.resize_token_embeddings(302)
    assert torch.equal(PeftModel.from_pretrained(fresh, tmp_path / "adapter")(**batch).logits, expected)
    merged = model.merge_and_unload()
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == tied
    torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-3, rtol=1e-4)


@pytest.fixture
def uploads(monkeypatch):
    """The Hub's side of an upload: every commit's files, by repository. Only the network boundary is replaced."""
    recorded = {}

    def create_repo(self, repo_id, **kwargs):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            data = operation.path_or_fileobj
            content = data if isinstance(data, bytes) else Path(data).read_bytes()
            recorded.setdefault(repo_id, {})[operation.path_in_repo] = content
        url = f"https://huggingface.co/{repo_id}/commit/0"
        return huggingface_hub.CommitInfo(commit_url=url, commit_message="", commit_description="", oid="0")

    for function in (create_repo, create_commit):
        monkeypatch.setattr(huggingface_hub.HfApi, function.__name__, function)
        for module in list(sys.modules.values()):
            name = getattr(module, "__name__", "")
            bound = getattr(module, function.__name__, None) if name.startswith("transformers") else None
            if isinstance(getattr(bound, "__self__", None), huggingface_hub.HfApi):
                monkeypatch.setattr(module, function.__name__, function.__get__(huggingface_hub.HfApi()))
    return recorded


@torch.no_grad()
def test_a_pushed_adapter_is_an_adapter(adapted, base, make_batch, uploads, tmp_path, load_model):
    batch = make_batch((1, 0))
    model = adapted("both", use_dora=True)
    expected = model(**batch).logits
    model.push_to_hub("someone/adapter")
    files = uploads["someone/adapter"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files)
    assert not {"config.json", "model.safetensors"} & set(files)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert torch.equal(PeftModel.from_pretrained(load_model(base), tmp_path)(**batch).logits, expected)


@pytest.mark.parametrize("options", [{"use_cache": False}, {}, {"num_beams": 2}])
def test_generation_is_the_merged_model_s(adapted, make_batch, options):
    batch = make_batch((2, 0, 1))
    model = adapted("both", use_dora=True)
    answer = model.generate(**batch, max_new_tokens=5, do_sample=False, **options)
    assert answer.shape[1] > batch["input_ids"].shape[1]
    assert torch.equal(model.merge_and_unload().generate(**batch, max_new_tokens=5, do_sample=False, **options), answer)
