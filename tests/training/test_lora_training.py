"""The trainer trains adapters as it trains the whole weights, and saves them alone."""

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from transformers import PrinterCallback, TrainingArguments

from age_vlm.data.collator import AgeVlmCollator
from age_vlm.data.schema import assistant_message, grounding, user_message
from age_vlm.modeling_agevlm.cross_attention_agevlm import AgeVlmGate
from age_vlm.training import AgeVlmTrainer, AlignmentConfig
from age_vlm.training.lora import lora_config


def talk(number, groundings):
    rng = np.random.default_rng(number)
    messages = [
        user_message("is there a dog or a cat" + "?" * number, images=1),
        assistant_message("yes" * (1 + number)),
    ]
    spans = [(11, 16), (20, 23)][:groundings]
    image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    masks = [rng.random((32, 32)) > 0.7 for _ in spans]
    return {
        "id": str(number),
        "images": [image],
        "messages": messages,
        "groundings": [grounding(0, *span, 0, mask) for span, mask in zip(spans, masks)],
    }


TALKS = [talk(0, 2), talk(1, 0), talk(2, 1), talk(3, 2)]
RATE = 0.05


@pytest.fixture
def make_trainer(base, processor, tmp_path, load_model):
    """Model and settings -> a trainer of it on the same samples in the same order."""
    collator = AgeVlmCollator.from_model(load_model(base), processor, independent_turns=True)

    def make(model, steps=1, weight=0.7, **arguments):
        settings = {
            "output_dir": str(tmp_path / "trainer"),
            "max_steps": steps,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "remove_unused_columns": False,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "optim": "sgd",
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            **arguments,
        }
        trainer = AgeVlmTrainer(
            model,
            TrainingArguments(**settings),
            train_dataset=TALKS,
            eval_dataset=TALKS,
            data_collator=collator,
            alignment=AlignmentConfig(weight=weight, layers=[0, 1], heads="all"),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    return make


@pytest.fixture
def new_adapter(base, load_model):
    """Target and settings -> the checkpoint with an adapter at its start."""

    def make(target="both", **settings) -> PeftModel:
        torch.manual_seed(0)
        return get_peft_model(load_model(base), lora_config(target, rank=3, **settings))

    return make


@pytest.fixture
def after(trained_parameters):
    """Trainer -> what it trains, once it is trained."""

    def run(trainer) -> dict[str, torch.Tensor]:
        trainer.train()
        return {name: parameter.detach().clone() for name, parameter in trained_parameters(trainer.model).items()}

    return run


def test_the_trainer_gives_adapters_the_gradients_of_the_whole_weights(base, make_trainer, new_adapter, load_model):
    """dL/dB = scale * dL/dW A^T: the reference is the full fine-tuning of the same model on the same samples."""
    start = load_model(base)
    whole, unaligned = (make_trainer(load_model(base), weight=weight) for weight in (0.7, 0.0))
    for trainer in (whole, unaligned):
        trainer.train()
    model = new_adapter()
    trainer = make_trainer(model)
    trainer.train()
    differ = 0
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            first, second = module.lora_A["default"].weight, module.lora_B["default"].weight
            steps = [
                other.model.get_submodule(name).weight - start.get_submodule(name).weight
                for other in (whole, unaligned)
            ]
            expected, without = (module.scaling["default"] * step @ first.T for step in steps)
            torch.testing.assert_close(
                second, expected, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
            if "cross_attention.attn.q_proj" in name:
                differ += not torch.allclose(second, without, rtol=1e-2, atol=1e-4)
    assert differ == 2, "the alignment loss reaches the adapters of both blocks"
    gates = [(name, module) for name, module in start.named_modules() if isinstance(module, AgeVlmGate)]
    for name, _ in gates:
        gate = model.get_base_model().get_submodule(name).modules_to_save["default"].weight
        torch.testing.assert_close(gate, whole.model.get_submodule(name).weight, rtol=1e-4, atol=1e-6)
    lines = [trainer.state.log_history[0], whole.state.log_history[0]]
    for key in ("loss", "lm_loss", "alignment_loss", "attention_mass", "pointing_accuracy"):
        assert lines[0][key] == pytest.approx(lines[1][key], rel=1e-4), key
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("target", ["cross_attention", "language_model"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_trains_adapters_alike(
    make_trainer, new_adapter, after, target, reentrant, trained_parameters
):
    plain = after(make_trainer(new_adapter(target)))
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    trainer = make_trainer(new_adapter(target), **options)
    checkpointed = after(trainer)
    assert all(layer.gradient_checkpointing for layer in trainer.model.get_base_model().model.language_model.layers)
    start = {name: value.detach() for name, value in trained_parameters(new_adapter(target)).items()}
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, rtol=1e-4, atol=1e-6, msg=name)
        assert ".lora_A." in name or not torch.equal(value, start[name]), name


def test_the_trainer_saves_the_adapter_alone_and_goes_on_from_it(
    base, make_trainer, new_adapter, after, make_batch, tmp_path, load_model, trained_parameters
):
    options = {"optim": "adamw_torch", "learning_rate": 1e-3}
    straight = after(make_trainer(new_adapter(), steps=3, **options))
    trainer = make_trainer(new_adapter(), steps=3, save_strategy="steps", save_steps=2, **options)
    trainer.train()
    first = tmp_path / "trainer" / "checkpoint-2"
    assert (first / "adapter_model.safetensors").is_file() and not list(tmp_path.rglob("model*.safetensors"))
    again = make_trainer(new_adapter(), steps=3, **options)
    again.train(resume_from_checkpoint=str(first))
    for name, value in trained_parameters(again.model).items():
        torch.testing.assert_close(value.detach(), straight[name], msg=name)
    trainer.save_model(tmp_path / "adapter")
    batch = make_batch((1,))
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
        assert torch.equal(PeftModel.from_pretrained(load_model(base), tmp_path / "adapter")(**batch).logits, expected)
