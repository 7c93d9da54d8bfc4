"""`age-vlm check` passes a model that is right, and fails one for each way in which a release could make it wrong."""

import subprocess
import sys

import pytest
import torch

from age_vlm.cli import main
from age_vlm.commands import check as module
from age_vlm.commands.check import Checks, Result, load_for_check, package_versions
from age_vlm.hub import save_checkpoint
from age_vlm.modeling_agevlm import cross_attention_agevlm, generation_agevlm
from age_vlm.modeling_agevlm.cache_agevlm import ImageCacheLayerMixin


@pytest.fixture(autouse=True)
def without_flex(monkeypatch):
    """It compiles for half a minute; one test has it."""
    monkeypatch.setattr(module, "is_torch_flex_attn_available", lambda: False)


@pytest.fixture
def checks(make_model, processor):
    return Checks(make_model(text={"attention_dropout": 0.0}), processor)


def failed(results) -> set[str]:
    return {result.name for result in results if result.passed is False}


def test_a_model_that_is_right_passes(checks):
    results = list(checks.all())
    assert len(results) == 12 and all(isinstance(result, Result) for result in results)
    assert not failed(results), results


def test_flex_attention_is_checked_where_it_is(checks, monkeypatch):
    monkeypatch.setattr(module, "is_torch_flex_attn_available", lambda: True)
    assert [result.name for result in checks.backends()] == ["sdpa as eager", "flex_attention as eager"]


def lose_cached_images(monkeypatch):
    keep = ImageCacheLayerMixin.update_images
    monkeypatch.setattr(
        ImageCacheLayerMixin,
        "update_images",
        lambda self, keys, values, positions: keep(self, keys, 0 * values, positions),
    )


def shift_text(monkeypatch):
    forward = cross_attention_agevlm.AgeVlmTextModel.forward

    def shifted(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        outputs["last_hidden_state"] = outputs.last_hidden_state * 1.0001
        return outputs

    monkeypatch.setattr(cross_attention_agevlm.AgeVlmTextModel, "forward", shifted)


def mix_up_beams(monkeypatch):
    monkeypatch.setattr(ImageCacheLayerMixin, "batch_repeat_interleave", lambda self, repeats: None)
    reorder = ImageCacheLayerMixin._map_images
    monkeypatch.setattr(
        ImageCacheLayerMixin, "_map_images", lambda self, function: reorder(self, lambda states: function(states) * 0)
    )


def other_backend(monkeypatch):
    monkeypatch.setattr(cross_attention_agevlm, "image_attention_implementation", lambda config: "sdpa")
    attention = cross_attention_agevlm.AgeVlmCrossAttention.forward

    def forward(self, *args, **kwargs):
        output, *others = attention(self, *args, **kwargs)
        return (output * (1.1 if self.config._attn_implementation == "eager" else 1.0), *others)

    monkeypatch.setattr(cross_attention_agevlm.AgeVlmCrossAttention, "forward", forward)


def round_in_halves(monkeypatch):
    gate = cross_attention_agevlm.AgeVlmGate.forward
    monkeypatch.setattr(
        cross_attention_agevlm.AgeVlmGate,
        "forward",
        lambda self, states: gate(self, states) * (1 if states.dtype == torch.float32 else 3),
    )


def save_other_weights(monkeypatch):
    save = module.save_checkpoint

    def save_changed(model, processor, folder):
        with torch.no_grad():
            model.lm_head.weight.mul_(1.1)
        try:
            return save(model, processor, folder)
        finally:
            with torch.no_grad():
                model.lm_head.weight.div_(1.1)

    monkeypatch.setattr(module, "save_checkpoint", save_changed)


@pytest.mark.parametrize(
    ("fault", "check", "names"),
    [
        (lose_cached_images, "cached", {"with a dynamic cache as without", "with a static cache as without"}),
        (lose_cached_images, "decoding", {"prompt lookup, as without a cache", "static cache, as without a cache"}),
        (shift_text, "text_alone", {"text alone as plain Llama"}),
        (mix_up_beams, "decoding", {"one beam of two, as without a cache"}),
        (other_backend, "backends", {"sdpa as eager"}),
        (round_in_halves, "dtypes", {"bfloat16 as float32", "float16 as float32"}),
        (save_other_weights, "saved", {"saved and loaded", "by the code it carries, in a new process"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_fault_fails(checks, monkeypatch, fault, check, names):
    fault(monkeypatch)
    assert failed(getattr(checks, check)()) >= names


def test_padding_that_is_seen_fails(checks, monkeypatch):
    checks.reference = checks._logits(
        checks.model, {**checks.batch, "attention_mask": torch.ones_like(checks.batch["attention_mask"])}
    )
    assert failed(checks.alone()) == {"in a batch as alone"}


def test_an_exception_is_a_failed_check_and_not_the_end(checks, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise TypeError("got an unexpected keyword argument 'kv'")

    monkeypatch.setattr(generation_agevlm.AgeVlmGenerationMixin, "generate", refuse)
    results = list(checks.all())
    broken = {result.name: result.detail for result in results if result.passed is False}
    assert set(broken) == {"with a cache as without", "other ways to decode"}
    assert set(broken.values()) == {"TypeError: got an unexpected keyword argument 'kv'"}


def test_closed_gates_are_opened(make_model, processor, tmp_path):
    save_checkpoint(make_model(cross_attention_gate_init=0.0), processor, tmp_path / "closed")
    model, _, shown = load_for_check(tmp_path / "closed")
    assert shown.endswith("its closed gates opened")
    assert all(
        gate.all() for name, gate in model.named_parameters() if name.split(".")[-2] in ("attn_gate", "mlp_gate")
    )


def test_without_the_repository_a_random_model_is_checked(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "bundled_checkpoint", lambda: tmp_path / "absent")
    model, processor, shown = load_for_check(None)
    assert shown.startswith("a small model with random weights")
    assert not failed(Checks(model, processor).cached())


def test_versions_stand_beside_their_ranges(monkeypatch):
    packages = {name: (installed, wanted, inside) for name, installed, wanted, inside in package_versions()}
    assert {"torch", "transformers", "timm", "peft", "accelerate", "datasets"} <= set(packages)
    assert "pytest" not in packages, "extras are not what a model runs on"
    version = module.importlib.metadata.version
    monkeypatch.setattr(
        module.importlib.metadata, "version", lambda name: "5.99.0" if name == "transformers" else version(name)
    )
    outside = [name for name, *_, inside in package_versions() if not inside]
    assert outside == ["transformers"]


def test_the_command_prints_tables_and_its_exit_code(capsys, make_model, processor, tmp_path, monkeypatch):
    folder = save_checkpoint(make_model(), processor, tmp_path / "model[1]")
    assert main(["check", "--model", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "transformers" in printed and "All 12 checks passed." in printed and "FAILED" not in printed
    shift_text(monkeypatch)
    with pytest.raises(SystemExit) as ended:
        main(["check", "--model", str(folder)])
    assert ended.value.code == 1
    assert "1 of 12 checks failed." in capsys.readouterr().out


def test_no_model_is_one_sentence(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "age_vlm", "check", "--model", tmp_path / "absent"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("age-vlm: model: ")
