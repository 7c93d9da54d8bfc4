import dataclasses
import math

import pytest
import torch

from age_vlm.commands.build import build_model
from age_vlm.commands.recipe import DataRecipe, ModelRecipe
from age_vlm.commands.sources import load_source
from age_vlm.data.scene_datasets import scene_items
from age_vlm.evaluation.answers import generate_answers, yes_scores
from age_vlm.evaluation.benchmark import answer_metrics, grounding_metrics, presence_metrics, split_items
from age_vlm.evaluation.grounding import phrase_attention
from age_vlm.training import AlignmentConfig


@pytest.fixture(scope="module")
def items():
    return scene_items("test", 6)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model, processor = build_model(ModelRecipe(), load_source(DataRecipe(train=1, validation=1, test=1), 0))
    return model.eval(), processor


def test_splitting_keeps_images_that_have_such_questions(items):
    counts = split_items(items, lambda question: question.kind == "relation")
    assert all(q.kind == "relation" for item in counts for q in item.questions)
    kept = {q.id for item in counts for q in item.questions}
    assert kept == {q.id for item in items for q in item.questions if q.kind == "relation"}
    assert split_items(items, lambda question: False) == []


def test_metrics_are_those_of_the_answers(tiny, items):
    model, processor = tiny
    metrics, answers = answer_metrics(model=model, processor=processor, items=items)
    questions = [question for item in items for question in item.questions]
    assert answers == generate_answers(*tiny, items) and set(answers) == {q.id for q in questions}
    for kind in ("count", "colour", "relation"):
        right = [answers[q.id] == q.answer for q in questions if q.kind == kind]
        assert metrics[f"{kind}/accuracy"] == pytest.approx(sum(right) / len(right))
    for mode in ("random", "popular", "adversarial"):
        asked = [q for q in questions if q.mode == mode]
        # POPE's scorer: whatever is not a no is a yes.
        said = ["no" if {"no", "not"} & set(answers[q.id].replace(",", "").split()) else "yes" for q in asked]
        right = [answer == q.answer for answer, q in zip(said, asked)]
        assert metrics[f"pope/{mode}/accuracy"] == pytest.approx(sum(right) / len(right))
        assert metrics[f"pope/{mode}/yes_ratio"] == pytest.approx(said.count("yes") / len(said))
        assert 0 <= metrics[f"pope/{mode}/f1"] <= 1


def test_grounding_metrics_are_of_the_aligned_blocks_and_heads(tiny, items):
    model, processor = tiny
    phrases = phrase_attention(model, processor, items)
    for layers, heads, chosen in (([0], "half", [0, 1]), ([0, 1], "all", [0, 1, 2, 3]), ([1], [2], [2])):
        metrics = grounding_metrics(model, processor, items, AlignmentConfig(layers=layers, heads=heads))
        mass, hits = phrases.scores(layers, chosen)
        assert metrics == {"attention_mass": float(mass.mean()), "pointing_accuracy": float(hits.mean())}


def test_presence_is_told_per_thing_asked_about(tiny, items):
    # Existence questions without a mode, about two kinds of thing.
    def about(question, name):
        start = question.text.index(question.subject)
        text = question.text[:start] + name + question.text[question.phrase[1] :]
        return dataclasses.replace(question, text=text, phrase=(start, start + len(name)), mode=None)

    asked = []
    for number, item in enumerate(items):
        existence = [q for q in item.questions if q.kind == "existence"][:2]
        questions = tuple(about(q, ("red circle", "blue square")[place]) for place, q in enumerate(existence))
        flipped = tuple(
            dataclasses.replace(q, answer=("yes", "no")[(number + place) % 2]) for place, q in enumerate(questions)
        )
        asked.append(dataclasses.replace(item, questions=flipped))
    scores = yes_scores(*tiny, asked)
    values = []
    for place in (0, 1):
        answers = {
            answer: [scores[i.questions[place].id] for i in asked if i.questions[place].answer == answer]
            for answer in ("yes", "no")
        }
        pairs = [(a > b) + 0.5 * (a == b) for a in answers["yes"] for b in answers["no"]]
        values.append(sum(pairs) / len(pairs))
    metrics = presence_metrics(scores, asked)
    assert metrics["macro_auc"] == pytest.approx(sum(values) / 2)
    assert metrics["class_auc"] == pytest.approx({"red circle": values[0], "blue square": values[1]})
    assert sum(metrics["present"].values()) + sum(metrics["absent"].values()) == 2 * len(asked)
    assert math.isnan(presence_metrics(scores, items)["macro_auc"])  # all have a mode
