import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPImageProcessor

from age_vlm import AgeVlmProcessor
from age_vlm.processing import whole_image_processor


IMAGE = "<|reserved_special_token_0|>"
BOS = 0
USER = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
ASSISTANT = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}


def picture(size=(20, 30), value=100):
    return Image.fromarray(np.random.default_rng(value).integers(0, 256, (*size, 3), dtype=np.uint8))


def count(encoded, token):
    ids = encoded["input_ids"]
    return [list(row).count(token) for row in (ids.tolist() if isinstance(ids, torch.Tensor) else ids)]


def test_one_image_is_one_token(processor):
    encoded = processor(images=picture(), text=f"{IMAGE}What?", return_tensors="pt")
    assert set(encoded) == {"input_ids", "attention_mask", "pixel_values"}
    assert encoded["pixel_values"].shape == (1, 3, 32, 32)
    assert count(encoded, processor.image_token_id) == [1]
    assert processor.decode(encoded["input_ids"][0], skip_special_tokens=True) == "What?"


def test_batches_of_ragged_images_keep_their_order(processor):
    images = [picture(value=value) for value in range(3)]
    texts = [f"{IMAGE}a{IMAGE}b", "-", f"c{IMAGE}"]
    flat = processor(images=images, text=texts, padding=True, return_tensors="pt")
    nested = processor(images=[images[:2], [], images[2:]], text=texts, padding=True, return_tensors="pt")
    assert count(flat, processor.image_token_id) == [2, 0, 1]
    assert torch.equal(flat["pixel_values"], nested["pixel_values"])
    for index, image in enumerate(images):
        alone = processor(images=image, text=IMAGE, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(flat["pixel_values"][index], alone)
    assert flat["attention_mask"][1, 0] == 0 and flat["attention_mask"][:, -1].all(), "padding goes left"


def test_text_or_images_alone(processor):
    assert set(processor(text="hello", return_tensors="pt")) == {"input_ids", "attention_mask"}
    assert set(processor(images=picture(), return_tensors="pt")) == {"pixel_values"}


def test_images_of_every_container_agree(processor, tmp_path):
    image = picture()
    image.save(tmp_path / "image.png")
    expected = processor(images=image, text=IMAGE, return_tensors="pt")["pixel_values"]
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for other in (
        tmp_path / "image.png",
        str(tmp_path / "image.png"),
        array,
        tensor,
        tensor / 255,
        tensor[None],
        array[None],
        [image],
        [[image]],
        (tmp_path / "image.png").as_uri().replace("file://", ""),
    ):
        got = processor(images=other, text=IMAGE, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(got, expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize("size", [(1, 40), (40, 1), (1, 1), (3, 3), (4, 4)])
def test_thin_images(processor, size):
    image = Image.new("RGB", size[::-1], (255, 0, 0))
    for one in (image, np.asarray(image), torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)):
        pixels = processor(images=one, text=IMAGE, return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 32, 32)
        red, green, blue = pixels[0].mean((1, 2))
        assert red > 1 and green < -1 and blue < -1


# Numbers of images and of their tokens


@pytest.mark.parametrize(
    ("images", "text", "numbers"),
    [
        (2, [f"{IMAGE}a"], ("2 images", "1 image token")),
        (1, [f"{IMAGE}a{IMAGE}", "b"], ("1 images", "2 image token")),
        (1, ["no token"], ("1 images", "0 image token")),
        (0, [f"{IMAGE}a{IMAGE}"], ("0 images", "2 image token")),
    ],
)
def test_other_numbers_of_images_than_of_tokens(processor, images, text, numbers):
    with pytest.raises(
        ValueError,
        match=r"^images: got .*, expected as many: .* tokens in the prompts should be the same as the number of .*\.$",
    ) as error:
        processor(images=[picture()] * images or None, text=text)
    assert all(number in str(error.value) for number in numbers)


NO_IMAGES = [
    [],
    (),
    [[]],
    [[], []],
    [None],
    [None, None],
    [[None], None],
    [[], None],
    [[[]], []],
    np.zeros((0, 20, 30, 3), np.uint8),
    torch.zeros(0, 3, 20, 30),
    [torch.zeros(0, 3, 20, 30)],
]


@pytest.mark.parametrize("images", NO_IMAGES, ids=str)
def test_no_images_in_any_form_are_none(processor, images):
    for text in ("hello", ["hello", "you there"]):
        expected = processor(text=text, padding=True, return_tensors="pt")
        encoded = processor(images=images, text=text, padding=True, return_tensors="pt")
        assert set(encoded) == set(expected) and torch.equal(encoded["input_ids"], expected["input_ids"])
    for text in (f"{IMAGE}a", [f"{IMAGE}a", f"{IMAGE}b"]):
        with pytest.raises(ValueError, match=r"^images: got 0 images for [12] image tokens in the text, expected"):
            processor(images=images, text=text)


@pytest.mark.parametrize(
    "rows", [lambda a, b: [a, None, b], lambda a, b: [[a], None, b], lambda a, b: ([a, None], [], (b,))]
)
def test_a_row_without_images_may_be_none_or_empty(processor, rows):
    images = [picture(value=1), picture(value=2)]
    texts = [f"{IMAGE}a", "b", f"c{IMAGE}"]
    expected = processor(images=images, text=texts, padding=True, return_tensors="pt")
    encoded = processor(images=rows(*images), text=texts, padding=True, return_tensors="pt")
    assert torch.equal(encoded["pixel_values"], expected["pixel_values"])
    with pytest.raises(ValueError, match=r"^images: got \[1, 0, 1\] images for \[1, 1, 0\] image tokens"):
        processor(images=rows(*images), text=[texts[0], texts[2], "b"], padding=True)


def test_images_of_the_wrong_row_are_an_error(processor):
    with pytest.raises(ValueError) as error:
        processor(images=[[picture()], [picture()]], text=[f"{IMAGE}a{IMAGE}", "b"], padding=True)
    assert "[2, 0]" in str(error.value) and "[1, 1]" in str(error.value)


def test_truncation_that_loses_an_image_is_an_error(processor):
    text = [f"a long text and {IMAGE} then"]
    with pytest.raises(ValueError):
        processor(images=picture(), text=text, truncation=True, max_length=6)
    kept = processor(images=picture(), text=[f"{IMAGE} a long text"], truncation=True, max_length=6)
    assert count(kept, processor.image_token_id) == [1]


# Chat


def test_a_chat_renders_as_llama_3(processor):
    text = processor.apply_chat_template([USER, ASSISTANT, USER], add_generation_prompt=True)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    user = header.format("user") + IMAGE + "What is it?<|eot_id|>"
    assert text == "<|begin_of_text|>" + user + header.format("assistant") + "A cat.<|eot_id|>" + user + header.format(
        "assistant"
    )


def test_content_may_be_a_plain_string(processor):
    parts = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, ASSISTANT]
    plain = [{"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "A cat."}]
    assert processor.apply_chat_template(parts) == processor.apply_chat_template(plain)


def test_every_way_to_tokenize_a_chat_starts_it_once(processor):
    messages = [{**USER, "content": [{"type": "image", "image": picture()}, USER["content"][1]]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    ways = [
        processor(images=picture(), text=text),
        processor(images=[picture()], text=[text]),
        processor(images=picture(), text=text, add_special_tokens=False),
        processor(images=picture(), text=text, text_kwargs={"add_special_tokens": False}),
        processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True),
    ]
    for encoded in ways:
        assert count(encoded, BOS) == [1] and list(encoded["input_ids"][0])[0] == BOS
        assert list(encoded["input_ids"][0]) == list(ways[0]["input_ids"][0])
    assert count(processor(text="no chat"), BOS) == [1]
    assert count(processor(text="no chat", add_special_tokens=False), BOS) == [0]


def test_chats_come_in_batches_with_their_images(processor):
    def turn(image):
        return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "?"}]}]

    images = [picture(value=1), picture(value=2)]
    encoded = processor.apply_chat_template(
        [turn(images[0]), turn(images[1])], tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )
    expected = processor(images=images, text=[IMAGE, IMAGE], return_tensors="pt")["pixel_values"]
    assert torch.equal(encoded["pixel_values"], expected)


def test_assistant_tokens_are_masked_as_such(processor):
    encoded = processor.apply_chat_template(
        [{"role": "user", "content": "What?"}, ASSISTANT],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, mask = list(encoded["input_ids"][0]), list(encoded["assistant_masks"][0])
    spoken = processor.decode([token for token, said in zip(ids, mask) if said])
    assert spoken == "A cat.<|eot_id|>"


# Making, saving, loading


def test_saved_is_loaded(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    for loaded in (AgeVlmProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert isinstance(loaded, AgeVlmProcessor)
        assert loaded.image_token == processor.image_token and loaded.image_token_id == processor.image_token_id
        assert loaded.chat_template == processor.chat_template
        assert loaded.tokenizer.padding_side == "left"
        assert loaded.image_geometry(20, 30) == processor.image_geometry(20, 30)
        first, second = (one(images=picture(), text=f"{IMAGE}a", return_tensors="pt") for one in (processor, loaded))
        assert all(torch.equal(first[key], second[key]) for key in first)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["auto_map"] == {"AutoProcessor": "processing_agevlm.AgeVlmProcessor"}


def test_an_image_token_that_is_no_token_is_one_sentence(tokenizer):
    with pytest.raises(ValueError, match="^image_token: got '<image>', which is not in the tokenizer's vocabulary"):
        AgeVlmProcessor(whole_image_processor(32), tokenizer, image_token="<image>")


def test_geometry_is_the_image_processor_s(tokenizer):
    cropping = AgeVlmProcessor(
        CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}), tokenizer
    )
    assert cropping.image_geometry(40, 80).offset == (4, 24)


@torch.no_grad()
def test_attention_is_put_on_the_pixels_of_each_image(model, processor):
    sizes = [(40, 60), (90, 30)]
    images = [Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    text = [f"{processor.image_token} what is it"] * 2
    inputs = processor(images=images, text=text, return_tensors="pt")
    output = model.generate(
        **inputs, max_new_tokens=3, min_new_tokens=3, output_attention_maps=True, return_dict_in_generate=True
    )
    pixels = processor.post_process_attention(output.attention_maps, sizes)
    assert [tuple(each.shape) for each in pixels] == [(3, *size) for size in sizes]
    (alone,) = processor.post_process_attention(output.attention_maps[1:, 0], sizes[1:])
    assert torch.equal(alone, pixels[1][0]) and float(alone.max()) <= float(output.attention_maps[1, 0].max()) + 1e-6
    with pytest.raises(ValueError, match="^target_sizes: got 1, expected one for each of 2 images"):
        processor.post_process_attention(output.attention_maps, sizes[:1])
    with pytest.raises(ValueError, match=r"^attention_maps: got shape \(4,\), expected"):
        processor.post_process_attention(torch.rand(4), sizes)
