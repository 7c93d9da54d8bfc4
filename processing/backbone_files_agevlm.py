"""Loading the pretrained components that a model and its processor are built from."""

import os


def load_component(argument: str, name: str | os.PathLike, auto_class, **kwargs):
    """`auto_class.from_pretrained`, whose failure is one ValueError that says what to do about `argument`."""
    try:
        return auto_class.from_pretrained(name, **kwargs)
    except Exception as error:
        if not is_unreadable(error):
            raise
        raise ValueError(
            f"{argument}: '{name}' could not be loaded; expected a folder with a saved model, or a Hub id that you may read "
            f"(for a gated one accept its licence at https://huggingface.co/{name} and run `hf auth login`): "
            f"{_first_line(error)}"
        ) from error


def reserved_image_token(tokenizer) -> tuple[str, int]:
    """The first reserved special token of a Llama 3 tokenizer, as text and id: the vocabulary does not grow.

    Raises:
        ValueError: if the tokenizer reserves none; name a token of its vocabulary then.
    """
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    reserved = sorted((index, token) for token, index in added.items() if token.startswith("<|reserved_special_token_"))
    if not reserved:
        raise ValueError(
            "image_token_id: the tokenizer has no `<|reserved_special_token_...|>`, expected the id of a token that stands "
            "for an image."
        )
    return reserved[0][1], reserved[0][0]


def is_unreadable(error: Exception) -> bool:
    """Whether it says that what was to be loaded is missing or damaged; the library of tokenizers raises a bare `Exception`."""
    return isinstance(error, (OSError, ValueError, KeyError, TypeError)) or type(error) is Exception


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines and not isinstance(error, KeyError) else repr(error)
