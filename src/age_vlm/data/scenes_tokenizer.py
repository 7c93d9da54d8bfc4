"""A word-level tokenizer made on the spot, with the special tokens of Llama 3: for models of a few megabytes."""

from __future__ import annotations

import string
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ..errors import UserError
from .scene_questions import scene_texts
from .scenes import SceneConfig


BOS, EOT, PAD, UNKNOWN = "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>", "<unk>"
SPECIAL_TOKENS = (
    BOS,
    "<|end_of_text|>",
    PAD,
    "<|start_header_id|>",
    "<|end_header_id|>",
    EOT,
    *(f"<|reserved_special_token_{number}|>" for number in range(4)),
    UNKNOWN,
)

# Roles of the chat template, and what a person may well say to a model whose own texts never use it.
_COMMON_WORDS = """
    user assistant system yes no a an the is are was do does not and or of in on at to it its this that there here
    what which where who how many much you i can see describe show tell me about please image image photo
    left right above below over under near behind between next top bottom middle object objects thing things
    colour color shape size small large big zero one two three four five six seven eight nine ten none nothing
""".split()


def build_word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that knows every word of the texts, besides common words, single characters and the special tokens.

    Words are what white space and punctuation separate, in lower case; a word that is not known becomes `<unk>`. White
    space is not kept, so decoding puts one space between words and none before a comma, full stop or question mark. As
    with Llama 3, encoding with special tokens puts `<|begin_of_text|>` in front, and a turn ends with `<|eot_id|>`.

    The vocabulary depends on the set of words alone, not on the order or number of the texts.

    Raises:
        UserError: `texts` is one string, which would be read letter by letter.
    """
    if isinstance(texts, str):
        raise UserError("texts is one string, expected an iterable of strings.")
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    splitter = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    words = {*_COMMON_WORDS, *string.ascii_lowercase, *string.digits, *string.punctuation}
    for text in texts:
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *sorted(words - {*SPECIAL_TOKENS})])}

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    # This decoder is the one of the library that joins words by spaces and takes those before punctuation out again.
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOT,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in (BOS, EOT, PAD, UNKNOWN)],
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def build_scenes_tokenizer(config: SceneConfig | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of drawn scenes: it knows every word `age_vlm.data.scenes` can say, see `build_word_tokenizer`."""
    return build_word_tokenizer(scene_texts(config))
