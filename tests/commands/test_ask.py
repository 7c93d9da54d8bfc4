import logging
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.utils import logging as transformers_logging

from age_vlm.commands.ask import FUNCTION_WORDS, ask, load
from age_vlm.hub import save_checkpoint


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


QUESTION = "Is there a RED circle, to the left of the 2 red-blue cars?"


def test_words_are_the_content_words_in_order_with_a_map_each(model, processor, picture):
    answer = ask(model, processor, picture, QUESTION, max_new_tokens=5)
    said = re.findall(r"[^\W_]+", answer.text)
    words = ["RED", "circle", "left", "2", "red", "blue", "cars"]
    assert [word for word, _ in answer.words] == words + [word for word in said if word.lower() not in FUNCTION_WORDS]
    for _, attention in answer.words:
        assert tuple(attention.shape) == model.image_grid(processor.image_geometry(64, 64).size)
        assert float(attention.sum()) == pytest.approx(1, abs=1e-4) and (attention >= 0).all()
    assert answer.image.size == picture.size


def test_the_answer_is_what_generation_says(model, processor, picture):
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    inputs = processor(images=[picture], text=[text], return_tensors="pt", add_special_tokens=False)
    generated = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = processor.tokenizer.decode(generated, skip_special_tokens=True).strip()
    assert ask(model, processor, picture, QUESTION, max_new_tokens=5).text == expected


def test_maps_are_of_the_blocks_and_heads_that_were_aligned(make_model, processor, picture):
    model = make_model()
    model.config.alignment = {"form": "kl", "weight": 0.1, "layers": [1], "heads": [3]}
    question = "is there a circle"
    answer = ask(model, processor, picture, question, max_new_tokens=1)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    text = processor.apply_chat_template([message], tokenize=False)
    inputs = processor(images=[picture], text=[text], return_tensors="pt", add_special_tokens=False)
    # Tokens are bytes: the last one of the question stands before the end of the turn.
    last = inputs["input_ids"].shape[1] - 2
    with torch.no_grad():
        maps = model(**inputs, cross_attention_queries=torch.tensor([[0, last]])).cross_attention_maps
    word, attention = answer.words[0]
    assert word == "circle"
    torch.testing.assert_close(attention.flatten(), maps[1][0, 3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("answer_queries", ["read", "predict"])
def test_a_word_of_the_answer_has_the_map_of_the_query_that_was_aligned(make_model, processor, picture, answer_queries):
    model = make_model(alignment={"answer_queries": answer_queries})
    said = processor.tokenizer("dog in", add_special_tokens=False)["input_ids"]
    # Says the same whatever it sees, and is cut off.
    answers = iter([*said, said[0]])
    model.generation_config.eos_token_id = None
    generate = model.generate
    model.generate = lambda **kw: generate(**kw, prefix_allowed_tokens_fn=lambda *_: [next(answers)])
    answer = ask(model, processor, picture, "is it", max_new_tokens=len(said))
    assert answer.text == "dog in" and [word for word, _ in answer.words] == ["dog"]
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is it"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    seen = text + ("dog" if answer_queries == "read" else "")
    inputs = processor(images=[picture], text=[seen], return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        expected = model.attention_maps(torch.tensor([[0, inputs["input_ids"].shape[1] - 1]]), **inputs)[0]
    torch.testing.assert_close(answer.words[0][1], expected, rtol=1e-3, atol=1e-5)


def test_a_sheet_is_painted_and_can_be_written(model, processor, picture, tmp_path):
    answer = ask(model, processor, picture, QUESTION, max_new_tokens=2)
    answer.sheet(QUESTION).save(tmp_path / "overlay.png")
    with Image.open(tmp_path / "overlay.png") as sheet:
        assert len(sheet.getcolors(1 << 24)) > 100


def test_a_question_of_function_words_has_no_maps(model, processor, picture):
    answer = ask(model, processor, picture, "what is it?", max_new_tokens=1)
    content = [word for word in re.findall(r"[^\W_]+", answer.text) if word.lower() not in FUNCTION_WORDS]
    assert [word for word, _ in answer.words] == content


@pytest.mark.parametrize("kind", ["path", "array", "tensor"])
def test_images_of_every_kind(model, processor, picture, tmp_path, kind):
    picture.save(tmp_path / "image.png")
    given = {
        "path": tmp_path / "image.png",
        "array": np.asarray(picture),
        "tensor": torch.from_numpy(np.array(picture)).permute(2, 0, 1),
    }[kind]
    answer, expected = (ask(model, processor, each, "a dog?", max_new_tokens=2) for each in (given, picture))
    assert answer.text == expected.text and np.array_equal(answer.image, expected.image)
    assert torch.equal(answer.words[0][1], expected.words[0][1])


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question_is_one_sentence(model, processor, picture, question):
    with pytest.raises(ValueError, match="^question: got an empty text, expected a question.$"):
        ask(model, processor, picture, question)


def test_a_saved_model_answers_as_before(make_model, processor, picture, tmp_path):
    model = make_model()
    save_checkpoint(model, processor, tmp_path / "checkpoint")
    expected = ask(model, processor, picture, QUESTION, max_new_tokens=4)
    answer = ask(*load(tmp_path / "checkpoint"), picture, QUESTION, max_new_tokens=4)
    assert answer.text == expected.text
    for (word, attention), (other, reference) in zip(answer.words, expected.words, strict=True):
        assert word == other
        torch.testing.assert_close(attention, reference)


def test_transformers_has_nothing_to_say(model, processor, picture, caplog, monkeypatch):
    """It logs, once, what of a call to `generate` is deprecated."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    transformers_logging.warning_once.cache_clear()
    ask(model, processor, picture, QUESTION, max_new_tokens=2)
    assert not caplog.text
