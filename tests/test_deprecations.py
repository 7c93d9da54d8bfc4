"""Nothing that we do is announced to stop working: no FutureWarning, no DeprecationWarning, no "deprecated" in a log."""

import logging
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from age_vlm import AgeVlmTrainer
from age_vlm.data.collator import AgeVlmCollator
from age_vlm.data.masks import encode_mask
from age_vlm.data.schema import assistant_message, grounding, user_message
from age_vlm.hub import save_checkpoint
from age_vlm.training.lora import lora_config


# What other libraries do among themselves.
NOT_OURS = (
    "Passing `generation_config` together",  # transformers 5.24, to its assistant model
    "`is_gradient_checkpointing` is deprecated",  # PEFT 0.21
    "__array__ implementation doesn't accept a copy keyword",  # pycocotools 2.0.11, to NumPy
)


@contextmanager
def nothing_is_announced(monkeypatch):
    logged = []

    class Keep(logging.Handler):
        def emit(self, record):
            logged.append(record.getMessage())

    handler, library = Keep(), logging.getLogger("transformers")
    library.addHandler(handler)
    # Said once a process, and then no more: here each time.
    for name in ("warning_once", "info_once"):
        monkeypatch.setattr(logging.Logger, name, lambda self, *args, **kwargs: self.warning(*args), raising=False)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield
    finally:
        library.removeHandler(handler)
    announced = [str(each.message) for each in warned if issubclass(each.category, (FutureWarning, DeprecationWarning))]
    announced += [said for said in logged if "deprecated" in said.lower()]
    assert [said for said in announced if not said.startswith(NOT_OURS)] == []


@pytest.fixture(scope="module")
def grounded_samples():
    """Two chats about an image each, one phrase grounded."""
    mask = np.zeros((40, 40), bool)
    mask[5:20, 5:20] = True
    asked, said = user_message("what is it?", images=1), assistant_message("a red box")
    return [
        {
            "id": str(number),
            "images": [Image.new("RGB", (40, 40), colour)],
            "messages": [asked, said],
            "groundings": [grounding(1, 2, 9, 0, encode_mask(mask))],
        }
        for number, colour in enumerate(("red", "blue"))
    ]


@pytest.fixture
def announcing(monkeypatch):
    transformers_logging.set_verbosity_info()
    with nothing_is_announced(monkeypatch):
        yield


def test_what_is_announced_is_seen(monkeypatch, model, make_batch, make_cache):
    for call in (
        lambda: model(**make_batch((1,)), past_key_values=make_cache("dynamic", model)),
        lambda: warnings.warn("gone in 6.0", FutureWarning, stacklevel=1),
        lambda: model(**make_batch((1,)), use_cache=True).past_key_values,
    ):
        with pytest.raises(AssertionError, match=r"past_key_values|gone in 6\.0"), nothing_is_announced(monkeypatch):
            call()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": True},
        {"num_beams": 2},
        {"num_beams": 2, "do_sample": True},
        {"num_return_sequences": 2, "do_sample": True},
        {"prompt_lookup_num_tokens": 2},
        {"cache_implementation": "static", "disable_compile": True},
        {"use_cache": False},
        {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
        {"max_new_tokens": 4, "stop_strings": ["no"]},
    ],
    ids=str,
)
def test_generate(announcing, model, make_batch, tokenizer, settings):
    extra = {"tokenizer": tokenizer} if "stop_strings" in settings else {}
    model.generate(**make_batch((1,)), **{"max_new_tokens": 3, **settings}, **extra)


def test_assisted_and_continued_generation(announcing, make_model, make_batch, make_cache):
    model, batch = make_model(), make_batch((1,))
    model.generate(**batch, assistant_model=make_model(seed=1), max_new_tokens=3, do_sample=False)
    cache = make_cache("dynamic", model)
    answer = model.generate(**batch, cache=cache, max_new_tokens=3, do_sample=False)
    turn = torch.cat([answer, torch.tensor([[9, 20]])], dim=1)
    model.generate(turn, cache=cache, max_new_tokens=2, do_sample=False)


def test_saving_loading_and_the_pipeline_of_inputs(announcing, make_model, processor, tmp_path):
    folder = save_checkpoint(make_model(), processor, tmp_path / "checkpoint")
    AutoProcessor.from_pretrained(folder)
    AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", [AgeVlmTrainer, Trainer])
@pytest.mark.parametrize("how", ["plain", "checkpointing", "lora"])
def test_a_training_step_and_an_evaluation(announcing, make_model, processor, grounded_samples, tmp_path, kind, how):
    model = make_model()
    arguments = TrainingArguments(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=2,
        activation_checkpointing=how == "checkpointing",
        activation_checkpointing_kwargs={"use_reentrant": False} if how == "checkpointing" else None,
        label_smoothing_factor=0.1,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    collator = AgeVlmCollator.from_model(model, processor)
    samples = grounded_samples
    if kind is Trainer:
        samples = [{**sample, "groundings": []} for sample in samples]
    if how == "lora":
        from peft import get_peft_model

        model = get_peft_model(model, lora_config(rank=2))
    trainer = kind(model, arguments, train_dataset=samples, eval_dataset=samples, data_collator=collator)
    trainer.train()
    trainer.evaluate()
