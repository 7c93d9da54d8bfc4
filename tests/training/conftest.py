"""Eight talks that are uneven, trainers of a tiny model on them, what their losses come to by hand, and a checkpoint to adapt."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PrinterCallback, Trainer, TrainingArguments

from age_vlm import AgeVlmForConditionalGeneration
from age_vlm.data.collator import GROUNDING_KEYS, AgeVlmCollator
from age_vlm.data.schema import assistant_message, grounding, user_message
from age_vlm.hub import save_checkpoint
from age_vlm.modeling_agevlm.attention_maps_agevlm import attention_on_images
from age_vlm.training import AgeVlmTrainer, AlignmentConfig
from age_vlm.training.alignment import alignment_losses


ALIGNMENT = AlignmentConfig(weight=0.7, layers=[0, 1])
SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def _talk(number, groundings, images=1, mask=None):
    """Uneven texts, answers and numbers of masks, so that a mean of means is not the mean."""
    rng = np.random.default_rng(number)
    question = "is there a dog, a cat or a fox" + "?" * (number % 4)
    messages = [user_message(question, images=images), assistant_message("yes" * (1 + number % 3))]
    messages += [user_message("which one?"), assistant_message("the fox")]
    spans = [(0, 11, 16), (0, 18, 23), (3, 0, 7)][:groundings]
    masks = [rng.random((32, 32)) > 0.7 if mask is None else mask for _ in spans]
    return {
        "id": str(number),
        "images": [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(images)],
        "messages": messages,
        "groundings": [grounding(m, start, end, 0, mask) for (m, start, end), mask in zip(spans, masks)],
    }


@pytest.fixture(scope="session")
def talk():
    return _talk


TALKS = [
    _talk(0, 3),
    _talk(1, 0),
    _talk(2, 1),
    _talk(3, 0, images=0),
    _talk(4, 2),
    _talk(5, 0),
    _talk(6, 1),
    _talk(7, 3),
]


@pytest.fixture
def make_trainer(make_model, processor, tmp_path):
    """Settings -> a trainer of the same model on the same samples in the same order."""
    grid = make_model().image_grid(processor.image_geometry(64, 64).size)

    def make(
        batch=8,
        accumulation=1,
        steps=1,
        talks=TALKS,
        cls=AgeVlmTrainer,
        alignment=ALIGNMENT,
        learning_rates=None,
        model=None,
        independent=True,
        options=None,
        **arguments,
    ):
        settings = {
            "output_dir": str(tmp_path / "trainer"),
            "max_steps": steps,
            "per_device_train_batch_size": batch,
            "per_device_eval_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "remove_unused_columns": False,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **SGD,
            **arguments,
        }
        collator = AgeVlmCollator(processor, grid, independent_turns=independent)
        if cls is Trainer:
            kwargs = {"data_collator": lambda samples: _without_masks(collator(samples))}
        else:
            kwargs = {"data_collator": collator, "alignment": alignment, "learning_rates": learning_rates}
        model = make_model() if model is None else model
        kwargs |= options or {}
        trainer = cls(model, TrainingArguments(**settings), train_dataset=talks, eval_dataset=talks, **kwargs)
        trainer.remove_callback(PrinterCallback)
        return trainer

    return make


def _without_masks(batch):
    return {key: value for key, value in batch.items() if key not in GROUNDING_KEYS}


@pytest.fixture(scope="session")
def without_masks():
    return _without_masks


def _weights_after(trainer):
    trainer.train()
    return {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}


@pytest.fixture(scope="session")
def weights_after():
    return _weights_after


def _assert_same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.fixture(scope="session")
def assert_same():
    return _assert_same


def _losses_of(model, collator, talks):
    """(sum over tokens of the language modelling loss, tokens, alignment loss of each grounding), sample by sample."""
    total, tokens, aligned = 0.0, 0, []
    for sample in talks:
        batch = collator([sample])
        grounding = {key: batch.pop(key) for key in GROUNDING_KEYS if key in batch}
        labels = batch["labels"]
        outputs = model(**batch, cross_attention_queries=grounding.get("grounding_queries"), use_cache=False)
        shifted = labels[:, 1:].flatten()
        total = total + torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), shifted, reduction="sum"
        )
        tokens += int((shifted != -100).sum())
        if grounding:
            coverage = grounding["grounding_coverage"]
            attention = attention_on_images(
                outputs.cross_attention_maps, grounding["grounding_slots"], coverage.shape[-1], ALIGNMENT.layers
            )
            aligned.append(alignment_losses(attention, coverage, ALIGNMENT))
    return total, tokens, torch.cat(aligned)


@pytest.fixture(scope="session")
def losses_of():
    return _losses_of


class Poisoned:
    """A collator whose batches with one of some samples have pixels that are no numbers."""

    def __init__(self, collator, names):
        self.collator, self.names = collator, names

    def __call__(self, samples):
        batch = self.collator(samples)
        if any(sample["id"] in self.names for sample in samples):
            batch["pixel_values"] = batch["pixel_values"] * float("nan")
        return batch


@pytest.fixture(scope="session")
def poisoned_collator():
    return Poisoned


@pytest.fixture(scope="session")
def eight_talks():
    return TALKS


@pytest.fixture(scope="session")
def alignment():
    """What the trainers align with, unless they are told otherwise."""
    return ALIGNMENT


@pytest.fixture(scope="session")
def sgd():
    """Settings of an optimizer whose step is the gradient times the learning rate."""
    return SGD


# Adapters


@pytest.fixture(scope="module")
def base(tmp_path_factory, make_model, processor) -> Path:
    """Folder of a whole checkpoint."""
    return save_checkpoint(make_model(), processor, tmp_path_factory.mktemp("base") / "checkpoint")


def _load(folder) -> AgeVlmForConditionalGeneration:
    return AgeVlmForConditionalGeneration.from_pretrained(folder)


@pytest.fixture(scope="session")
def load_model():
    return _load


def _trained(model) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture(scope="session")
def trained_parameters():
    return _trained
