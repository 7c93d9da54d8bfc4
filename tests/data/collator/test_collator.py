"""Batches of whole chats: their texts, images and lengths, and the samples that are refused."""

import copy
import io
import pickle

import pytest
import torch
from PIL import Image

from age_vlm.data.collator import AgeVlmCollator
from age_vlm.data.schema import assistant_message, user_message
from age_vlm.processing import AgeVlmProcessor


def test_the_grid_is_that_of_the_model_whatever_the_image(model, processor, grid, picture):
    for size in ((32, 32), (90, 11)):
        inputs = processor(images=[picture(0, size)], text=[processor.image_token], return_tensors="pt")
        outputs = model(**inputs, cross_attention_queries=torch.tensor([[0, 1]]))
        assert outputs.cross_attention_maps[0].shape[-1] == grid[0] * grid[1]


def test_one_chat_is_what_the_processor_makes_of_it(processor, make_collator, picture, sample, three_turns):
    batch = make_collator()([sample(three_turns, [picture(0, (50, 20))])])
    text = processor.apply_chat_template(three_turns, tokenize=False)
    expected = processor(images=[picture(0, (50, 20))], text=[text], return_tensors="pt", add_special_tokens=False)
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(batch[name], expected[name]), name
    assert "image_indices" not in batch and "grounding_queries" not in batch


def test_pixels_and_masks_follow_the_exif_rotation(
    tmp_path, processor, make_collator, picture, box, phrase, sample, turns
):
    upright = picture(3, (20, 40))
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by a quarter to the right to see it upright"
    turned.save(tmp_path / "turned.png", exif=exif)
    stored = Image.open(tmp_path / "turned.png")
    assert stored.size == (40, 20)
    messages = turns(("a dog?", "yes"))
    mask = box((20, 40), 0, 0, 20, 10)
    batches = [
        make_collator()([sample(messages, [image], [phrase(messages, 0, "dog", mask=mask)])])
        for image in (stored, upright)
    ]
    assert torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"])
    assert torch.equal(batches[0]["grounding_coverage"], batches[1]["grounding_coverage"])


def test_a_later_question_sees_all_images_before_or_its_own(make_collator, picture, sample, turns):
    messages = turns(("what?", "a dog"), ("and?", "no"), images=2)
    messages += [user_message("this one?", images=1), assistant_message("a cat"), user_message("so?")]
    batch = make_collator(independent_turns=True)([sample(messages, [picture(0), picture(1), picture(2)])])
    assert batch["image_indices"].tolist() == [0, 1, 0, 1, 2, 0, 1, 2]
    assert batch["pixel_values"].shape[0] == 3


def test_a_system_message_is_in_front_of_every_question(
    processor, make_collator, picture, phrase, sample, three_turns, aligned_tokens
):
    system = {"role": "system", "content": [{"type": "text", "text": "be brief about the dog"}]}
    groundings = [phrase(three_turns, 2, "big cat")]
    groundings[0]["message"] += 1
    batch = make_collator(independent_turns=True)([sample([system, *three_turns], [picture(0)], groundings)])
    assert processor.tokenizer.decode(batch["input_ids"][0]).count("be brief") == 3
    places, texts = aligned_tokens(processor, batch)
    assert texts == ["t"]
    assert "big" in processor.tokenizer.decode(batch["input_ids"][0, places[0][1] - 6 : places[0][1]])


def test_batches_without_masks_or_images(model, make_collator, picture, phrase, sample, turns, three_turns):
    for independent in (False, True):
        collator = make_collator(independent_turns=independent)
        batch = collator([sample(turns(("hi", "hello"), images=0), []), sample(turns(("hi?", "x"), images=0), [])])
        assert not {"pixel_values", "grounding_queries", "image_indices"} & set(batch)
        assert torch.isfinite(model(**batch, use_cache=False).loss)
        mixed = collator(
            [
                sample(turns(("hi", "hello"), images=0), []),
                sample(three_turns, [picture(0)]),
                sample(three_turns, [picture(1)], [phrase(three_turns, 0, "dog")]),
            ]
        )
        assert mixed["grounding_queries"].shape == (1, 2) and mixed["grounding_queries"][0, 0] == 2
        grounding_keys = ("grounding_queries", "grounding_slots", "grounding_coverage")
        inputs = {key: value for key, value in mixed.items() if key not in grounding_keys}
        assert torch.isfinite(model(**inputs, use_cache=False).loss)


def test_a_message_without_a_question_is_one_text(make_collator, sample):
    only = sample([assistant_message("a dog")], [])
    ids = [make_collator(independent_turns=independent)([only])["input_ids"] for independent in (False, True)]
    assert torch.equal(*ids)


def test_truncation_keeps_images_and_drops_groundings_that_it_cuts_off(
    make_collator, picture, phrase, sample, three_turns
):
    groundings = [phrase(three_turns, 0, "dog"), phrase(three_turns, 5, "red car")]
    whole = make_collator()([sample(three_turns, [picture(0)], groundings)])
    (_, early), (_, late) = whole["grounding_queries"].tolist()
    for length, kept in ((late + 1, 2), (late, 1)):
        talk = sample(three_turns, [picture(0)], groundings)
        batch = make_collator(max_length=length)([talk, sample(three_turns, [picture(1)], groundings[:1], name="b")])
        assert batch["input_ids"].shape[1] == length
        assert torch.equal(batch["input_ids"][0], whole["input_ids"][0, :length])
        rows = batch["grounding_queries"][:, 0].tolist() if "grounding_queries" in batch else []
        assert rows.count(0) == kept and rows.count(1) == min(kept, 1)
    with pytest.raises(ValueError, match="max_length: sample 'one' has .* an image after token"):
        make_collator(max_length=3)([sample(three_turns, [picture(0)])])
    with pytest.raises(ValueError, match="max_length: sample 'one'"):
        make_collator(max_length=early + 5, independent_turns=True)([sample(three_turns, [picture(0)])])


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("independent", [False, True])
def test_answers_that_are_cut_off_whole_are_refused_by_name(
    make_collator, independent, packing, picture, sample, three_turns
):
    settings = {"independent_turns": independent, "packing": packing}
    long = sample(three_turns[:2], [picture(1)], name="long")
    labels = make_collator(independent_turns=independent)([long])["labels"][0].tolist()
    first = next(number for number, label in enumerate(labels) if label != -100)
    assert (make_collator(max_length=first + 1, **settings)([long])["labels"] != -100).sum() == 1
    with pytest.raises(
        ValueError, match="^max_length: sample 'long' has .* no token to learn among the first"
    ) as caught:
        make_collator(max_length=first, **settings)([long])
    assert "\n" not in str(caught.value)
    # What has no answer is for measuring, and is no matter of the length.
    question = sample(three_turns[:1], [picture(0)], name="question")
    assert (make_collator(max_length=first, **settings)([question])["labels"] == -100).all()


def test_a_tokenizer_without_padding_token_will_do(processor, make_collator, grid, picture, sample, three_turns):
    talks = [sample(three_turns, [picture(0)]), sample(three_turns[:2], [picture(1)])]
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.pad_token = None
    assert tokenizer.pad_token_id is None
    batch = AgeVlmCollator(AgeVlmProcessor(processor.image_processor, tokenizer), grid)(talks)
    expected = make_collator()(talks)
    for name in ("labels", "attention_mask"):
        assert torch.equal(batch[name], expected[name])
    assert torch.equal(batch["input_ids"] * batch["attention_mask"], expected["input_ids"] * batch["attention_mask"])


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s, picture: s["groundings"][0].update(end=99), "character span .11, 99."),
        (lambda s, picture: s["images"].append(picture(1)), "2 images but 1 image parts"),
        (
            lambda s, picture: s["images"].__setitem__(0, picture(1, (10, 12))),
            "mask of 32 x 32 pixels, expected 10 x 12",
        ),
        (lambda s, picture: s["groundings"][0].update(message=7), "message 7"),
        (lambda s, picture: s["messages"].clear(), "no messages"),
        (lambda s, picture: s["messages"].append(user_message("<|reserved_special_token_0|>")), "2 image tokens"),
        (lambda s, picture: s["messages"].__setitem__(0, {"role": "user", "content": "a dog?"}), "content of type str"),
    ],
)
def test_a_bad_sample_is_refused_in_one_sentence(make_collator, change, words, picture, phrase, sample, three_turns):
    bad = sample([*three_turns], [picture(0)], [phrase(three_turns, 0, "dog")], name="bad one")
    change(bad, picture)
    with pytest.raises(ValueError, match=f"sample 'bad one'.*{words}") as caught:
        make_collator()([bad])
    assert "\n" not in str(caught.value)


def test_a_collator_can_be_sent_to_another_process(make_collator, picture, phrase, sample, three_turns):
    collator = make_collator(
        independent_turns=True,
        phrase_queries="all",
        answer_queries="predict",
        max_length=400,
        packing=True,
        pack_length=500,
    )
    talk = sample(three_turns, [picture(0)], [phrase(three_turns, 0, "dog")])
    received = pickle.loads(pickle.dumps(collator))
    for name, value in collator([talk]).items():
        assert torch.equal(value, received([talk])[name]), name


def test_a_sample_whose_image_or_mask_cannot_be_read_is_named(make_collator, picture, sample, turns, flat):
    file = io.BytesIO()
    picture(0, (64, 64)).save(file, "PNG")
    cut = Image.open(io.BytesIO(file.getvalue()[: len(file.getvalue()) // 2]))
    bad = sample(turns(("a dog?", "yes")), [cut], name="half a file")
    with pytest.raises(ValueError, match="^sample 'half a file': images: the image is damaged: ") as caught:
        make_collator()([flat(0), bad])
    assert "\n" not in str(caught.value)
    bad = flat(1)
    bad["groundings"][0]["mask"]["counts"] = "0"
    with pytest.raises(ValueError, match="^sample 'flat 1': mask counts does not describe"):
        make_collator()([flat(0), bad])
