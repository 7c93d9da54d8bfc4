"""What a user can mend, and how a command says so."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path


class UserError(ValueError):
    """A mistake in what a user gave: one sentence that names the argument, what came and what was expected.

    Commands print the sentence and end with exit code 2. Any other exception is a fault of ours and keeps its traceback.
    """


def one_of(given: object, known: Iterable[str]) -> str:
    """`one of a, b, c (nearest: 'b')`: what was expected instead of `given`, as the end of a sentence."""
    known = list(known)
    return f"one of {', '.join(known)}{nearest(given, known)}"


def nearest(given: object, known: Iterable[str]) -> str:
    """` (nearest: 'b')`, for known names that are too many to list; empty where there are none."""
    found = get_close_matches(str(given), list(known), n=1, cutoff=0.0)
    return f" (nearest: '{found[0]}')" if found else ""


def run_command(name: str, command: Callable[[], object], *, debug: bool = False) -> int:
    """Exit code of a command: 0, or 2 after one sentence on standard error about what its user can mend, or 130 where it
    was interrupted. Whatever else goes wrong is raised.

    Args:
        name: of the command, in front of the sentence.
        debug: print the traceback too.
    """
    try:
        command()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if isinstance(error, UserError):
            sentence = " ".join(str(error).split())
        elif _is_out_of_memory(error):
            sentence = (
                f"{str(error).partition('. ')[0]}; expected less than the device has: lower the batch size "
                "(training.batch_size) or turn on training.gradient_checkpointing; `age-vlm plan` says what fits."
            )
        else:
            raise
        if debug:
            traceback.print_exc()
        print(f"{name}: {sentence}", file=sys.stderr)
        return 2
    return 0


def _is_out_of_memory(error: Exception) -> bool:
    # Not imported for that: where torch was not needed, it has raised nothing.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


_CHECKPOINT_CODE = tuple(f"{__package__}.{folder}." for folder in ("configuration", "modeling_agevlm", "processing"))


@contextmanager
def checkpoint_errors() -> Iterator[None]:
    """A block, or a function, in which the ValueErrors that checkpoint code itself raises, which cannot import UserError,
    become UserErrors. Those that come from anywhere else, also through it, stay as they are."""
    try:
        yield
    except ValueError as error:
        frame = error.__traceback__
        while frame.tb_next is not None:
            frame = frame.tb_next
        if isinstance(error, UserError) or not frame.tb_frame.f_globals["__name__"].startswith(_CHECKPOINT_CODE):
            raise
        raise UserError(str(error)) from error


@contextmanager
def reading(argument: str, path: str | Path) -> Iterator[None]:
    """A block that reads a file or folder that a user named: what is wrong with it becomes a UserError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{argument}: '{path}' is not text in UTF-8, expected a file that is.") from error
    except OSError as error:
        raise UserError(f"{argument}: '{path}' could not be read: {_reason(error)}.") from error


@contextmanager
def writing(argument: str, path: str | Path) -> Iterator[None]:
    """A block that writes a file or folder that a user named: what is wrong with it becomes a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{argument}: '{path}' could not be written: {_reason(error)}.") from error


@contextmanager
def filling(argument: str, folder: str | Path) -> Iterator[None]:
    """A long block that writes files into a folder, among much else: a disk that is full becomes a UserError."""
    try:
        yield
    except Exception as error:
        if not _is_full_disk(error):
            raise
        reason = _reason(error) if isinstance(error, OSError) else "a file came out too short, as on a full disk"
        raise UserError(f"{argument}: '{folder}' could not be written: {reason}.") from error


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def _is_full_disk(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FULL
    # Both write in code of their own, which knows no OSError.
    if type(error).__name__ == "SafetensorError":
        return "I/O error" in str(error) or "IoError" in str(error)
    return isinstance(error, RuntimeError) and ("PytorchStreamWriter" in str(error) or "inline_container" in str(error))


def check_new_folder(argument: str, folder: str | Path) -> None:
    """Raises UserError, one sentence, where no file can be made in `folder`, which need not be there yet."""
    folder = Path(folder)
    with reading(argument, folder):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{argument}: '{folder}' cannot be a folder: '{there}' is a file, expected another name.")
    if not _may_be_written(there):
        raise UserError(
            f"{argument}: '{folder}' cannot be written: '{there}' does not allow it, expected another folder."
        )


def check_new_file(argument: str, path: str | Path) -> None:
    """Raises UserError, one sentence, where `path` cannot be written as a file."""
    path = Path(path)
    with reading(argument, path):
        if path.is_dir():
            raise UserError(f"{argument}: '{path}' is a folder, expected the name of a file.")
        if not path.absolute().parent.is_dir():
            raise UserError(f"{argument}: '{path}' is not in a folder that exists.")
    if not _may_be_written(path.absolute().parent):
        raise UserError(f"{argument}: '{path}' cannot be written: its folder does not allow it, expected another one.")


def _may_be_written(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)


def _reason(error: OSError) -> str:
    # Errors of libraries that call themselves one have a sentence instead of a number.
    return error.strerror or " ".join(str(error).split()).rstrip(".") or type(error).__name__
