"""What chat templates do around the text of messages: images in it, and what begins and ends an answer."""

from dataclasses import dataclass
from itertools import takewhile


# Llama 3's own format; one token stands for an image where the message has it.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}
{%- if message['content'] is string %}{{- message['content'] }}
{%- else %}{%- for part in message['content'] %}{%- if part['type'] == 'text' %}{{- part['text'] }}{%- endif %}{%- endfor %}
{%- endif %}
{{- '<|eot_id|>' }}
{%- endgeneration %}
{%- else %}
{%- if message['content'] is string %}{{- message['content'] }}
{%- else %}{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}{{- '%IMAGE%' }}{%- elif part['type'] == 'text' %}{{- part['text'] }}{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

# Before a template that takes messages of plain text: their parts become one text, the image token where an image is.
_PARTS_TO_TEXT = """\
{%- set flat = namespace(messages=[], text='') %}\
{%- for message in messages %}\
{%- if message['content'] is string or message['content'] is not iterable %}\
{%- set flat.messages = flat.messages + [message] %}\
{%- else %}\
{%- set flat.text = '' %}\
{%- for part in message['content'] %}\
{%- set flat.text = flat.text + ('%IMAGE%' if part['type'] == 'image' else part['text'] or '') %}\
{%- endfor %}\
{%- set flat.messages = flat.messages + [dict(message, content=flat.text)] %}\
{%- endif %}\
{%- endfor %}\
{%- set messages = flat.messages %}"""
_QUESTION, _ANSWER = "Zq1question", "Zq2answer"


@dataclass(frozen=True)
class AssistantTurn:
    """What a chat template puts around an answer that a model has to say itself.

    Attributes:
        start: text between the end of the prompt for an answer and the answer, a blank for example; mostly empty.
        end: text after the answer, to its first token that is none of ordinary text, or its last visible character.
        end_token_id: the token at which generation stops; None where `end` is several tokens of ordinary text.
    """

    start: str
    end: str
    end_token_id: int | None


def template_with_images(tokenizer, chat_template: str, image_token: str) -> str:
    """The template itself where it takes messages made of parts; else one that puts `image_token` where an image is."""
    try:
        rendered = _render(tokenizer, chat_template, [_message("user", _QUESTION)])
        if "'text'" not in rendered:
            return chat_template
    except ImportError:  # without Jinja nothing can be rendered, now or later
        return chat_template
    except Exception:  # a template for text alone fails in its own way, as it may add parts to a text
        pass
    return _PARTS_TO_TEXT.replace("%IMAGE%", image_token) + chat_template


def assistant_turn(tokenizer, chat_template: str | dict[str, str]) -> AssistantTurn:
    """What begins and ends an answer, found by rendering chats that differ around it.

    Args:
        chat_template: of several, by name, the default one counts.

    Raises:
        ValueError: one sentence, for a template or tokenizer that does not end an answer.
    """
    if isinstance(chat_template, dict):
        chat_template = chat_template.get("default")
    if not isinstance(chat_template, str):
        raise ValueError(f"chat_template: got a {type(chat_template).__name__}, expected the text of a Jinja template.")
    template = template_with_images(tokenizer, chat_template, "")
    asked = [_message("user", _QUESTION)]
    answered = [*asked, _message("assistant", _ANSWER)]
    try:
        before, found, last = _render(tokenizer, template, answered).partition(_ANSWER)
    except Exception as error:  # templates raise what they like
        raise ValueError(f"chat_template: got {error!r} for a question and its answer, expected their text.") from error
    if not found:
        raise ValueError("chat_template: changes the text of messages, expected one that keeps it.")
    try:
        followed = _render(tokenizer, template, answered + asked).partition(_ANSWER)[2]
    except Exception:  # its own way to say that it takes one question
        followed = last
    added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    names = [tokenizer.convert_ids_to_tokens(index) for index in added]

    end = "".join(one for one, other in takewhile(lambda pair: pair[0] == pair[1], zip(last, followed)))
    stops = [end.index(name) + len(name) for name in names if name in end]
    if stops:
        end = end[: min(stops)]
    elif end.rstrip() == last.rstrip():
        end = end.rstrip()
    else:  # text of what comes next may begin with the same characters
        end = ""
    ids = tokenizer(end, add_special_tokens=False)["input_ids"] if end else []
    if not ids or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids):
        got = f"the end {end!r}, which the tokenizer does not know" if end else "nothing that ends an answer"
        raise ValueError(f"chat_template: got {got}, expected an end such as the tokenizer's eos_token.")
    prompt = _render(tokenizer, template, asked, add_generation_prompt=True)
    start = before.removeprefix(prompt) if before.startswith(prompt) else ""
    return AssistantTurn(start, end, ids[-1] if ids[-1] in added or len(ids) == 1 else None)


def stop_at_end_of_turn(generation_config, tokenizer, chat_template: str) -> None:
    """Makes generation stop where the template ends an answer, besides where it stops already.

    Sets `eos_token_id`, or `stop_strings` where the end is several tokens of ordinary text: `generate` then wants
    `tokenizer=`, and says so.

    Raises:
        ValueError: see `assistant_turn`.
    """
    turn = assistant_turn(tokenizer, chat_template)
    if turn.end_token_id is None:
        strings = generation_config.stop_strings or []
        strings = [strings] if isinstance(strings, str) else list(strings)
        generation_config.stop_strings = strings if turn.end in strings else [*strings, turn.end]
        return
    eos = generation_config.eos_token_id
    ends = [eos] if isinstance(eos, int) else list(eos or [])
    if turn.end_token_id not in ends:
        generation_config.eos_token_id = [*ends, turn.end_token_id]


def _message(role: str, text: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _render(tokenizer, chat_template: str, messages: list[dict], **kwargs) -> str:
    return tokenizer.apply_chat_template(messages, chat_template=chat_template, tokenize=False, **kwargs)
