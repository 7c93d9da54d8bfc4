"""Checkpoints without the pretrained components that training did not change: they name them, and loading fetches them."""

import copy
import os

import torch
from transformers.utils import logging

from .backbones_agevlm import BackboneFiles, fill_language_model, fill_vision_tower
from .components_agevlm import component_of
from .low_rank_agevlm import LowRankChange, expect_low_rank, merge_low_rank
from .origins_agevlm import ARGUMENTS, language_model_state, weights_hash
from .vision_agevlm import drop_unused_head


logger = logging.get_logger(__name__)

_NAMES = {"language_model": "language model", "vision": "vision encoder"}
_KEYS = {
    "language_model": r"^(?!.*(vision_tower|multi_modal_projector|cross_attention|low_rank)\.)",
    "vision": r"vision_tower\.",
}


def component_state(model, component: str, vocab_size: int | None = None) -> dict[str, torch.Tensor]:
    """The weights of a pretrained component of the model; of the vocabulary, those that the component had itself."""
    base = getattr(model, model.base_model_prefix, model)
    if component == "vision":
        return base.vision_tower.state_dict()
    head = None if model.config.tie_word_embeddings else getattr(model, "lm_head", None)
    return language_model_state(base.language_model, head, vocab_size)


def unchanged_components(model) -> list[str]:
    """The pretrained components whose weights are still those that the model was built from, or these and what LoRA has
    changed, see `keep_low_rank`."""
    found = []
    for component, entry in (model.config.components or {}).items():
        rows = entry.get("vocab_size")
        known = {entry["sha256"]}
        if component == "language_model" and (change := low_rank_change(model)) is not None:
            known = {change.sha256}
        if weights_hash(component_state(model, component, rows)) not in known:
            continue
        new = model.get_input_embeddings().weight[rows:] if rows else ()
        if len(new):  # the image token, which loading starts anew
            mean = model.get_input_embeddings().weight[:rows].float().mean(0).to(new.dtype)
            if not torch.equal(new, mean.expand_as(new)):
                continue
        found.append(component)
    return found


def low_rank_change(model) -> LowRankChange | None:
    """What LoRA has changed in the language model since it was pretrained, where that is known."""
    return getattr(getattr(model, model.base_model_prefix, model), "low_rank_change", None)


def keep_low_rank(model, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Remembers what was added to the weights of a language model that was as its checkpoint knows it: `unchanged_components`
    named it before.

    Args:
        factors: see `LowRankChange`, of adapters that have been merged.
    """
    earlier = low_rank_change(model)
    if earlier is not None:
        first = {name: [pair] for name, pair in earlier.factors.items()}
        for name, pair in factors.items():
            first.setdefault(name, []).append(pair)
        factors = {
            name: (torch.cat([a for a, _ in all_]), torch.cat([b for _, b in all_], 1)) for name, all_ in first.items()
        }
    rows = model.config.components["language_model"].get("vocab_size")
    sha256 = weights_hash(component_state(model, "language_model", rows))
    getattr(model, model.base_model_prefix, model).low_rank_change = LowRankChange(factors, sha256)


def low_rank_state(model, components: list[str]) -> dict[str, torch.Tensor]:
    """The factors to save beside a model without those components."""
    change = low_rank_change(model)
    if change is None or "language_model" not in components:
        return {}
    return change.state(f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else "")


def expect_left_out(model) -> None:
    """Prepares a model that is made for a checkpoint that leaves components out."""
    ranks = ((model.config.components or {}).get("language_model") or {}).get("low_rank")
    if ranks and hasattr(model, "language_model"):
        expect_low_rank(model, ranks)


def without_components(state: dict[str, torch.Tensor], components: list[str]) -> dict[str, torch.Tensor]:
    """The weights of a model, by name, that are of none of the components."""
    return {name: value for name, value in state.items() if component_of(name) not in components}


def left_out(config) -> list[str]:
    """The components whose weights a checkpoint with that configuration does not hold."""
    return [component for component, entry in (config.components or {}).items() if entry.get("left_out")]


def ignored_keys(config) -> set[str]:
    """Patterns of the weights that loading does not find in such a checkpoint."""
    return {_KEYS[component] for component in left_out(config)}


def mark_left_out(config, components: list[str], change: LowRankChange | None = None):
    """A copy of the configuration that says which components are left out, and what LoRA has changed in them."""
    marked = copy.deepcopy(config)
    marked.components = {
        component: {
            **{key: value for key, value in entry.items() if key not in ("left_out", "low_rank")},
            **({"left_out": True} if component in components else {}),
        }
        for component, entry in (config.components or {}).items()
    } or None
    if change is not None and "language_model" in components:
        marked.components["language_model"]["low_rank"] = change.entry()
    return marked


def check_parts(parts: dict[str, str | os.PathLike] | None) -> dict[str, str | os.PathLike]:
    """`parts` of `from_pretrained`.

    Raises:
        ValueError: one sentence, for a key that is not there.
    """
    for argument in parts or {}:
        if argument not in ARGUMENTS.values():
            raise ValueError(f"parts: got '{argument}', expected some of {', '.join(ARGUMENTS.values())}.")
    return parts or {}


def fetch_left_out(model, parts: dict[str, str | os.PathLike]) -> None:
    """Loads the components that the model's checkpoint does not hold, from `parts`, else from where the model was built.

    Raises:
        ValueError: one sentence, for a component that is not there, of other shapes, or for a model whose weights are
            quantised or kept elsewhere.
    """
    for component in left_out(model.config):
        entry, argument = model.config.components[component], ARGUMENTS[component]
        name, called = parts.get(argument) or entry.get("name"), _NAMES[component]
        if name is None:
            source = entry.get("source")
            raise ValueError(
                f"parts: the checkpoint does not hold its {called}, expected "
                f"parts={{'{argument}': FOLDER}}, the folder that it was built from"
                + (f" ({source})" if source else "")
                + "."
            )
        held = component_state(model, component)
        if any(
            value.is_meta or not value.is_floating_point() for key, value in held.items() if "num_batches" not in key
        ):
            raise ValueError(
                f"parts: the checkpoint does not hold its {called}, which cannot be fetched while weights "
                "are quantised or offloaded; expected a checkpoint saved with parts='all'."
            )
        own = argument in parts
        files = BackboneFiles(
            **{"text": None, "vision": None, argument: name},
            gguf_file=None if own else entry.get("gguf_file"),
            **({} if own else {f"{argument}_revision": entry.get("revision")}),
        )
        dtype = getattr(torch, entry["dtype"])
        if component == "language_model":
            language_model, missing = files.language_model(dtype)
            head = None if language_model.config.tie_word_embeddings else language_model.lm_head
            state = language_model_state(language_model.model, head)
            missing += fill_language_model(model, language_model)
        else:
            tower, _ = files.vision_encoder(dtype)
            drop_unused_head(tower)
            state = tower.state_dict()
            missing = fill_vision_tower(model, tower)
        if missing:
            raise ValueError(f"parts: '{name}' lacks {len(missing)} weights of the {called}, first '{missing[0]}'.")
        if weights_hash(state) != entry["sha256"]:
            logger.warning(
                f"parts: the weights of the {called} in '{name}' are not those that this checkpoint was "
                "trained with; its answers may differ."
            )
        if component == "language_model" and entry.get("low_rank"):
            keep_low_rank(model, merge_low_rank(getattr(model, model.base_model_prefix, model), entry["low_rank"]))
    model.config.components = mark_left_out(model.config, []).components
