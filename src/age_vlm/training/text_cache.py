"""What a frozen language model's layers below the images make of a text, kept: the questions of a data set repeat.

Without images, a token's state depends on the tokens that it sees alone. So texts are kept as a tree: a node is a token, its
parent the token before it that it sees, whatever row, batch or neighbours they come in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..data.byte_cache import MIB
from ..errors import UserError
from ..modeling_agevlm import AgeVlmModel


_NOTHING = -1


class TextStates:
    """States by node of the tree, up to `max_bytes`; then neither nodes nor states are added.

    Attributes:
        read, computed: numbers of rows of text so far.
    """

    def __init__(self, max_bytes: int = 256 * MIB) -> None:
        self.max_bytes = max_bytes
        self.read = self.computed = 0
        self._nodes: dict[tuple[int, int, int], int] = {}
        self._states: list[torch.Tensor | None] = []
        self._bytes = 0

    def nodes(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, parents: torch.Tensor
    ) -> list[list[int] | None]:
        """The node of each token, row by row; None for a row with a token that is new when nothing is added any more.

        Args:
            input_ids, position_ids, parents: (rows, length); parents are positions in the row, `_NOTHING` for none.
        """
        texts = zip(input_ids.tolist(), position_ids.tolist(), parents.tolist())
        return [self._nodes_of(*text) for text in texts]

    def _nodes_of(self, ids: list[int], positions: list[int], parents: list[int]) -> list[int] | None:
        found: list[int] = []
        for token, position, parent in zip(ids, positions, parents):
            key = (_NOTHING if parent == _NOTHING else found[parent], token, position)
            node = self._nodes.get(key)
            if node is None:
                if self._bytes >= self.max_bytes:
                    return None
                node = self._nodes[key] = len(self._states)
                self._states.append(None)
            found.append(node)
        return found

    def known(self, nodes: list[int] | None) -> bool:
        return nodes is not None and all(self._states[node] is not None for node in nodes)

    def keep(self, nodes: list[int] | None, states: torch.Tensor) -> None:
        for node, state in zip(nodes or (), states):
            if self._states[node] is None and self._bytes < self.max_bytes:
                self._states[node] = state.clone()
                self._bytes += state.nbytes

    def states(self, nodes: list[int]) -> torch.Tensor:
        return torch.stack([self._states[node] for node in nodes])


@contextmanager
def text_cache(model: AgeVlmModel, max_bytes: int = 256 * MIB) -> Iterator[TextStates]:
    """While it lasts, layers in front of the first cross-attention block are computed once for each text.

    Only for batches with `position_ids` and without a cache, as `AgeVlmCollator` makes of independent turns and trainers
    ask for; others are computed as always. Hidden states that are recorded are, of these layers, those of the last one.

    Args:
        model: the layers up to its first cross-attention block are frozen, and without dropout.

    Raises:
        UserError: one sentence, for layers that learn, for dropout, and where the first layer has a block.
    """
    text = model.language_model
    first = min(text.cross_attention_layers)
    below = text.layers[:first]
    if not first:
        raise UserError("model: got a cross-attention block at layer 0, expected layers of text alone in front of it.")
    if any(p.requires_grad for module in (text.embed_tokens, below) for p in module.parameters()):
        raise UserError(f"model: got layers below {first} or embeddings that are trained, expected frozen ones.")
    if text.config.attention_dropout:
        raise UserError(f"model: got an attention_dropout of {text.config.attention_dropout}, expected 0.")
    kept, batch = TextStates(max_bytes), {}
    compute = [layer.forward for layer in below]

    def remember(module, args, kwargs) -> None:
        batch.clear()
        # With a cache, what a token sees is not all in the batch.
        whole = kwargs.get("use_cache") is False and kwargs.get("cache") is None
        if whole and kwargs.get("input_ids") is not None and kwargs.get("position_ids") is not None:
            parents = _parents(kwargs["position_ids"], kwargs.get("attention_mask"))
            if parents is not None:
                batch["nodes"] = kept.nodes(kwargs["input_ids"], kwargs["position_ids"], parents)

    def bottom(hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        rows = batch.get("nodes")
        missing = [row for row, nodes in enumerate(rows or ()) if not kept.known(nodes)]
        if rows is None:
            missing = list(range(len(hidden_states)))
        computed = {}
        if missing:
            states = hidden_states[missing]
            some = {name: _rows_of(value, missing, len(hidden_states)) for name, value in kwargs.items()}
            with torch.no_grad():
                for layer in compute:
                    states = layer(states, *args, **some)
            computed = dict(zip(missing, states))
        for row, states in computed.items():
            if rows is not None:
                kept.keep(rows[row], states)
        kept.read, kept.computed = kept.read + len(hidden_states) - len(missing), kept.computed + len(missing)
        found = [computed[row] if row in computed else kept.states(rows[row]) for row in range(len(hidden_states))]
        return torch.stack(found).to(hidden_states.device)

    hook = model.register_forward_pre_hook(remember, with_kwargs=True)
    # On the instances: neither names of modules nor of weights change.
    for layer in below:
        layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    below[0].forward = bottom
    try:
        yield kept
    finally:
        hook.remove()
        for layer in below:
            del layer.forward


def _parents(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """(rows, length): the last token before each that it sees, by a 4-D boolean mask, or by positions that go on."""
    places = torch.arange(position_ids.shape[1], device=position_ids.device)
    if attention_mask is None:
        follows = torch.zeros_like(position_ids, dtype=torch.bool)
        follows[:, 1:] = position_ids.diff(dim=-1) == 1
        return torch.where(follows, places - 1, _NOTHING)
    if attention_mask.ndim != 4 or attention_mask.dtype != torch.bool:
        return None
    before = attention_mask[:, 0] & (places[None, :] < places[:, None])
    return torch.where(before, places, _NOTHING).amax(-1)


def _rows_of(value, rows: list[int], batch: int):
    """The same rows of what a layer is given beside its input: tensors, and pairs of them, with a row a text."""
    if isinstance(value, tuple):
        return tuple(_rows_of(each, rows, batch) for each in value)
    return value[rows] if isinstance(value, torch.Tensor) and value.ndim and len(value) == batch else value
