import math

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from age_vlm.data.questions import EvaluationItem, Question
from age_vlm.data.scenes_tokenizer import build_word_tokenizer
from age_vlm.errors import UserError
from age_vlm.evaluation.answers import generate_answers, yes_scores
from age_vlm.processing import AgeVlmProcessor, whole_image_processor


def items_of(count, questions):
    rng = np.random.default_rng(0)
    for number in range(count):
        image = Image.fromarray(rng.integers(0, 256, (20 + number, 32, 3), dtype=np.uint8))
        asked = tuple(
            Question(f"{number}/{place}", str(number), text, "yes", "existence") for place, text in enumerate(questions)
        )
        yield EvaluationItem(str(number), image, asked)


ITEMS = list(items_of(3, ["is there a dog?", "dog?", "how many dogs and how many cats are in the picture?"]))


def one_by_one(processor):
    for item in ITEMS:
        for question in item.questions:
            message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}
            text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
            yield (
                question.id,
                processor(images=[item.image], text=[text], return_tensors="pt", add_special_tokens=False),
            )


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_scores_are_those_of_each_question_alone(model, processor, batch_size):
    # Every byte is a token.
    yes, no = ([processor.tokenizer.get_vocab()[letter] for letter in letters] for letters in ("yY", "nN"))
    scores = yes_scores(model=model, processor=processor, items=ITEMS, batch_size=batch_size)
    assert len(scores) == 9
    with torch.no_grad():
        for name, inputs in one_by_one(processor):
            logits = model(**inputs).logits[0, -1]
            assert scores[name] == pytest.approx(float(logits[yes].logsumexp(0) - logits[no].logsumexp(0)), abs=1e-3)


@pytest.mark.parametrize("batch_size", [2, 100])
def test_answers_are_those_of_each_question_alone(model, processor, batch_size):
    answers = generate_answers(model=model, processor=processor, items=ITEMS, batch_size=batch_size, max_new_tokens=3)
    for name, inputs in one_by_one(processor):
        generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answers[name] == processor.tokenizer.decode(generated, skip_special_tokens=True).strip()
    assert len(set(answers.values())) > 1


@pytest.mark.parametrize("function", [yes_scores, generate_answers])
def test_the_same_question_about_one_image_object_is_asked_once(model, processor, function):
    first, other = ITEMS[:2]
    again = [
        EvaluationItem("again", first.image, tuple(Question(f"again/{q.id}", "again", q.text, "no", "count") for q in first.questions)),
        EvaluationItem("other", other.image, tuple(Question(f"other/{q.id}", "other", q.text, "no", "count") for q in first.questions)),
    ]  # fmt: skip
    asked = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    results = function(model, processor, [first, *again])
    hook.remove()
    assert asked[0] == 2 * len(first.questions)
    assert len(results) == 3 * len(first.questions)
    for question in first.questions:
        assert results[question.id] == results[f"again/{question.id}"]
    alone = function(model, processor, [again[1]])
    for question, value in alone.items():
        assert results[question] == (pytest.approx(value, abs=1e-3) if function is yes_scores else value)


def test_a_model_in_training_stays_in_training(make_model, processor):
    model = make_model().train()
    for function in (yes_scores, generate_answers):
        function(model, processor, ITEMS[:1])
        assert model.training
    model.eval()
    yes_scores(model, processor, ITEMS[:1])
    assert not model.training


def test_nothing_asked_is_nothing_answered(model, processor):
    assert yes_scores(model, processor, []) == {} == generate_answers(model, processor, [])


SPELLINGS = {
    "byte BPE": [("yes", "no"), ("Yes", "No"), ("YES", "NO"), ("Ġyes", "Ġno"), ("ĠYes", "ĠNo"), ("Yes.", "No.")],
    "sentencepiece": [("▁yes", "▁no"), ("▁Yes", "▁No"), ("yes", "no"), ("Yes", "No"), ("▁YES", "▁NO")],
    "words": [("yes", "no")],
}


def merges_of(words):
    """Merges that make each word, letter by letter, and every token on the way."""
    pairs = [(word[:end], word[end]) for word in words for end in range(1, len(word))]
    return list(dict.fromkeys(pairs)), [*dict.fromkeys("".join(pair) for pair in pairs)]


def tokenizer_of(kind):
    special = [
        "<|reserved_special_token_0|>",
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ]
    if kind == "words":
        return build_word_tokenizer(["yes no dog is there a ?"])
    # A blank is merged with the word before the word's own letters are.
    words = sorted((word for pair in SPELLINGS[kind] for word in pair), key=lambda word: word[0] not in "Ġ▁")
    merges, made = merges_of(words)
    if kind == "byte BPE":
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    else:
        letters = ["▁", *map(chr, range(33, 127)), "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*special, *letters, *made]))}
    if kind == "byte BPE":
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
        # Periods stay with the word here: some vocabularies have such tokens.
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<|eot_id|>"
    )


class Says(torch.nn.Module):
    """Gives these tokens these logits after every prompt, and all others the one of `other`."""

    device = torch.device("cpu")

    def __init__(self, size, logits, other=-30.0):
        super().__init__()
        self.row = torch.full((size,), other)
        for token, logit in logits.items():
            self.row[token] = logit

    def forward(self, input_ids, attention_mask, pixel_values, image_indices, logits_to_keep):
        return CausalLMOutput(logits=self.row.repeat(len(input_ids), logits_to_keep, 1))


PROMPTS = {"header": None, "blank": "### {}:", "bare": "[{}]", "blank at the end": "### {}: "}


def processor_of(kind, prompt):
    template = None
    if PROMPTS[prompt] is not None:
        start = PROMPTS[prompt].format("{{ message['role'] }}")
        template = "{% for message in messages %}" + start + "{{ message['content'] }}<|eot_id|>{% endfor %}"
        template += "{% if add_generation_prompt %}" + PROMPTS[prompt].format("assistant") + "{% endif %}"
    return AgeVlmProcessor(whole_image_processor(32), tokenizer_of(kind), chat_template=template)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("kind, spelling", [(kind, pair) for kind, pairs in SPELLINGS.items() for pair in pairs])
def test_whoever_says_yes_in_any_spelling_has_said_yes(kind, spelling, prompt):
    processor = processor_of(kind, prompt)
    vocabulary = processor.tokenizer.get_vocab()
    for word, sign in zip(spelling, (1, -1)):
        scores = yes_scores(Says(len(vocabulary), {vocabulary[word]: 5.0}), processor, ITEMS)
        assert len(scores) == 9
        for score in scores.values():
            assert sign * score > 25, (word, score)


def test_the_probabilities_of_all_spellings_add_up():
    processor = processor_of("byte BPE", "header")
    vocabulary = processor.tokenizer.get_vocab()
    logits = {"yes": 1.0, "ĠYes": 2.0, "YES": 0.5, "No": 1.5, "Ġno": -1.0}
    model = Says(len(vocabulary), {vocabulary[word]: logit for word, logit in logits.items()}, other=-1e4)
    expected = math.log(math.exp(1.0) + math.exp(2.0) + math.exp(0.5)) - math.log(math.exp(1.5) + math.exp(-1.0))
    for score in yes_scores(model, processor, ITEMS).values():
        assert score == pytest.approx(expected, abs=1e-4)


def test_what_begins_both_tells_nothing(processor):
    """Every byte is a token: a blank begins " yes" and " no"."""
    vocabulary = processor.tokenizer.get_vocab()
    for said in ("Ġ", "e", "."):
        model = Says(len(vocabulary), {vocabulary[said]: 9.0}, other=0.0)
        assert set(yes_scores(model, processor, ITEMS).values()) == {0.0}


@pytest.mark.parametrize("others", [{"yes": "ja", "no": "nein"}, {"yes": "ja"}, {"no": "nein"}], ids=str)
def test_words_that_the_tokenizer_does_not_know_are_one_sentence(others):
    known = build_word_tokenizer(["is there a dog ?"]).backend_tokenizer.to_str()
    for word, other in others.items():
        known = known.replace(f'"{word}"', f'"{other}"')
    german = Tokenizer.from_str(known)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=german, unk_token="<unk>", eos_token="<|eot_id|>", pad_token="<unk>"
    )
    processor = AgeVlmProcessor(whole_image_processor(32), tokenizer)
    with pytest.raises(UserError, match=r"^tokenizer: begins 'yes' and 'no' with the same tokens, expected .*\.$"):
        yes_scores(Says(len(processor.tokenizer), {}), processor, ITEMS)
