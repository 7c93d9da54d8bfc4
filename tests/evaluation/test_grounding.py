import pytest
import torch

from age_vlm.data.collator import AgeVlmCollator
from age_vlm.data.questions import EvaluationItem
from age_vlm.data.scene_datasets import scene_items
from age_vlm.data.schema import message_text, validate_sample
from age_vlm.evaluation.grounding import phrase_attention, phrase_samples


@pytest.fixture(scope="module")
def items():
    return scene_items("test", 4)


def test_samples_are_the_questions_about_what_can_be_seen(items):
    samples, questions = phrase_samples(items)
    first = {}
    for item in items:
        for question in item.questions:
            if question.mask is not None and question.phrase is not None:
                first.setdefault((item.image_id, question.text), question.id)
    expected = list(first.values())
    again = [EvaluationItem(item.image_id, item.image, item.questions * 2) for item in items]
    assert phrase_samples(again)[1] == questions
    assert [question.id for question in questions] == [sample["id"] for sample in samples] == expected
    assert 0 < len(samples) < sum(len(item.questions) for item in items)
    for sample, question in zip(samples, questions):
        validate_sample(sample)
        (grounding,) = sample["groundings"]
        said = message_text(sample["messages"][0])[grounding["start"] : grounding["end"]]
        assert said == question.text[slice(*question.phrase)]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_attention_is_that_of_each_phrase_alone(model, processor, items, batch_size):
    grid = model.image_grid(processor.image_geometry(64, 64).size)
    phrases = phrase_attention(model, processor, items, batch_size=batch_size)
    samples, questions = phrase_samples(items)
    blocks, heads = 2, model.config.text_config.num_attention_heads
    assert phrases.attention.shape == (len(samples), blocks, heads, grid[0] * grid[1])
    torch.testing.assert_close(phrases.attention.sum(-1), torch.ones(len(samples), blocks, heads))
    assert phrases.questions == questions
    assert not phrases.attention.requires_grad, "a whole data set's graph would be kept"
    collator = AgeVlmCollator(processor, grid)
    for number, sample in enumerate(samples):
        batch = collator([sample])
        rows, coverage = batch.pop("grounding_queries"), batch.pop("grounding_coverage")
        del batch["grounding_slots"], batch["labels"]
        with torch.no_grad():
            maps = model(**batch, cross_attention_queries=rows).cross_attention_maps
        torch.testing.assert_close(phrases.attention[number], torch.cat(maps), rtol=1e-4, atol=1e-5)
        assert torch.equal(phrases.coverage[number], coverage[0])


def test_scores_are_of_the_mean_over_blocks_and_heads(model, processor, items):
    phrases = phrase_attention(model, processor, items)
    mass, hits = phrases.scores([1], [0, 3])
    attention = phrases.attention[:, 1, [0, 3]].mean(1)
    torch.testing.assert_close(mass, (attention * phrases.coverage).sum(-1))
    best = attention.argmax(-1)
    assert hits.tolist() == [float(cover[cell] > 0) for cover, cell in zip(phrases.coverage, best)]
    # Attention that is the mask itself is inside it and points at it.
    phrases.attention = (phrases.coverage > 0).float()[:, None, None].expand_as(phrases.attention)
    phrases.attention = phrases.attention / phrases.attention.sum(-1, keepdim=True)
    assert phrases.scores([0], [0])[1].eq(1).all()


def test_nothing_to_point_at_is_one_sentence(model, processor, items):
    absent = tuple(question for question in items[0].questions if question.mask is None)
    with pytest.raises(ValueError, match="^items: got no question whose phrase has a mask"):
        phrase_attention(model, processor, [EvaluationItem("a", items[0].image, absent)])
