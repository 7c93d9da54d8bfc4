"""Turns and texts that are packed learn what each alone would."""

import pytest
import torch

from age_vlm.data.collator import GROUNDING_KEYS, AgeVlmCollator
from age_vlm.data.schema import assistant_message, message_text, user_message
from age_vlm.modeling_agevlm.attention_maps_agevlm import attention_on_images
from age_vlm.processing import AgeVlmProcessor
from age_vlm.training import AlignmentConfig
from age_vlm.training.alignment import alignment_losses


@torch.no_grad()
def test_packed_turns_learn_exactly_what_each_turn_alone_would(
    model, processor, make_collator, picture, sample, turns, three_turns
):
    talks = [sample(three_turns, [picture(0)]), sample(turns(("what is it?", "a frog")), [picture(1)], name="two")]
    packed = make_collator(independent_turns=True)(talks)
    assert packed["input_ids"].shape[0] == 2 and "attention_mask" not in packed
    outputs = model(**packed, num_items_in_batch=1, use_cache=False)

    alone, losses = make_collator(), []
    for talk in talks:
        for start in range(0, len(talk["messages"]), 2):
            question, answer = talk["messages"][start : start + 2]
            messages = [user_message(message_text(question), images=1), answer]
            losses.append(model(**alone([sample(messages, talk["images"])]), num_items_in_batch=1).loss)
    assert len(losses) == 4
    torch.testing.assert_close(outputs.loss, sum(losses), rtol=1e-5, atol=1e-4)
    # And each token of a turn in particular, not only in sum.
    last = model(**alone([sample([user_message("what else?", 1), three_turns[-1]], [picture(0)])])).logits[0]
    length = int((packed["input_ids"][0] != processor.tokenizer.pad_token_id).sum())
    assert length == packed["input_ids"].shape[1]
    torch.testing.assert_close(outputs.logits[0, -len(last) :], last, rtol=1e-4, atol=1e-4)


def test_packed_groundings_point_at_their_own_turn(
    processor, make_collator, picture, phrase, sample, turns, three_turns, aligned_tokens
):
    talk = turns(("a dog?", "a dog"), ("a dog?", "a dog"))
    groundings = [phrase(talk, message, "dog") for message in range(4)]
    batch = make_collator(independent_turns=True)(
        [sample(three_turns, [picture(0)]), sample(talk, [picture(1)], groundings)]
    )
    places, texts = aligned_tokens(processor, batch)
    assert texts == ["g"] * 4
    assert [row for row, _, _ in places] == [1] * 4
    positions = batch["position_ids"][1, [place for _, place, _ in places]].tolist()
    assert positions[:2] == positions[2:] and places[1][1] < places[2][1]
    # Both rows have one image, seen by three and by two questions.
    assert batch["image_indices"].tolist() == [0, 0, 0, 1, 1]


@pytest.fixture
def uneven(picture, phrase, sample, turns, three_turns, two_images, flat):
    """Texts of several lengths, among them one without an image and one with several, and shared images."""
    shared = picture(99)
    many = sample(
        two_images,
        [shared, picture(1)],
        [phrase(two_images, 0, "a dog"), phrase(two_images, 0, "a cat", image=1)],
        "many",
    )
    turned = sample(two_images, [picture(2), shared], [phrase(two_images, 0, "the dog", image=1)], "turned")
    text = sample(turns(("hm?", "no"), images=0), [], name="text")
    long = sample(
        three_turns,
        [shared],
        [phrase(three_turns, 0, "dog"), phrase(three_turns, 2, "big cat"), phrase(three_turns, 5, "red car")],
        "long",
    )
    opening = sample([assistant_message("a dog")], [], name="opening")
    return [flat(0), text, long, many, flat(1, 7), opening, turned, flat(2, pictures=0), flat(3, 3)]


def losses_and_gradients(model, batch):
    """Sums over tokens and over groundings of both losses, in float64, and the gradients of their sum."""
    model.zero_grad()
    groundings = {key: batch.pop(key) for key in GROUNDING_KEYS if key in batch}
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].double()
    outputs = model(
        **batch, num_items_in_batch=1, use_cache=False, cross_attention_queries=groundings.get("grounding_queries")
    )
    aligned = outputs.loss.new_zeros(0)
    if groundings:
        coverage = groundings["grounding_coverage"].double()
        attention = attention_on_images(
            outputs.cross_attention_maps, groundings["grounding_slots"], coverage.shape[-1], [0, 1]
        )
        aligned = alignment_losses(attention.double(), coverage, AlignmentConfig(layers=[0, 1]))
    (outputs.loss + aligned.sum()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return outputs.loss.detach(), aligned.detach(), gradients


@pytest.mark.parametrize("length", [None, 64, 10_000])
@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize("visibility", ["latest", "all_previous"])
def test_packed_samples_learn_exactly_what_each_alone_would(
    make_model, uneven, make_collator, visibility, independent, length
):
    model = make_model(image_visibility=visibility, dtype=torch.float64)
    options = {"independent_turns": independent, "image_visibility": visibility, "phrase_queries": "all"}
    samples = uneven
    batch = make_collator(packing=True, pack_length=length, **options)(samples)
    assert batch["input_ids"].shape[0] < len(samples)
    together, aligned, gradients = losses_and_gradients(model, batch)

    loss, each_aligned, sums = 0.0, [], {}
    for each in samples:
        alone = losses_and_gradients(model, make_collator(**options)([each]))
        loss += alone[0]
        each_aligned.append(alone[1])
        for name, gradient in alone[2].items():
            sums[name] = sums.get(name, 0) + gradient
    torch.testing.assert_close(together, loss)
    # Rows come in another order.
    torch.testing.assert_close(aligned.sort().values, torch.cat(each_aligned).sort().values, rtol=1e-5, atol=1e-6)
    assert len(aligned) > 9 and sums.keys() <= gradients.keys()
    for name, gradient in gradients.items():
        expected = sums.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(
            gradient, expected, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_packing_keeps_texts_images_and_phrases_together(processor, uneven, make_collator, aligned_tokens):
    samples = uneven
    plain = make_collator()(samples)
    batch = make_collator(packing=True)(samples)
    assert batch["input_ids"].shape[1] <= 2 * plain["input_ids"].shape[1]
    assert "attention_mask" not in batch
    counted = [int(each["labels"][:, 1:].ne(-100).sum()) for each in (plain, batch)]
    assert counted[0] == counted[1] > 0  # what the trainer divides the loss by
    assert sorted(aligned_tokens(processor, batch)[1]) == sorted(aligned_tokens(processor, plain)[1])


def test_the_first_token_of_a_text_is_not_learned_after_another_text(processor, grid, sample):
    # Of a template that puts nothing in front of what the assistant says.
    template = "{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}"
    bare = AgeVlmProcessor(processor.image_processor, processor.tokenizer, chat_template=template)
    samples = [sample([assistant_message(text)], [], name=text) for text in ("a dog", "a cat", "a fox, a red one")]
    counts = [
        [int(AgeVlmCollator(bare, grid, packing=packing)(group)["labels"][:, 1:].ne(-100).sum()) for group in groups]
        for packing, groups in ((True, [samples]), (False, [[each] for each in samples]))
    ]
    assert sum(counts[0]) == sum(counts[1]) == sum(len(each["id"]) for each in samples)


def test_a_packed_sample_is_cut_and_refused_like_any(make_collator, picture, phrase, sample, three_turns, flat):
    long = sample(three_turns, [picture(0)], [phrase(three_turns, 5, "red car")], "long")
    whole = make_collator()([long])["input_ids"].shape[1]
    batch = make_collator(packing=True, max_length=whole - 30, pack_length=whole)([long, flat(0), flat(1)])
    assert batch["position_ids"].max() < whole - 30 and len(batch["grounding_queries"]) == 2
    with pytest.raises(ValueError, match="max_length: sample 'long' has .* an image after token"):
        make_collator(packing=True, max_length=3)([long])
