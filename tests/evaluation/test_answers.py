import numpy as np
import pytest
import torch
from PIL import Image

from age_vlm.data.questions import EvaluationItem, Question
from age_vlm.evaluation.answers import generate_answers, yes_scores


def items_of(count, questions):
    rng = np.random.default_rng(0)
    for number in range(count):
        image = Image.fromarray(rng.integers(0, 256, (20 + number, 32, 3), dtype=np.uint8))
        asked = tuple(
            Question(f"{number}/{place}", str(number), text, "yes", "existence") for place, text in enumerate(questions)
        )
        yield EvaluationItem(str(number), image, asked)


ITEMS = list(items_of(3, ["is there a dog?", "dog?", "how many dogs and how many cats are in the picture?"]))


def one_by_one(processor):
    for item in ITEMS:
        for question in item.questions:
            message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}
            text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
            yield (
                question.id,
                processor(images=[item.image], text=[text], return_tensors="pt", add_special_tokens=False),
            )


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_scores_are_those_of_each_question_alone(model, processor, batch_size):
    yes, no = (processor.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("yes", "no"))
    scores = yes_scores(model, processor, ITEMS, batch_size=batch_size)
    assert len(scores) == 9
    with torch.no_grad():
        for name, inputs in one_by_one(processor):
            logits = model(**inputs).logits[0, -1]
            assert scores[name] == pytest.approx(float(logits[yes] - logits[no]), abs=1e-3)


@pytest.mark.parametrize("batch_size", [2, 100])
def test_answers_are_those_of_each_question_alone(model, processor, batch_size):
    answers = generate_answers(model, processor, ITEMS, batch_size=batch_size, max_new_tokens=3)
    for name, inputs in one_by_one(processor):
        generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answers[name] == processor.tokenizer.decode(generated, skip_special_tokens=True).strip()
    assert len(set(answers.values())) > 1


def test_a_model_in_training_stays_in_training(make_model, processor):
    model = make_model().train()
    for function in (yes_scores, generate_answers):
        function(model, processor, ITEMS[:1])
        assert model.training
    model.eval()
    yes_scores(model, processor, ITEMS[:1])
    assert not model.training


def test_nothing_asked_is_nothing_answered(model, processor):
    assert yes_scores(model, processor, []) == {} == generate_answers(model, processor, [])
