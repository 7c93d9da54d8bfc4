"""What all teachers share: what they are asked, what they answer, and how one is loaded by name."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from PIL import Image

from ..data.masks import MaskRLE
from ..errors import UserError, checkpoint_errors, one_of
from ..processing.images_agevlm import load_rgb


TEACHERS = {
    "annotated": "annotated:AnnotatedTeacher",
    "sam2": "sam2_package:Sam2PackageTeacher",
    "sam2-transformers": "sam2:Sam2Teacher",
    "sam3": "sam3:Sam3Teacher",
}
"""Name of a teacher -> module of this package and class, which is imported when the teacher is asked for."""

_SAM2 = {size: f"facebook/sam2.1-hiera-{size}" for size in ("tiny", "small", "base-plus", "large")}
VARIANTS: dict[str, dict[str, str]] = {
    "annotated": {},
    "sam2": _SAM2,
    "sam2-transformers": _SAM2,
    "sam3": {"large": "facebook/sam3"},
}
"""Name of a teacher -> name of a variant -> Hub id. Where none is named, `large` is loaded."""

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Prompt:
    """What a teacher is told of one phrase. Coordinates are pixels of the upright image, from its upper left corner.

    Attributes:
        phrase: the words.
        box: x0, y0, x1, y1.
        points: (x, y) each.
        labels: for each point 1 where it lies on the thing meant, 0 where it does not; all 1 if left out.
        mask: the mask that the data already has, of the image's size.

    Raises:
        UserError: a label for each point is not given, or is neither 0 nor 1.
    """

    phrase: str
    box: tuple[float, float, float, float] | None = None
    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] | None = None
    mask: MaskRLE | None = None

    def __post_init__(self) -> None:
        labels = (1,) * len(self.points) if self.labels is None else tuple(self.labels)
        if len(labels) != len(self.points) or not set(labels) <= {0, 1}:
            raise UserError(f"labels: got {labels} for {len(self.points)} points, expected a 0 or 1 for each.")
        object.__setattr__(self, "labels", labels)


@dataclass(frozen=True)
class Masks:
    """What a teacher found for one phrase.

    Attributes:
        masks: (found, height, width) bool at the resolution of the upright image; there may be none.
        scores: (found,) float32, how good the teacher takes each mask to be, 0 to 1.
    """

    masks: np.ndarray
    scores: np.ndarray

    def union(self, min_score: float = 0.0) -> tuple[np.ndarray, float] | None:
        """All masks of at least that score as one (height, width), and the best score; the best mask alone where all
        scores are lower; None where nothing was found."""
        scores = np.nan_to_num(self.scores, nan=0.0)
        if not len(scores):
            return None
        best = int(scores.argmax())
        chosen = scores >= min_score
        mask = self.masks[chosen].any(0) if chosen.any() else self.masks[best]
        return mask, float(scores[best])


class Teacher(ABC):
    """Says where in an image a phrase is."""

    name: ClassVar[str]
    """Key of `TEACHERS`."""
    uses_place: ClassVar[bool] = True
    """Whether boxes and points make a difference."""

    @classmethod
    @abstractmethod
    def load(cls, model: str, dtype: str, device: torch.device) -> Teacher:
        """The teacher with the weights of a Hub repository or a local folder."""

    def identity(self) -> dict[str, str | int]:
        """What decides the masks, apart from the image and the prompt."""
        return {"teacher": self.name}

    def lacks(self, prompt: Prompt) -> str | None:
        """The reason why this teacher cannot answer the prompt; None where it can."""
        return None

    def ground(self, images: Sequence[Image.Image], prompts: Sequence[Sequence[Prompt]]) -> list[list[Masks]]:
        """Masks for phrases of several images at once; each image is encoded once, however many phrases it has.

        Args:
            images: of any size and mode; the EXIF orientation is applied.
            prompts: for each image its prompts, none of which this teacher `lacks` anything for.

        Returns:
            For each image, for each of its prompts what was found.

        Raises:
            UserError: there are more or fewer lists of prompts than images, or a prompt cannot be answered.
        """
        if len(images) != len(prompts):
            raise UserError(f"prompts: got {len(prompts)} lists for {len(images)} images, expected one for each.")
        for prompt in (prompt for asked in prompts for prompt in asked):
            if reason := self.lacks(prompt):
                raise UserError(f"prompts: {prompt.phrase!r} cannot be grounded by '{self.name}': {reason}.")
        answers: list[list[Masks]] = [[] for _ in images]
        asked = [number for number, own in enumerate(prompts) if own]
        if asked:
            with checkpoint_errors():
                images = [load_rgb(images[number]) for number in asked]
            found = self._ground(images, [prompts[number] for number in asked])
            for number, masks in zip(asked, found):
                answers[number] = masks
        return answers

    @abstractmethod
    def _ground(self, images: list[Image.Image], prompts: list[Sequence[Prompt]]) -> list[list[Masks]]:
        """As `ground`, for RGB images of which each has a prompt."""


class VisualTeacher(Teacher):
    """A teacher that is told the place, by a box, by points, or by both, and gives the one mask it takes to be best."""

    # At the resolution of the image, a mask of a photograph takes some 50 MB while it is made.
    most_at_once = 16

    def lacks(self, prompt: Prompt) -> str | None:
        return None if prompt.box is not None or prompt.points else "there is neither a box nor a point for it"

    @torch.inference_mode()
    def _ground(self, images: list[Image.Image], prompts: list[Sequence[Prompt]]) -> list[list[Masks]]:
        features = self._encode(images)
        answers = []
        for number, asked in enumerate(prompts):
            found: dict[int, Masks] = {}
            for alike in _alike(asked, self.most_at_once):
                masks, scores = self._decode(features, number, images[number], [asked[place] for place in alike])
                for row, place in enumerate(alike):
                    found[place] = Masks(masks[row : row + 1], scores[row : row + 1])
            answers.append([found[place] for place in range(len(asked))])
        return answers

    @abstractmethod
    def _encode(self, images: list[Image.Image]) -> Any:
        """Features of all images, in one pass of the image encoder."""

    @abstractmethod
    def _decode(
        self, features: Any, number: int, image: Image.Image, prompts: list[Prompt]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Masks (prompts, height, width) bool and scores (prompts,) of prompts with equally many points, and all or none
        of them with a box, about image `number`."""


def is_ambiguous(prompt: Prompt) -> bool:
    """Whether it may mean a thing or a part of it, so that SAM 2 is to propose several masks: a single point does."""
    return prompt.box is None and len(prompt.points) == 1


def _alike(prompts: Sequence[Prompt], most: int) -> Iterator[list[int]]:
    """Places of prompts that go through a decoder together, at most so many.

    A prompt that is padded to the length of a longer one changes its own mask: the padding is attended to.
    """
    kinds = defaultdict(list)
    for place, prompt in enumerate(prompts):
        kinds[prompt.box is None, len(prompt.points)].append(place)
    for places in kinds.values():
        yield from (places[start : start + most] for start in range(0, len(places), most))


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of names and values of a model's weights: the same for a Hub repository and its copy in a folder."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_teacher(
    name: str, model: str | Path | None = None, *, dtype: str = "float32", device: str | torch.device | None = None
) -> Teacher:
    """A teacher by its name in `TEACHERS`.

    Args:
        model: a name in `VARIANTS`, a Hub id or a local folder; `large` if left out. `annotated` has none.
        dtype: one of `DTYPES`.
        device: where it runs; by default the one accelerate gives this process.

    Raises:
        UserError: one sentence that says what to do, for an unknown name, a missing package, weights that are gated,
            missing or of something else, or a device that is not there.
    """
    if name not in TEACHERS:
        raise UserError(f"teacher: got '{name}', expected {one_of(name, TEACHERS)}.")
    if dtype not in DTYPES:
        raise UserError(f"dtype: got '{dtype}', expected {one_of(dtype, DTYPES)}.")
    source = _source(name, model)
    device = _device(device)
    module, _, class_name = TEACHERS[name].partition(":")
    try:
        teacher = getattr(import_module(f".{module}", __package__), class_name)
    except ImportError as error:
        raise UserError(_missing_package(name, error)) from error
    try:
        return teacher.load(source, dtype, device)
    # Readers of weights and of configurations raise nearly anything for a file that is not theirs.
    except Exception as error:
        raise UserError(_refusal(source, error)) from error


def _source(name: str, model: str | Path | None) -> str:
    variants = VARIANTS[name]
    if not variants:
        if model is not None:
            raise UserError(f"model: got '{model}', but the teacher '{name}' has none.")
        return ""
    model = str(model or "large")
    if model in variants:
        return variants[model]
    if Path(model).exists():
        return model
    if model.count("/") != 1 or model.startswith((".", "~", "/")):
        raise UserError(f"model: got '{model}', expected a Hub id, a folder that exists, or {one_of(model, variants)}.")
    return model


def process_state() -> PartialState:
    """Which process this is, of how many."""
    # Several processes without an accelerator are one each, unless accelerate is told that there is none.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return process_state().device
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UserError(f"device: '{device}' cannot be used on this machine: {reason}.") from error


def _missing_package(name: str, error: ImportError) -> str:
    missing = (error.name or "").partition(".")[0]
    if name == "sam2" and missing in ("sam2", "hydra", "omegaconf", "iopath"):
        return (
            "teacher: 'sam2' needs the package sam2, which is not installed: install age-vlm, then "
            "`SAM2_BUILD_CUDA=0 pip install --no-build-isolation sam2`, or use the teacher 'sam2-transformers'."
        )
    return f"teacher: '{name}' cannot be imported from what is installed: {str(error).rstrip('.')}."


def _refusal(source: str, error: BaseException) -> str:
    """What to do about weights that cannot be loaded. Libraries wrap the Hub's error in their own."""
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.errors import RepositoryNotFoundError as NotFound

    chain = [error]
    while following := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(following)

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if caused_by(GatedRepoError):
        return (
            f"model: '{source}' is gated, expected access to it: accept its terms on https://huggingface.co/{source}, log "
            "in with `hf auth login`, and run again, or name a folder that holds its files."
        )
    if caused_by(NotFound):
        return (
            f"model: '{source}' is neither a folder here nor a repository on the Hub that you may read, expected one of "
            "them; for a private one log in with `hf auth login`."
        )
    if not Path(source).exists() and caused_by(LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError):
        return (
            f"model: '{source}' is not in the cache and the Hub cannot be reached, expected a connection or a folder "
            "that holds its files."
        )
    reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
    return f"model: '{source}' cannot be loaded: {reason}."
