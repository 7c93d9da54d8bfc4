import copy
import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from age_vlm.data.collator import GROUNDING_KEYS, AgeVlmCollator
from age_vlm.data.schema import assistant_message, grounding, message_text, user_message
from age_vlm.modeling_agevlm.attention_maps_agevlm import attention_on_images
from age_vlm.processing import AgeVlmProcessor
from age_vlm.training import AlignmentConfig
from age_vlm.training.alignment import alignment_losses


SIDE = 32  # of the model's input, conftest's IMAGE_SIZE


def picture(seed, size=(SIDE, SIDE)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def box(size, left, top, right, bottom):
    mask = np.zeros((size[1], size[0]), bool)
    mask[top:bottom, left:right] = True
    return mask


def phrase(messages, message, words, image=0, size=(SIDE, SIDE), mask=None):
    start = message_text(messages[message]).index(words)
    mask = box(size, 0, 0, size[0] // 2, size[1]) if mask is None else mask
    return grounding(message, start, start + len(words), image, mask)


def sample(messages, images, groundings=(), name="one"):
    return {"id": name, "images": list(images), "messages": messages, "groundings": list(groundings)}


def turns(*pairs, images=1):
    messages = []
    for number, (question, answer) in enumerate(pairs):
        messages += [user_message(question, images=0 if number else images), assistant_message(answer)]
    return messages


TALK = turns(("is there a dog?", "yes"), ("and a big cat?", "no, none"), ("what else?", "a red car"))


@pytest.fixture(scope="module")
def grid(model, processor):
    return model.image_grid(processor.image_geometry(64, 64).size)


@pytest.fixture(scope="module")
def make_collator(processor, grid):
    return lambda **options: AgeVlmCollator(processor, grid, **options)


def aligned(processor, batch):
    """(row, position, slot) of each aligned token, and the character it stands for."""
    rows = batch["grounding_queries"].tolist()
    slots = batch["grounding_slots"].tolist()
    texts = [processor.tokenizer.decode([batch["input_ids"][row, place]]) for row, place in rows]
    return [(row, place, slot) for (row, place), slot in zip(rows, slots)], texts


def test_the_grid_is_that_of_the_model_whatever_the_image(model, processor, grid):
    for size in ((32, 32), (90, 11)):
        inputs = processor(images=[picture(0, size)], text=[processor.image_token], return_tensors="pt")
        outputs = model(**inputs, cross_attention_queries=torch.tensor([[0, 1]]))
        assert outputs.cross_attention_maps[0].shape[-1] == grid[0] * grid[1]


@torch.no_grad()
def test_packed_turns_learn_exactly_what_each_turn_alone_would(model, processor, make_collator):
    talks = [sample(TALK, [picture(0)]), sample(turns(("what is it?", "a frog")), [picture(1)], name="two")]
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
    last = model(**alone([sample([user_message("what else?", 1), TALK[-1]], [picture(0)])])).logits[0]
    length = int((packed["input_ids"][0] != processor.tokenizer.pad_token_id).sum())
    assert length == packed["input_ids"].shape[1]
    torch.testing.assert_close(outputs.logits[0, -len(last) :], last, rtol=1e-4, atol=1e-4)


def test_one_chat_is_what_the_processor_makes_of_it(processor, make_collator):
    batch = make_collator()([sample(TALK, [picture(0, (50, 20))])])
    text = processor.apply_chat_template(TALK, tokenize=False)
    expected = processor(images=[picture(0, (50, 20))], text=[text], return_tensors="pt", add_special_tokens=False)
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(batch[name], expected[name]), name
    assert "image_indices" not in batch and "grounding_queries" not in batch


def test_pixels_and_masks_follow_the_exif_rotation(tmp_path, processor, make_collator):
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


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_coverage_is_the_share_of_each_cell_that_a_rectangle_covers(make_collator, grid, data):
    width, height = (data.draw(st.integers(1, 80)) for _ in range(2))
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, bottom = data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
    messages = turns(("a dog?", "yes"))
    size = (width, height)
    mask = box(size, left, top, right, bottom)
    image = Image.new("RGB", size)
    batch = make_collator()([sample(messages, [image], [phrase(messages, 0, "dog", size=size, mask=mask)])])
    # The processor stretches the whole image, so cells are equal parts of the source.
    rows, columns = grid
    y, x = torch.linspace(0, height, rows + 1).double(), torch.linspace(0, width, columns + 1).double()
    tall = (y[1:].clamp(max=bottom) - y[:-1].clamp(min=top)).clamp(min=0) / (height / rows)
    wide = (x[1:].clamp(max=right) - x[:-1].clamp(min=left)).clamp(min=0) / (width / columns)
    expected = (tall[:, None] * wide).flatten().float()
    torch.testing.assert_close(batch["grounding_coverage"][0], expected, rtol=0, atol=1e-4)


def test_the_last_or_every_token_of_a_phrase_is_aligned(processor, make_collator):
    talk = sample(TALK, [picture(0)], [phrase(TALK, 2, "big cat"), phrase(TALK, 5, "red car")])
    (first, second), texts = aligned(processor, make_collator(independent_turns=True)([talk]))
    assert texts == ["t", "r"] and first[0] == second[0] == 0
    batch = make_collator(phrase_queries="all")([talk])
    places, texts = aligned(processor, batch)
    assert "".join(texts) == "big catred car"
    assert batch["grounding_coverage"].shape[0] == len(places)
    with pytest.raises(ValueError, match="phrase_queries: got 'first'"):
        make_collator(phrase_queries="first")


def test_masks_of_one_phrase_are_one_mask(make_collator):
    messages = turns(("three men?", "yes"))
    size = (64, 48)
    parts = [box(size, 0, 0, 21, 30), box(size, 17, 5, 40, 48), box(size, 50, 0, 64, 7)]
    groundings = [phrase(messages, 0, "three men", size=size, mask=mask) for mask in parts]
    whole = phrase(messages, 0, "three men", size=size, mask=parts[0] | parts[1] | parts[2])
    image = Image.new("RGB", size)
    batch, expected = (make_collator()([sample(messages, [image], each)]) for each in (groundings, [whole]))
    assert len(batch["grounding_coverage"]) == 1
    for key, value in expected.items():
        assert torch.equal(batch[key], value), key
    # The same phrase in another image is a grounding of its own.
    messages[0]["content"].insert(0, {"type": "image", "text": None})
    groundings = [phrase(messages, 0, "three men", image=number, size=size, mask=parts[number]) for number in (0, 1)]
    batch = make_collator(image_visibility="all")([sample(messages, [image, image], groundings)])
    assert len(batch["grounding_coverage"]) == 2


def test_packed_groundings_point_at_their_own_turn(processor, make_collator):
    talk = turns(("a dog?", "a dog"), ("a dog?", "a dog"))
    groundings = [phrase(talk, message, "dog") for message in range(4)]
    batch = make_collator(independent_turns=True)([sample(TALK, [picture(0)]), sample(talk, [picture(1)], groundings)])
    places, texts = aligned(processor, batch)
    assert texts == ["g"] * 4
    assert [row for row, _, _ in places] == [1] * 4
    positions = batch["position_ids"][1, [place for _, place, _ in places]].tolist()
    assert positions[:2] == positions[2:] and places[1][1] < places[2][1]
    # Both rows have one image, seen by three and by two questions.
    assert batch["image_indices"].tolist() == [0, 0, 0, 1, 1]


MANY = [
    {
        "role": "user",
        "content": [
            {"type": "image", "text": None},
            {"type": "text", "text": "here a dog, "},
            {"type": "image", "text": None},
            {"type": "text", "text": "there a cat and the dog"},
        ],
    },
    assistant_message("yes"),
]


def test_slots_of_several_images_are_those_the_model_shows(make_model, processor, make_collator):
    model = make_model(image_visibility="all_previous")
    groundings = [
        phrase(MANY, 0, "a dog", image=0),
        phrase(MANY, 0, "a cat", image=1),
        phrase(MANY, 0, "a cat", image=0),
    ]
    batch = make_collator(image_visibility="all_previous")(
        [sample(turns(("hm?", "no"), images=0), []), sample(MANY, [picture(0), picture(1)], groundings)]
    )
    assert batch["grounding_slots"].tolist() == [0, 1, 0]
    rows = batch.pop("grounding_queries")
    tokens = batch.pop("grounding_coverage").shape[-1]
    slots = batch.pop("grounding_slots")
    maps = model(**batch, cross_attention_queries=rows).cross_attention_maps
    mass = [maps[0][:, :, slot * tokens : (slot + 1) * tokens].sum(-1) for slot in (0, 1)]
    assert mass[1][0].eq(0).all() and mass[0][0].gt(0.99).all()  # "a dog" stands before the second image
    for row, slot in zip((1, 2), slots[1:]):
        assert mass[int(slot)][row].gt(0).all()


def test_a_phrase_is_only_aligned_with_an_image_that_it_sees(make_collator):
    later = phrase(MANY, 0, "a dog", image=1)
    earlier = phrase(MANY, 0, "a cat", image=0)
    pictures = [picture(0), picture(1)]
    for visibility, count in (("latest", 0), ("all_previous", 1)):
        batch = make_collator(image_visibility=visibility)([sample(MANY, pictures, [later, earlier])])
        assert len(batch.get("grounding_queries", ())) == count


def test_a_later_question_sees_all_images_before_or_its_own(make_collator):
    messages = turns(("what?", "a dog"), ("and?", "no"), images=2)
    messages += [user_message("this one?", images=1), assistant_message("a cat"), user_message("so?")]
    batch = make_collator(independent_turns=True)([sample(messages, [picture(0), picture(1), picture(2)])])
    assert batch["image_indices"].tolist() == [0, 1, 0, 1, 2, 0, 1, 2]
    assert batch["pixel_values"].shape[0] == 3


def test_a_system_message_is_in_front_of_every_question(processor, make_collator):
    system = {"role": "system", "content": [{"type": "text", "text": "be brief about the dog"}]}
    groundings = [phrase(TALK, 2, "big cat")]
    groundings[0]["message"] += 1
    batch = make_collator(independent_turns=True)([sample([system, *TALK], [picture(0)], groundings)])
    assert processor.tokenizer.decode(batch["input_ids"][0]).count("be brief") == 3
    places, texts = aligned(processor, batch)
    assert texts == ["t"]
    assert "big" in processor.tokenizer.decode(batch["input_ids"][0, places[0][1] - 6 : places[0][1]])


def test_batches_without_masks_or_images(model, make_collator):
    for independent in (False, True):
        collator = make_collator(independent_turns=independent)
        batch = collator([sample(turns(("hi", "hello"), images=0), []), sample(turns(("hi?", "x"), images=0), [])])
        assert not {"pixel_values", "grounding_queries", "image_indices"} & set(batch)
        assert torch.isfinite(model(**batch, use_cache=False).loss)
        mixed = collator(
            [
                sample(turns(("hi", "hello"), images=0), []),
                sample(TALK, [picture(0)]),
                sample(TALK, [picture(1)], [phrase(TALK, 0, "dog")]),
            ]
        )
        assert mixed["grounding_queries"].shape == (1, 2) and mixed["grounding_queries"][0, 0] == 2
        grounding_keys = ("grounding_queries", "grounding_slots", "grounding_coverage")
        inputs = {key: value for key, value in mixed.items() if key not in grounding_keys}
        assert torch.isfinite(model(**inputs, use_cache=False).loss)


def test_a_message_without_a_question_is_one_text(make_collator):
    only = sample([assistant_message("a dog")], [])
    ids = [make_collator(independent_turns=independent)([only])["input_ids"] for independent in (False, True)]
    assert torch.equal(*ids)


def test_a_mask_of_nothing_aligns_nothing(make_collator):
    empty = phrase(TALK, 0, "dog", mask=np.zeros((SIDE, SIDE), bool))
    batch = make_collator()([sample(TALK, [picture(0)], [empty])])
    assert "grounding_queries" not in batch


def test_a_phrase_that_still_has_no_mask_is_refused(make_collator):
    groundings = [phrase(TALK, 0, "dog"), {**phrase(TALK, 2, "big cat"), "mask": None, "box": [0.0, 0.0, 8.0, 8.0]}]
    for independent in (False, True):
        collator = make_collator(independent_turns=independent)
        with pytest.raises(
            ValueError, match="sample 'one' lacks the mask of 1 of its phrases.*`age-vlm ground`"
        ) as caught:
            collator([sample(TALK, [picture(0)], groundings)])
        assert "\n" not in str(caught.value)
        collator([sample(TALK, [picture(0)], groundings[:1])])


def test_truncation_keeps_images_and_drops_groundings_that_it_cuts_off(make_collator):
    groundings = [phrase(TALK, 0, "dog"), phrase(TALK, 5, "red car")]
    whole = make_collator()([sample(TALK, [picture(0)], groundings)])
    (_, early), (_, late) = whole["grounding_queries"].tolist()
    for length, kept in ((late + 1, 2), (late, 1)):
        talk = sample(TALK, [picture(0)], groundings)
        batch = make_collator(max_length=length)([talk, sample(TALK, [picture(1)], groundings[:1], name="b")])
        assert batch["input_ids"].shape[1] == length
        assert torch.equal(batch["input_ids"][0], whole["input_ids"][0, :length])
        rows = batch["grounding_queries"][:, 0].tolist() if "grounding_queries" in batch else []
        assert rows.count(0) == kept and rows.count(1) == min(kept, 1)
    with pytest.raises(ValueError, match="max_length: sample 'one' has .* an image after token"):
        make_collator(max_length=3)([sample(TALK, [picture(0)])])
    with pytest.raises(ValueError, match="max_length: sample 'one'"):
        make_collator(max_length=early + 5, independent_turns=True)([sample(TALK, [picture(0)])])


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("independent", [False, True])
def test_answers_that_are_cut_off_whole_are_refused_by_name(make_collator, independent, packing):
    settings = {"independent_turns": independent, "packing": packing}
    long = sample(TALK[:2], [picture(1)], name="long")
    labels = make_collator(independent_turns=independent)([long])["labels"][0].tolist()
    first = next(number for number, label in enumerate(labels) if label != -100)
    assert (make_collator(max_length=first + 1, **settings)([long])["labels"] != -100).sum() == 1
    with pytest.raises(
        ValueError, match="^max_length: sample 'long' has .* no token to learn among the first"
    ) as caught:
        make_collator(max_length=first, **settings)([long])
    assert "\n" not in str(caught.value)
    # What has no answer is for measuring, and is no matter of the length.
    question = sample(TALK[:1], [picture(0)], name="question")
    assert (make_collator(max_length=first, **settings)([question])["labels"] == -100).all()


def test_a_tokenizer_without_padding_token_will_do(processor, make_collator, grid):
    talks = [sample(TALK, [picture(0)]), sample(TALK[:2], [picture(1)])]
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
        (lambda s: s["groundings"][0].update(end=99), "character span .11, 99."),
        (lambda s: s["images"].append(picture(1)), "2 images but 1 image parts"),
        (lambda s: s["images"].__setitem__(0, picture(1, (10, 12))), "mask of 32 x 32 pixels, expected 10 x 12"),
        (lambda s: s["groundings"][0].update(message=7), "message 7"),
        (lambda s: s["messages"].clear(), "no messages"),
        (lambda s: s["messages"].append(user_message("<|reserved_special_token_0|>")), "2 image tokens"),
        (lambda s: s["messages"].__setitem__(0, {"role": "user", "content": "a dog?"}), "content of type str"),
    ],
)
def test_a_bad_sample_is_refused_in_one_sentence(make_collator, change, words):
    bad = sample([*TALK], [picture(0)], [phrase(TALK, 0, "dog")], name="bad one")
    change(bad)
    with pytest.raises(ValueError, match=f"sample 'bad one'.*{words}") as caught:
        make_collator()([bad])
    assert "\n" not in str(caught.value)


def test_a_collator_can_be_sent_to_another_process(make_collator):
    collator = make_collator(
        independent_turns=True, phrase_queries="all", max_length=400, packing=True, pack_length=500
    )
    talk = sample(TALK, [picture(0)], [phrase(TALK, 0, "dog")])
    received = pickle.loads(pickle.dumps(collator))
    for name, value in collator([talk]).items():
        assert torch.equal(value, received([talk])[name]), name


# Packing


def flat(number, extra=0, pictures=1):
    """A short chat of its own length, with a grounded phrase where it has an image."""
    messages = turns(("is there a dog" + "?" * extra, "yes" * (1 + number % 3)), images=pictures)
    groundings = [phrase(messages, 0, "dog", image=each) for each in range(pictures)]
    return sample(
        messages, [picture(10 * number + each) for each in range(pictures)], groundings, name=f"flat {number}"
    )


def uneven():
    """Texts of several lengths, among them one without an image and one with several, and shared images."""
    shared = picture(99)
    many = sample(MANY, [shared, picture(1)], [phrase(MANY, 0, "a dog"), phrase(MANY, 0, "a cat", image=1)], "many")
    turned = sample(MANY, [picture(2), shared], [phrase(MANY, 0, "the dog", image=1)], "turned")
    text = sample(turns(("hm?", "no"), images=0), [], name="text")
    long = sample(
        TALK, [shared], [phrase(TALK, 0, "dog"), phrase(TALK, 2, "big cat"), phrase(TALK, 5, "red car")], "long"
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
def test_packed_samples_learn_exactly_what_each_alone_would(make_model, make_collator, visibility, independent, length):
    model = make_model(image_visibility=visibility, dtype=torch.float64)
    options = {"independent_turns": independent, "image_visibility": visibility, "phrase_queries": "all"}
    samples = uneven()
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


def test_packing_keeps_texts_images_and_phrases_together(processor, make_collator):
    samples = uneven()
    plain = make_collator()(samples)
    batch = make_collator(packing=True)(samples)
    assert batch["input_ids"].shape[1] <= 2 * plain["input_ids"].shape[1]
    assert "attention_mask" not in batch
    counted = [int(each["labels"][:, 1:].ne(-100).sum()) for each in (plain, batch)]
    assert counted[0] == counted[1] > 0  # what the trainer divides the loss by
    assert sorted(aligned(processor, batch)[1]) == sorted(aligned(processor, plain)[1])


def test_the_first_token_of_a_text_is_not_learned_after_another_text(processor, grid):
    # Of a template that puts nothing in front of what the assistant says.
    template = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}<|eot_id|>{% endfor %}"
    bare = AgeVlmProcessor(processor.image_processor, processor.tokenizer, chat_template=template)
    samples = [sample([assistant_message(text)], [], name=text) for text in ("a dog", "a cat", "a fox, a red one")]
    counts = [
        [int(AgeVlmCollator(bare, grid, packing=packing)(group)["labels"][:, 1:].ne(-100).sum()) for group in groups]
        for packing, groups in ((True, [samples]), (False, [[each] for each in samples]))
    ]
    assert sum(counts[0]) == sum(counts[1]) == sum(len(each["id"]) for each in samples)


def test_a_packed_sample_is_cut_and_refused_like_any(make_collator):
    long = sample(TALK, [picture(0)], [phrase(TALK, 5, "red car")], "long")
    whole = make_collator()([long])["input_ids"].shape[1]
    batch = make_collator(packing=True, max_length=whole - 30, pack_length=whole)([long, flat(0), flat(1)])
    assert batch["position_ids"].max() < whole - 30 and len(batch["grounding_queries"]) == 2
    with pytest.raises(ValueError, match="max_length: sample 'long' has .* an image after token"):
        make_collator(packing=True, max_length=3)([long])


def test_a_sample_whose_image_or_mask_cannot_be_read_is_named(make_collator):
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
