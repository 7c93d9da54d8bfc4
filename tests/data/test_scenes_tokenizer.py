import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from age_vlm.data.scene_questions import scene_questions, scene_sample
from age_vlm.data.scenes import SceneConfig, draw_scene
from age_vlm.data.scenes_tokenizer import SPECIAL_TOKENS, build_scenes_tokenizer, build_word_tokenizer
from age_vlm.data.schema import message_text


TOKENIZER = build_scenes_tokenizer()
TURN = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"


def scene_lines():
    for split in ("train", "test"):
        for index in range(40):
            scene = draw_scene(split, index)
            yield from (message_text(message) for message in scene_sample(scene)["messages"])
            yield from (text for question in scene_questions(scene) for text in (question.text, question.answer))


def test_it_knows_all_that_scenes_say_and_decodes_to_the_same_text():
    for text in scene_lines():
        ids = TOKENIZER(text).input_ids
        assert TOKENIZER.unk_token_id not in ids
        assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_are_llama_3s():
    assert TOKENIZER.convert_ids_to_tokens(range(len(SPECIAL_TOKENS))) == list(SPECIAL_TOKENS)
    assert set(TOKENIZER.all_special_tokens) == set(SPECIAL_TOKENS)
    assert (TOKENIZER.bos_token, TOKENIZER.eos_token) == ("<|begin_of_text|>", "<|eot_id|>")
    assert (TOKENIZER.pad_token, TOKENIZER.unk_token) == ("<|finetune_right_pad_id|>", "<unk>")
    assert TOKENIZER("yes").input_ids[0] == TOKENIZER.bos_token_id


def test_a_chat_turn_is_its_words_between_special_tokens():
    text = TURN.format("<|reserved_special_token_0|>is there a red circle?")
    tokens = TOKENIZER.tokenize(text)
    header = ["<|start_header_id|>", "user", "<|end_header_id|>"]
    assert tokens == [
        *header, "<|reserved_special_token_0|>", "is", "there", "a", "red", "circle", "?", "<|eot_id|>",
    ]  # fmt: skip


@given(st.text(max_size=40))
def test_offsets_cut_the_text_into_its_words(text):
    text = TURN.format(text)
    encoded = TOKENIZER(text, add_special_tokens=False, return_offsets_mapping=True)
    end = 0
    for number, (start, stop) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
        assert end <= start < stop <= len(text)
        assert not text[end:start].strip()
        token = TOKENIZER.convert_ids_to_tokens(number)
        assert number == TOKENIZER.unk_token_id or text[start:stop].lower() == token
        end = stop
    assert end == len(text)


def test_capitals_are_read_and_unknown_words_are_one_unknown_token():
    known, asked = TOKENIZER("is there a red circle?"), TOKENIZER("Is there a RED circle?")
    assert known.input_ids == asked.input_ids
    ids = TOKENIZER("is there a xylophone?").input_ids
    assert ids.count(TOKENIZER.unk_token_id) == 1
    assert len(ids) == len(known.input_ids) - 1


def test_it_survives_saving(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = TURN.format("how many red objects are there?")
    assert loaded(text).input_ids == TOKENIZER(text).input_ids
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert loaded.special_tokens_map == TOKENIZER.special_tokens_map
    assert set(loaded.all_special_tokens) == set(SPECIAL_TOKENS)


def test_a_smaller_palette_needs_fewer_words():
    small = build_scenes_tokenizer(SceneConfig(shapes=("star", "ring"), colours=("red", "blue")))
    assert "cyan" in TOKENIZER.get_vocab()
    assert "cyan" not in small.get_vocab()


def test_other_texts_make_another_vocabulary_whatever_their_order():
    texts = ["A traffic light, and a bicyclist.", "is there a side-walk?"]
    tokenizer = build_word_tokenizer(texts)
    assert tokenizer.get_vocab() == build_word_tokenizer(reversed(texts * 2)).get_vocab()
    for text in texts:
        assert tokenizer.unk_token_id not in tokenizer(text).input_ids
    with pytest.raises(ValueError, match="texts is one string"):
        build_word_tokenizer("a red circle")
