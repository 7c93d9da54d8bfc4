"""The tokenizer's own chat format, wrapped: all that it does for chats of text stays, and images have their token."""

from pathlib import Path

import minijinja
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from age_vlm.processing import AgeVlmProcessor, whole_image_processor
from age_vlm.processing.chat_agevlm import LLAMA_3_TEMPLATE, PLAIN_TEMPLATE


PUBLISHED = {
    path.stem: path.read_text() for path in (Path(__file__).parents[1] / "fixtures" / "chat_templates").glob("*.jinja")
}
TOOLS = (
    "{% for message in messages %}{% if loop.first and tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message.role }}\n{% if message.tool_calls %}{% for call in message.tool_calls %}"
    "<tool>{{ call.function | tojson }}</tool>{% endfor %}{% endif %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content or '' }}<|im_end|>{% endgeneration %}{% else %}{{ message.content }}<|im_end|>"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORMATS = {**PUBLISHED, "tools": TOOLS}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string", "description": "where"}}},
    },
}
TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": " Is 'text' in it,\n or 'type': 'image'? "},
    {"role": "assistant", "content": "No."},
]


CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
]


def tokenizer_with(template, special=("<|eot_id|>", "<|im_start|>", "<|im_end|>")):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<image>", *special]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def processor_with(template, **options):
    return AgeVlmProcessor(whole_image_processor(32), tokenizer_with(template), image_token="<image>", **options)


def as_parts(messages):
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


@pytest.fixture(params=FORMATS)
def template(request):
    return FORMATS[request.param]


@pytest.mark.parametrize("turns", [TURNS, TURNS[1:], TURNS[1:2], TURNS[:2]], ids=["all", "no system", "one", "system"])
@pytest.mark.parametrize("prompt", [True, False])
def test_a_chat_of_text_is_rendered_as_the_tokenizer_does(template, turns, prompt):
    processor, tokenizer = processor_with(template), tokenizer_with(template)
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=prompt, tokenize=False)
    for messages in (turns, as_parts(turns)):
        assert processor.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False) == expected
    tokens = processor.apply_chat_template(turns, add_generation_prompt=prompt, tokenize=True, return_dict=True)
    assert tokens["input_ids"][0] == tokenizer.apply_chat_template(turns, add_generation_prompt=prompt)["input_ids"]


def test_an_answer_is_continued(template):
    processor, tokenizer = processor_with(template), tokenizer_with(template)
    begun = [*TURNS[1:2], {"role": "assistant", "content": "A ca"}]
    expected = tokenizer.apply_chat_template(begun, continue_final_message=True, tokenize=False)
    assert expected.endswith("A ca")
    for messages in (begun, as_parts(begun)):
        assert processor.apply_chat_template(messages, continue_final_message=True, tokenize=False) == expected


def test_images_stand_where_the_message_has_them(template):
    processor = processor_with(template)
    content = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}, {"type": "image"}]
    rendered = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    assert "a<image>b<image>" in rendered and rendered.count("<image>") == 2
    url = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "b"}]
    assert "<image>b" in processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": url}], chat_template=processor.chat_template, tokenize=False
    )


def test_other_content_is_refused(template):
    content = [{"type": "audio", "audio": "a.wav"}, {"type": "text", "text": "what?"}]
    tokenizer = processor_with(template).tokenizer
    with pytest.raises(Exception, match=r"content: got audio, expected text or image\."):
        tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=processor_with(template).chat_template, tokenize=False
        )


def test_tools_and_their_answers_stay():
    processor, tokenizer = processor_with(TOOLS), tokenizer_with(TOOLS)
    call = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Rome"}}}
    for said in ({}, {"content": None}, {"content": "Let me look."}):
        turns = [
            TURNS[1],
            {"role": "assistant", **said, "tool_calls": [call]},
            {"role": "tool", "name": "weather", "content": "sun"},
        ]
        expected = tokenizer.apply_chat_template(turns, tools=[WEATHER], tokenize=False)
        assert '<tool>{"name": "weather"' in expected
        assert processor.apply_chat_template(turns, tools=[WEATHER], tokenize=False) == expected


def test_tokens_of_the_assistant_are_masked():
    processor, tokenizer = processor_with(TOOLS), tokenizer_with(TOOLS)
    options = {"return_assistant_tokens_mask": True, "return_dict": True, "tokenize": True}
    expected = tokenizer.apply_chat_template(TURNS, **options)
    assert sum(expected["assistant_masks"]) == len("A cat.") + len("No.") + 2
    for messages in (TURNS, as_parts(TURNS)):
        assert list(processor.apply_chat_template(messages, **options)["assistant_masks"][0]) == list(
            expected["assistant_masks"]
        )


@pytest.mark.parametrize("name", PUBLISHED)
def test_minijinja_renders_it_alike(name):
    """The engine of TGI and of other servers that are not written in Python."""
    processor = processor_with(FORMATS[name])
    messages = [*CHAT, {"role": "user", "content": "And now?"}]
    engine = minijinja.Environment(trim_blocks=True, lstrip_blocks=True, pycompat=True)
    engine.keep_trailing_newline = False
    rendered = engine.render_str(
        processor.chat_template, messages=messages, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert rendered == processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def test_the_tokenizer_of_a_saved_processor_has_the_template(template, tmp_path):
    processor = processor_with(template)
    processor.save_pretrained(tmp_path)
    for loaded in (AgeVlmProcessor.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded.chat_template == processor.chat_template
        assert loaded.apply_chat_template(CHAT, tokenize=False) == processor.apply_chat_template(CHAT, tokenize=False)


def test_templates_by_name_are_each_wrapped():
    processor = processor_with({"default": PUBLISHED["smollm2"], "tool_use": TOOLS})
    for name, template in (("default", PUBLISHED["smollm2"]), ("tool_use", TOOLS)):
        rendered = processor.apply_chat_template(CHAT, chat_template=name, tokenize=False)
        assert rendered == processor_with(template).apply_chat_template(CHAT, tokenize=False)


def test_a_template_of_its_own_for_the_processor():
    processor = processor_with(PUBLISHED["smollm2"], chat_template=PUBLISHED["tinyllama"])
    assert "<|user|>" in processor.apply_chat_template(CHAT, tokenize=False)


def test_a_tokenizer_without_a_template_gets_one_that_it_knows_the_tokens_of():
    known = AgeVlmProcessor(whole_image_processor(32), tokenizer_with(None), image_token="<image>")
    assert known.chat_template.endswith(LLAMA_3_TEMPLATE)
    other = AgeVlmProcessor(whole_image_processor(32), tokenizer_with(None, []), image_token="<image>")
    assert other.chat_template.endswith(PLAIN_TEMPLATE)
    assert other.apply_chat_template(CHAT, tokenize=False) == "<s>User: <image>what is it?\nAssistant: a cat</s>\n"
    asked = other.apply_chat_template(CHAT[:1], add_generation_prompt=True, tokenize=False)
    assert asked == "<s>User: <image>what is it?\nAssistant:"


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages %}{{ message.role }}: {{ message.content[0].text }}\n{% endfor %}",
        "{% for m in messages %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}",
        "{% for m in messages %}{{ m.content | replace('<image>', '') }}{% endfor %}",
        "{% for m in messages %}{% for p in m.content %}{{ '<picture>' if p.type == 'image' else p.text }}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_drops_images_is_refused(template):
    with pytest.raises(ValueError, match=r"^chat_template: leaves images out, expected one that puts '<image>' .*\.$"):
        processor_with(template)
