"""Metrics that say where a model looked and how well it answered."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from ..errors import UserError


def _same_grid(attention: Tensor, coverage: Tensor) -> None:
    if attention.ndim != 2 or attention.shape != coverage.shape:
        raise UserError(
            f"attention and coverage must both be (n, cells), got {tuple(attention.shape)} and {tuple(coverage.shape)}."
        )


def attention_mass(attention: Tensor, coverage: Tensor) -> Tensor:
    """Share of the attention that falls inside the mask.

    Args:
        attention: (n, h*w) probabilities over the token grid; each row sums to 1.
        coverage: (n, h*w) fraction of each cell that the mask covers, in [0, 1].

    Returns:
        (n,) float in [0, 1].
    """
    _same_grid(attention, coverage)
    return (attention.float() * coverage.float()).sum(-1)


def pointing_hit(attention: Tensor, coverage: Tensor) -> Tensor:
    """Whether the most attended cell touches the mask: the pointing game of Zhang et al. (2016).

    A cell counts as soon as any of its area is covered, because an object smaller than a cell covers none of them by
    half.

    Args:
        attention: (n, h*w) probabilities or scores over the token grid.
        coverage: (n, h*w) fraction of each cell that the mask covers.

    Returns:
        (n,) bool.
    """
    _same_grid(attention, coverage)
    return coverage.gather(1, attention.argmax(-1, keepdim=True)).squeeze(1) > 0


def auc(scores: Tensor | Sequence[float], labels: Tensor | Sequence[bool]) -> float:
    """Area under the ROC curve; ties count half; NaN when only one label occurs.

    Args:
        scores: (n,) any real numbers, for instance logit(yes) - logit(no).
        labels: (n,) true where the answer is yes.
    """
    scores, labels = torch.as_tensor(scores, dtype=torch.float64), torch.as_tensor(labels).bool()
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise UserError(f"scores and labels must both be (n,), got {tuple(scores.shape)} and {tuple(labels.shape)}.")
    if not torch.isfinite(scores).all():
        raise UserError(f"scores: got {int((~torch.isfinite(scores)).sum())} that are not finite, expected numbers.")
    if len(labels) == 0 or labels.all() or not labels.any():
        return float("nan")
    # torchmetrics passes scores outside [0, 1] through a sigmoid, which makes ties of large logits: ranks keep the
    # order.
    ranks = scores.unique(return_inverse=True)[1].double()
    return float(binary_auroc(ranks / ranks.max().clamp(min=1), labels.long()))


def class_auc(
    scores: Tensor | Sequence[float], labels: Tensor | Sequence[bool], classes: Sequence[Hashable]
) -> dict[Hashable, float]:
    """AUC of every class that occurs with both labels, in order of first appearance.

    Args:
        scores: (n,) real numbers.
        labels: (n,) true where the class is present.
        classes: n names, one per question.
    """
    scores, labels = torch.as_tensor(scores, dtype=torch.float64), torch.as_tensor(labels).bool()
    if not len(scores) == len(labels) == len(classes):
        raise UserError(
            f"scores, labels and classes: got {len(scores)}, {len(labels)} and {len(classes)}, expected one entry per "
            "question."
        )
    rows: dict[Hashable, list[int]] = {}
    for row, name in enumerate(classes):
        rows.setdefault(name, []).append(row)
    values = {name: auc(scores[index], labels[index]) for name, index in rows.items()}
    return {name: value for name, value in values.items() if value == value}


def macro_auc(scores: Tensor | Sequence[float], labels: Tensor | Sequence[bool], classes: Sequence[Hashable]) -> float:
    """Mean of `class_auc` over the classes that occur with both labels; NaN when there is none.

    A score that depends on the class alone, such as a text-only prior, gets exactly 0.5 here: compare such a prior by
    `auc` over all questions or by accuracy.
    """
    values = list(class_auc(scores, labels, classes).values())
    return sum(values) / len(values) if values else float("nan")


def exact_match(answer: str, expected: str) -> bool:
    """Equal after stripping spaces, one final period and case."""
    return _normal(answer) == _normal(expected)


def _normal(text: str) -> str:
    return text.strip().removesuffix(".").strip().lower()


def accuracy_by_kind(questions: Iterable[Any], answers: Mapping[str, str]) -> dict[str, float]:
    """Exact-match accuracy for each `kind` of question (existence, count, colour, relation).

    Args:
        questions: objects with `id`, `answer` and `kind`, such as `age_vlm.data.questions.Question`.
        answers: model answers by question id.

    Raises UserError when a question has no answer.
    """
    hits: dict[str, list[bool]] = {}
    for question in questions:
        if question.id not in answers:
            raise UserError(f"answers: got none for {question.id!r}, expected every question id.")
        hits.setdefault(question.kind, []).append(exact_match(answers[question.id], question.answer))
    return {kind: sum(values) / len(values) for kind, values in hits.items()}
