"""Published chat templates: images in them, what ends an answer, and generation that stops there."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessor, PreTrainedTokenizerFast

from age_vlm.data.chat import ChatEncoder
from age_vlm.data.scenes_tokenizer import build_word_tokenizer
from age_vlm.data.schema import assistant_message, user_message
from age_vlm.errors import UserError
from age_vlm.processing import AgeVlmProcessor, whole_image_processor
from age_vlm.processing.chat_agevlm import assistant_turn, stop_at_end_of_turn


TEMPLATES = Path(__file__).parents[1] / "fixtures" / "chat_templates"
SMOLLM_2 = (TEMPLATES / "smollm2.jinja").read_text()
ORDINARY = (
    "{% for message in messages %}### {{ message['role'] }}: {{ message['content'] }}\n### End\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant: {% endif %}"
)
# Name -> template, what ends an answer, the token that does.
PUBLISHED = {
    "Llama 3": ((TEMPLATES / "llama_3.jinja").read_text(), "<|eot_id|>", "<|eot_id|>"),
    "Llama 3, first": ((TEMPLATES / "llama_3_first.jinja").read_text(), "<|eot_id|>", "<|eot_id|>"),
    "Llama 2": ((TEMPLATES / "llama_2.jinja").read_text(), " </s>", "</s>"),
    "SmolLM2": (SMOLLM_2, "<|im_end|>", "<|im_end|>"),
    "TinyLlama": ((TEMPLATES / "tinyllama.jinja").read_text(), "</s>", "</s>"),
    "ordinary text": (ORDINARY, "\n### End", None),
}
SPECIAL = [
    "<s>",
    "</s>",
    "<image>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|im_start|>",
    "<|im_end|>",
]
CHAT = [
    user_message("what is it?", images=1),
    assistant_message("a cat"),
    user_message("sure?"),
    assistant_message("yes"),
]


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE({token: i for i, token in enumerate([*SPECIAL, *alphabet, "es", "yes", "Ċ#"])}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentence_piece():
    """As Llama 2's: a blank is part of the word after it, one is put before the text, and bytes are the rest."""
    words = ["▁", "▁a", "▁yes", "▁cat", *"abcdefghijklmnopqrstuvwxyzE#?<>/[]:|_"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, "<unk>", *byte_tokens, *words])}
    merges = [("▁", "a")]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def make(kind) -> PreTrainedTokenizerFast:
    tokenizer = kind()
    tokenizer.add_special_tokens(SPECIAL)
    # The end of a turn is not named as what it is, as in base models.
    unknown = {"unk_token": "<unk>"} if kind is sentence_piece else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **unknown)


TOKENIZERS = {kind.__name__: make(kind) for kind in (byte_level, sentence_piece)}


def processor_of(template, tokenizer="byte_level") -> AgeVlmProcessor:
    return AgeVlmProcessor(
        whole_image_processor(32), TOKENIZERS[tokenizer], image_token="<image>", chat_template=template
    )


@pytest.fixture(params=PUBLISHED)
def published(request):
    return PUBLISHED[request.param]


def learned(processor, chat) -> list[str]:
    """The text of each run of tokens that is learned."""
    rendered = processor.apply_chat_template(CHAT, tokenize=False)
    runs, previous = [], False
    for label, (left, right) in zip(chat.labels, chat.offsets):
        if label != -100:
            runs.append([runs.pop()[0], right] if previous else [left, right])
        previous = label != -100
    return [rendered[left:right] for left, right in runs]


def test_parts_are_rendered_as_their_text(published):
    template, _, _ = published
    processor = processor_of(template)
    plain = [
        {"role": message["role"], "content": text}
        for message, text in zip(CHAT, ["<image>what is it?", "a cat", "sure?", "yes"])
    ]
    expected = processor.tokenizer.apply_chat_template(plain, chat_template=template, tokenize=False)
    assert processor.apply_chat_template(CHAT, tokenize=False) == expected
    assert processor.apply_chat_template(plain, tokenize=False) == expected
    again = processor_of(processor.chat_template)
    assert again.chat_template == processor.chat_template, "wrapped once"


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_the_end_of_each_answer_is_learned(published, tokenizer):
    template, end, token = published
    processor = processor_of(template, tokenizer)
    chat = ChatEncoder(processor)(CHAT)
    turn = assistant_turn(processor.tokenizer, processor.chat_template)
    assert turn.end == end
    assert turn.end_token_id == (None if token is None else SPECIAL.index(token))
    assert [text.lstrip(" ") for text in learned(processor, chat)] == [f"a cat{end}", f"yes{end}"]
    if token is not None:
        labels = list(chat.labels)
        assert labels.count(SPECIAL.index(token)) == 2
    # All that a prompt for an answer lacks is learned.
    asked = processor.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    rendered = processor.apply_chat_template(CHAT, tokenize=False)
    first = next(offset for label, offset in zip(chat.labels, chat.offsets) if label != -100)
    assert rendered.startswith(asked) and first[0] <= len(asked) < first[1]


class Says(LogitsProcessor):
    """Token after token of what the test wants said."""

    def __init__(self, ids, prompt):
        self.ids, self.prompt = ids, prompt

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.ids[input_ids.shape[1] - self.prompt]] = 0
        return forced


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_generation_stops_at_the_end_of_an_answer(published, tokenizer):
    processor = processor_of(published[0], tokenizer)
    labels = [label for label in ChatEncoder(processor)(CHAT[:2]).labels if label != -100]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(processor.tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    stop_at_end_of_turn(model.generation_config, processor.tokenizer, processor.chat_template)
    prompt = torch.tensor([[5, 6, 7]])
    babble = labels + [processor.tokenizer.convert_tokens_to_ids("a")] * 40
    generated = model.generate(
        prompt, logits_processor=[Says(babble, 3)], max_new_tokens=40, do_sample=False, tokenizer=processor.tokenizer,
        pad_token_id=0,
    )  # fmt: skip
    assert generated[0, 3:].tolist() == labels, processor.tokenizer.decode(generated[0, 3:])


def test_generation_stops_at_one_token_of_ordinary_text():
    processor = processor_of(
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}|{% endfor %}"
    )
    bar = processor.tokenizer.convert_tokens_to_ids("|")
    assert assistant_turn(processor.tokenizer, processor.chat_template).end_token_id == bar
    config = GenerationConfig(eos_token_id=1)
    stop_at_end_of_turn(config, processor.tokenizer, processor.chat_template)
    assert config.eos_token_id == [1, bar] and config.stop_strings is None


@given(st.lists(st.sampled_from(["\n", " ", "###", "End", "</s>", "<|im_end|>", "|"]), max_size=5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_text_may_end_an_answer(parts, as_parts):
    end = "".join(parts)
    content = "{{ message['content'] }}"
    if as_parts:
        content = "{% for part in message['content'] %}{{ part.get('text', '<image>') }}{% endfor %}"
    template = "{% for message in messages %}<|im_start|>" + content + "{{ END }}{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    processor = processor_of(template.replace("END", repr(end)))
    chat = [user_message("what?"), assistant_message("a cat"), user_message("sure?"), assistant_message("yes")]
    if not end.strip():
        with pytest.raises(UserError, match=r"^chat_template: got nothing that ends an answer, expected .*\.$"):
            ChatEncoder(processor)
        return
    special = [part for part in parts if part in SPECIAL]
    expected = end[: end.index(special[0]) + len(special[0])] if special else end.rstrip()
    ids = ChatEncoder(processor)(chat).labels
    said = processor.tokenizer.decode([label for label in ids if label != -100], clean_up_tokenization_spaces=False)
    assert said == f"a cat{expected}yes{expected}"


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{% endfor %}",
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}",
        "{% for message in messages %}{% if not loop.first %}\n### {% endif %}{{ message['content'] }}{% endfor %}",
        # The end of the last answer and what stands after the others start with the same character.
        "{% for message in messages %}<{{ message['content'] }}{% endfor %}<end of chat>",
    ],
)
def test_a_template_without_an_end_is_refused(template):
    with pytest.raises(UserError, match=r"^chat_template: got nothing that ends an answer, expected .*\.$"):
        ChatEncoder(processor_of(template))


def test_an_end_that_the_tokenizer_does_not_know_is_refused():
    tokenizer = build_word_tokenizer(["what is it ? a cat"])
    processor = AgeVlmProcessor(whole_image_processor(32), tokenizer, chat_template=SMOLLM_2)
    with pytest.raises(
        UserError, match=r"^chat_template: got the end '<\|im_end\|>', which the tokenizer does not know, exp"
    ):
        ChatEncoder(processor)


@pytest.mark.parametrize("eos, expected", [(None, [7]), (1, [1, 7]), (7, 7), ([1, 7], [1, 7])])
def test_other_ends_are_kept(eos, expected):
    processor, config = processor_of(SMOLLM_2), GenerationConfig(eos_token_id=eos)
    for _ in range(2):
        stop_at_end_of_turn(config, processor.tokenizer, processor.chat_template)
        assert config.eos_token_id == expected and config.stop_strings is None


@pytest.mark.parametrize("strings, expected", [(None, ["\n### End"]), ("stop", ["stop", "\n### End"])])
def test_other_stop_strings_are_kept(strings, expected):
    processor, config = processor_of(ORDINARY), GenerationConfig(stop_strings=strings, eos_token_id=1)
    for _ in range(2):
        stop_at_end_of_turn(config, processor.tokenizer, processor.chat_template)
        assert config.stop_strings == expected and config.eos_token_id == 1
