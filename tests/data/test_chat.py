import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from age_vlm.data.chat import ChatEncoder
from age_vlm.data.scenes_tokenizer import SPECIAL_TOKENS, build_word_tokenizer
from age_vlm.data.schema import assistant_message, message_text, user_message
from age_vlm.errors import UserError
from age_vlm.processing import AgeVlmProcessor, whole_image_processor


CORPUS = [
    "is there a red circle left of the user ?",
    "the user sees a zebra, a zebra and an assistant",
    "una niña con un café ☕ and 猫 the assistant",
] * 4


@pytest.fixture(scope="module")
def bpe_processor():
    """Byte-level BPE with merges: a token may hold a word with the space before it, or part of a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )
    return AgeVlmProcessor(whole_image_processor(32), tokenizer)


@pytest.fixture(scope="module")
def word_processor():
    return AgeVlmProcessor(whole_image_processor(32), build_word_tokenizer(CORPUS))


@pytest.fixture(params=["processor", "bpe_processor", "word_processor"])
def any_processor(request):
    return request.getfixturevalue(request.param)


def phrase(processor, chat, message, start, end):
    tokens = chat.phrase_tokens(message, start, end)
    return processor.tokenizer.decode([chat.input_ids[token] for token in tokens], clean_up_tokenization_spaces=False)


def find(message, words, occurrence=0):
    start = -1
    for _ in range(occurrence + 1):
        start = message_text(message).index(words, start + 1)
    return start, start + len(words)


# Images between the text parts of one message, a word that is a role, and words that come again elsewhere.
SPLIT = {
    "role": "user",
    "content": [
        {"type": "text", "text": "the user sees a zebra"},
        {"type": "image"},
        {"type": "text", "text": ", a zebra and "},
        {"type": "image", "text": None},
        {"type": "text", "text": "an assistant"},
    ],
}
CHAT = [SPLIT, assistant_message("a zebra, yes"), user_message("is the user left?"), assistant_message("user zebra")]


@pytest.mark.parametrize(
    "message, words, occurrence",
    [
        (0, "user", 0),
        (0, "zebra", 0),
        (0, "zebra", 1),
        (0, "assistant", 0),
        (1, "zebra", 0),
        (2, "user", 0),
        (3, "user", 0),
        (3, "zebra", 0),
    ],
)
def test_a_phrase_is_found_where_it_stands_and_nowhere_else(any_processor, message, words, occurrence):
    chat = ChatEncoder(any_processor)(CHAT)
    tokens = chat.phrase_tokens(message, *find(CHAT[message], words, occurrence))
    assert phrase(any_processor, chat, message, *find(CHAT[message], words, occurrence)).strip() == words
    # Everything before the phrase, images and template aside, is decoded from what stands before its tokens.
    rendered = any_processor.apply_chat_template(CHAT, tokenize=False)
    before = rendered[: chat.offsets[tokens[0]][0]].rstrip()
    occurrences = [
        len(rendered[:start].rstrip()) for start in range(len(rendered)) if rendered.startswith(words, start)
    ]
    # The same word earlier in the rendered chat, roles included, in the order of reading.
    earlier = sum(message_text(part).count(words) for part in CHAT[:message]) + occurrence
    earlier += sum(part["role"] == words for part in CHAT[: message + 1])
    assert occurrences[earlier] == len(before)


def test_a_phrase_may_reach_over_an_image(any_processor):
    chat = ChatEncoder(any_processor)([SPLIT])
    start, _ = find(SPLIT, "sees")
    _, end = find(SPLIT, "zebra", 1)
    found = phrase(any_processor, chat, 0, start, end)
    assert "".join(found.split()) == "seesazebra,azebra"
    assert any_processor.image_token not in found


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_tokens_of_a_phrase_decode_to_text_that_holds_it(bpe_processor, data):
    alphabet = st.characters(exclude_categories=["Cs"])
    text = data.draw(st.one_of(st.sampled_from(CORPUS), st.text(alphabet, min_size=1, max_size=20)))
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    messages = [user_message(text, images=1), assistant_message(text)]
    chat = ChatEncoder(bpe_processor)(messages)
    for message in (0, 1):
        tokens = chat.phrase_tokens(message, start, end)
        assert tokens == list(range(tokens[0], tokens[-1] + 1))
        assert text[start:end] in phrase(bpe_processor, chat, message, start, end)
        # And no token more than it takes.
        for position in (tokens[0], tokens[-1]):
            left, right = chat.offsets[position]
            shown = bpe_processor.apply_chat_template(messages, tokenize=False)[left:right]
            assert set(shown) & set(text[start:end])


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), st.text(max_size=5))
@settings(max_examples=40, deadline=None)
def test_unicode_text_is_encoded_as_the_tokenizer_does(bpe_processor, question, answer):
    messages = [user_message(question, images=1), assistant_message(answer)]
    rendered = bpe_processor.apply_chat_template(messages, tokenize=False)
    expected = bpe_processor.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert list(ChatEncoder(bpe_processor)(messages).input_ids) == expected


@pytest.mark.parametrize(
    "messages",
    [
        CHAT,
        [user_message("is there a zebra ?", images=1), assistant_message("yes")],
        [{"role": "system", "content": [{"type": "text", "text": "the user"}]}, *CHAT[2:]],
        [user_message("the zebra"), assistant_message("")],
        [assistant_message("a zebra"), user_message("a zebra")],
        [user_message("猫 ☕?", images=2), assistant_message("niña ☕ 猫")],
    ],
)
def test_labels_are_what_the_template_calls_generated(any_processor, messages):
    image = {"type": "image", "image": Image.new("RGB", (8, 8))}
    shown = [
        {**message, "content": [image if part["type"] == "image" else part for part in message["content"]]}
        for message in messages
    ]
    reference = any_processor.apply_chat_template(
        shown,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs={"add_special_tokens": False},
    )
    chat = ChatEncoder(any_processor)(messages)
    ids, mask = (reference[key] for key in ("input_ids", "assistant_masks"))
    ids, mask = (value[0] if isinstance(value[0], list) else value for value in (ids, mask))
    assert list(chat.input_ids) == list(ids)
    expected = [token if generated else -100 for token, generated in zip(ids, mask)]
    assert list(chat.labels) == expected
    assert any(label != -100 for label in chat.labels)


def test_text_content_may_be_plain(processor):
    plain = [{"role": "user", "content": "a zebra"}, {"role": "assistant", "content": "yes"}]
    assert ChatEncoder(processor)(plain) == ChatEncoder(processor)([user_message("a zebra"), assistant_message("yes")])


def test_a_template_may_leave_a_message_out(tokenizer):
    template = (
        "{% for message in messages %}{% if message['role'] != 'system' %}[{{ message['role'] }}]"
        "{{ message['content'] }}<|eot_id|>{% endif %}{% endfor %}"
    )
    processor = AgeVlmProcessor(whole_image_processor(32), tokenizer, chat_template=template)
    messages = [{"role": "system", "content": [{"type": "text", "text": "a zebra"}]}, *CHAT[2:]]
    chat = ChatEncoder(processor)(messages)
    assert chat.phrase_tokens(0, 0, 7) == []
    assert phrase(processor, chat, 1, *find(CHAT[2], "user")) == "user"
    assert phrase(processor, chat, 2, *find(CHAT[3], "user")) == "user"


def test_a_template_that_changes_the_text_is_refused(tokenizer):
    template = "{% for message in messages %}{{ message['content'] | CHANGE }}<|eot_id|>{% endfor %}"
    for change in ("replace('zebra', 'ZEBRA')", "replace(' z', 'z')"):
        changed = template.replace("CHANGE", change)
        processor = AgeVlmProcessor(whole_image_processor(32), tokenizer, chat_template=changed)
        with pytest.raises(ValueError, match="^chat_template: changes the text"):
            ChatEncoder(processor)([user_message(" a zebra ")])


def test_blanks_around_texts_are_kept_or_trimmed_as_the_template_does(tokenizer):
    messages = [user_message(" a zebra \n", images=1), assistant_message("\tyes, a zebra  ")]
    for filter, said in (("", "\tyes, a zebra  <|eot_id|>"), (" | trim", "yes, a zebra<|eot_id|>")):
        template = (
            "{% for message in messages %}[{{ message['role'] }}]\t{{ message['content']FILTER }}<|eot_id|>{% endfor %}"
            "{% if add_generation_prompt %}[assistant]\t{% endif %}"
        ).replace("FILTER", filter)
        processor = AgeVlmProcessor(whole_image_processor(32), tokenizer, chat_template=template)
        chat = ChatEncoder(processor)(messages)
        assert phrase(processor, chat, 0, 3, 8) == phrase(processor, chat, 1, 8, 13) == "zebra"
        learned = [label for label in chat.labels if label != -100]
        assert processor.tokenizer.decode(learned, clean_up_tokenization_spaces=False) == said


def test_an_answer_that_ends_in_another_way_is_refused(tokenizer):
    other = "and so on, for as long as it takes"
    template = (
        "{% for message in messages %}{% set text = message['content'] %}[{{ message['role'] }}]{{ text }}"
        "{{ 'OTHER' if 'zebra' in text else '<|eot_id|>' }}{% endfor %}"
    ).replace("OTHER", other)
    processor = AgeVlmProcessor(whole_image_processor(32), tokenizer, chat_template=template)
    encoder = ChatEncoder(processor)
    encoder([user_message("a zebra?"), assistant_message("yes")])
    with pytest.raises(UserError) as error:
        encoder([user_message("what is it?"), assistant_message("a zebra")])
    # So much of it that one finds the place.
    assert str(error.value) == f"chat_template: got {other[:20]!r} after an answer, expected its end, '<|eot_id|>'."


def test_a_chat_that_comes_again_is_not_encoded_again(processor):
    encoder = ChatEncoder(processor)
    chat = encoder(CHAT)
    encoder(CHAT[2:])
    assert encoder([{**message} for message in CHAT]) is chat


def test_an_encoder_can_be_sent_to_another_process(processor):
    encoder = ChatEncoder(processor)
    assert pickle.loads(pickle.dumps(encoder))(CHAT) == encoder(CHAT)
