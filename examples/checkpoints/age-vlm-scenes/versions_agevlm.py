"""Which releases of transformers the checkpoint code beside this file was tested with.

Apart from the rest, and before it: with another release the rest may not even import.
"""

import transformers
from packaging.version import Version
from transformers.utils import logging


logger = logging.get_logger(__name__)

# From the first to before the second; setup.py, docs/versions.md and nox go by it. How to raise it: CONTRIBUTING.md.
TESTED_TRANSFORMERS = ("5.24.0", "5.25")


def supported_range() -> str:
    """As pip writes it, `>=5.24.0,<5.25`."""
    return ">={},<{}".format(*TESTED_TRANSFORMERS)


def untested_release(release: str = transformers.__version__) -> str | None:
    """One sentence if `release` of transformers is outside of the range that was tested, else `None`."""
    first, beyond = map(Version, TESTED_TRANSFORMERS)
    # The base version: a development build of the release beyond is that release already.
    if first <= Version(Version(release).base_version) < beyond:
        return None
    return (
        f"transformers: got {release}, expected {supported_range()}, which AGE-VLM's code was tested with; with another release "
        "answers may be wrong (`age-vlm check` tells)."
    )


def warn_if_untested() -> None:
    """Says so once, where the installed transformers is outside of the tested range."""
    if sentence := untested_release():
        logger.warning_once(sentence)
