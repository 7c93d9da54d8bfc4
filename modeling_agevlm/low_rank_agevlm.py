"""What LoRA has changed in a pretrained language model, as its factors: a checkpoint that leaves the language model out keeps
these, and loading adds them to the weights that it fetches."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class LowRankChange:
    """
    Attributes:
        factors: name of a weight (out, in) in the language model -> (rank, in) and (out, rank), whose product was added.
        sha256: hash of the language model's weights with all of it added.
    """

    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    sha256: str

    def entry(self) -> dict:
        """What a configuration keeps of it: the rank by weight, from which loading knows what to read."""
        return {name: len(first) for name, (first, _) in self.factors.items()}

    def state(self, prefix: str) -> dict[str, torch.Tensor]:
        """The factors by their names in a checkpoint, where `prefix` is that of the model in it."""
        pairs = {f"{_key(name)}_{letter}": f for name, pair in self.factors.items() for letter, f in zip("AB", pair)}
        return {f"{prefix}low_rank.{key}": factor.contiguous() for key, factor in pairs.items()}


def _key(name: str) -> str:
    return name.replace(".", "-")


def expect_low_rank(base: nn.Module, ranks: dict[str, int]) -> None:
    """Makes room in a model for the factors that its checkpoint holds, until `merge_low_rank`.

    Args:
        base: the model without its head.
        ranks: of each weight, `LowRankChange.entry`.

    Raises:
        ValueError: one sentence, for a weight that the language model has not.
    """
    weights = dict(base.language_model.named_parameters())
    base.low_rank = nn.ParameterDict()
    for name, rank in ranks.items():
        if name not in weights or weights[name].ndim != 2:
            raise ValueError(
                f"components.language_model.low_rank: got '{name}', expected a matrix of the language model."
            )
        rows, columns = weights[name].shape
        base.low_rank[f"{_key(name)}_A"] = nn.Parameter(weights[name].new_zeros(rank, columns), requires_grad=False)
        base.low_rank[f"{_key(name)}_B"] = nn.Parameter(weights[name].new_zeros(rows, rank), requires_grad=False)


@torch.no_grad()
def merge_low_rank(base: nn.Module, ranks: dict[str, int]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Adds the factors that were loaded to the language model's weights, and returns them."""
    held, weights = base.low_rank, dict(base.language_model.named_parameters())
    factors = {name: (held[f"{_key(name)}_A"].data, held[f"{_key(name)}_B"].data) for name in ranks}
    del base.low_rank
    for name, (first, second) in factors.items():
        weights[name] += (second @ first).to(weights[name].dtype)
    return factors
