"""What chat templates do around the text of messages: images in it, and what begins and ends an answer."""

from dataclasses import dataclass
from itertools import takewhile


# For tokenizers without a template of their own: Llama 3's format where its tokens are known, else ordinary text.
LLAMA_3_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + '<|eot_id|>' }}{%- endgeneration %}
{%- else %}
{{- message['content'] + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
PLAIN_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{{- message['role'] | capitalize + ':' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- ' ' + message['content'] + eos_token }}{%- endgeneration %}
{%- else %}
{{- ' ' + message['content'] }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}
"""

# Before a template that takes messages of plain text: their parts become one text, the image token where an image is.
# `messages` is set again, so the template itself stays as it is. Only what Jinja, its sandbox in transformers and vLLM, and
# minijinja in TGI all have.
_PARTS_TO_TEXT = """\
{%- set flat = namespace(messages=[], text='') %}\
{%- for message in messages %}\
{%- if message['content'] is not defined or message['content'] is string or message['content'] is not iterable %}\
{%- set flat.messages = flat.messages + [message] %}\
{%- else %}\
{%- set flat.text = '' %}\
{%- for part in message['content'] %}\
{%- if part['type'] == 'image' or part['type'] == 'image_url' %}{%- set flat.text = flat.text + '%IMAGE%' %}\
{%- elif part['type'] == 'text' %}{%- set flat.text = flat.text + (part['text'] or '') %}\
{%- else %}{{- raise_exception('content: got ' + part['type'] + ', expected text or image.') }}\
{%- endif %}\
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
        keeps_blanks: whether blanks around an answer stay; many templates trim messages.
    """

    start: str
    end: str
    end_token_id: int | None
    keeps_blanks: bool


def default_template(tokenizer) -> str | dict[str, str]:
    """The tokenizer's own chat template, or templates by name; one of ours where it has none."""
    if tokenizer.chat_template:
        return tokenizer.chat_template
    return LLAMA_3_TEMPLATE if "<|eot_id|>" in tokenizer.get_vocab() else PLAIN_TEMPLATE


def template_with_images(tokenizer, chat_template: str, image_token: str) -> str:
    """The template itself where it puts `image_token` where an image is; else a template that does, and then goes on as the
    template does for messages of plain text.

    Raises:
        ValueError: one sentence, for a template that leaves images out.
    """
    parts = [{"type": "image"}, {"type": "text", "text": _QUESTION}]
    rendered = None
    for candidate in (chat_template, _PARTS_TO_TEXT.replace("%IMAGE%", image_token) + chat_template):
        try:
            rendered = _render(tokenizer, candidate, [{"role": "user", "content": parts}])
        except ImportError:  # without Jinja nothing can be rendered, now or later
            return chat_template
        except Exception:  # a template for text alone fails in its own way, as it may add parts to a text
            continue
        # A template that prints a list shows the names of its keys.
        if rendered.count(image_token) == 1 and "'type'" not in rendered:
            return candidate
    if rendered is not None:
        raise ValueError(f"chat_template: leaves images out, expected one that puts '{image_token}' where an image is.")
    return candidate


def assistant_turn(tokenizer, chat_template: str | dict[str, str]) -> AssistantTurn:
    """What begins and ends an answer, found by rendering chats that differ around it.

    Args:
        chat_template: that of a processor; of several, by name, the default one counts.

    Raises:
        ValueError: one sentence, for a template or tokenizer that does not end an answer.
    """
    if isinstance(chat_template, dict):
        chat_template = chat_template.get("default")
    if not isinstance(chat_template, str):
        raise ValueError(f"chat_template: got a {type(chat_template).__name__}, expected the text of a Jinja template.")
    asked = [_message("user", _QUESTION)]
    answered = [*asked, _message("assistant", _ANSWER)]
    try:
        before, found, last = _render(tokenizer, chat_template, answered).partition(_ANSWER)
    except Exception as error:  # templates raise what they like
        raise ValueError(f"chat_template: got {error!r} for a question and its answer, expected their text.") from error
    if not found:
        raise ValueError("chat_template: changes the text of messages, expected one that keeps it.")
    try:
        followed = _render(tokenizer, chat_template, answered + asked).partition(_ANSWER)[2]
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
    prompt = _render(tokenizer, chat_template, asked, add_generation_prompt=True)
    start = before.removeprefix(prompt) if before.startswith(prompt) else ""
    blanks = f"\u2003{_ANSWER}\u2003"  # that no template writes
    keeps_blanks = blanks in _render(tokenizer, chat_template, [*asked, _message("assistant", blanks)])
    end_token_id = ids[-1] if ids[-1] in added or len(ids) == 1 else None
    return AssistantTurn(start, end, end_token_id, keeps_blanks)


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
