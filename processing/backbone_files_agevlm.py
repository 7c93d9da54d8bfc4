"""Loading the pretrained components that a model and its processor are built from."""

import os
import struct


NEW_IMAGE_TOKEN = "<image>"


def load_component(argument: str, name: str | os.PathLike, auto_class, **kwargs):
    """`auto_class.from_pretrained`, whose failure is one ValueError that says what to do about `argument`; keywords that are
    None are left out."""
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    try:
        return auto_class.from_pretrained(name, **kwargs)
    except Exception as error:
        if not is_unreadable(error):
            raise
        hub = ""
        if not os.path.exists(name):
            hub = (
                f", or a Hub id that you may read (for a gated one accept its licence at https://huggingface.co/{name} and "
                "run `hf auth login`)"
            )
        raise ValueError(
            f"{argument}: '{name}' could not be loaded; expected a folder with a saved model{hub}: {_first_line(error)}"
        ) from error


def add_image_token(tokenizer, image_token: str | None = None) -> tuple[str, int]:
    """The token that stands for an image, as text and id: `image_token`, else the first reserved special token, as Llama 3's
    tokenizers have, else `<image>`, which is added to the tokenizer where it is new.

    Raises:
        ValueError: one sentence, for an `image_token` that the tokenizer does not know.
    """
    if image_token is not None:
        index = tokenizer.convert_tokens_to_ids(image_token)
        if index is None or index == tokenizer.unk_token_id:
            raise ValueError(
                f"image_token: got '{image_token}', which is not in the tokenizer's vocabulary, expected a token that is, or "
                "none for a new one."
            )
        return image_token, index
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    reserved = sorted((index, token) for token, index in added.items() if token.startswith("<|reserved_special_token_"))
    if reserved:
        return reserved[0][1], reserved[0][0]
    tokenizer.add_tokens([NEW_IMAGE_TOKEN], special_tokens=True)
    return NEW_IMAGE_TOKEN, tokenizer.convert_tokens_to_ids(NEW_IMAGE_TOKEN)


def is_unreadable(error: Exception) -> bool:
    """Whether it says that what was to be loaded is missing or damaged; the library of tokenizers raises a bare `Exception`."""
    return isinstance(error, (OSError, ValueError, KeyError, TypeError, struct.error)) or type(error) is Exception


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    line = lines[0] if lines and not isinstance(error, KeyError) else repr(error)
    return line.rstrip(" .:") + "."
