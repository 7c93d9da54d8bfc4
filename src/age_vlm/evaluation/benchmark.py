"""The metrics of a model on evaluation images, as one table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..configuration import AlignmentConfig
from ..data.questions import POPE_MODES, EvaluationItem
from .answers import generate_answers
from .grounding import phrase_attention
from .metrics import accuracy_by_kind, auc, class_auc, macro_auc
from .pope import join_answers, score


def split_items(items: Sequence[EvaluationItem], wanted) -> list[EvaluationItem]:
    """The images that have questions for which `wanted(question)` holds, with those questions only."""
    parts = (replace(item, questions=tuple(filter(wanted, item.questions))) for item in items)
    return [item for item in parts if item.questions]


def answer_metrics(model, processor, items: Sequence[EvaluationItem], *, scorer: str = "official") -> tuple[dict, dict]:
    """Metrics of the generated answers, and the answers by question id.

    Returns:
        `pope/<mode>/{accuracy, f1, yes_ratio}` with POPE's own scorer, and `{count, colour, relation}/accuracy`, exact
        match.
    """
    asked = split_items(items, lambda question: question.kind != "existence" or question.mode is not None)
    answers = generate_answers(model, processor, asked)
    questions = [question for item in asked for question in item.questions]
    metrics = {}
    existence = [question for question in questions if question.kind == "existence"]
    if existence:
        scores = score(join_answers(existence, {q.id: answers[q.id] for q in existence}), scorer=scorer)
        for mode in POPE_MODES:
            if mode in scores["splits"]:
                for name in ("accuracy", "f1", "yes_ratio"):
                    metrics[f"pope/{mode}/{name}"] = scores["splits"][mode][name]
    others = [question for question in questions if question.kind != "existence"]
    by_kind = accuracy_by_kind(others, answers) if others else {}
    return metrics | {f"{kind}/accuracy": value for kind, value in by_kind.items()}, answers


def presence_metrics(scores: Mapping[str, float], items: Sequence[EvaluationItem]) -> dict[str, Any]:
    """How well presence is told from absence by the existence questions that have no POPE mode.

    Args:
        scores: question id -> logit(yes) - logit(no), or what else says how sure a yes is.

    Returns:
        `macro_auc`, the mean over the things asked about, NaN where none is both present and absent; `pooled_auc`;
        `class_auc`, `present` and `absent`: AUC and numbers of questions by thing.
    """
    asked = split_items(items, lambda question: question.kind == "existence" and question.mode is None)
    questions = [question for item in asked for question in item.questions]
    values, labels = [scores[q.id] for q in questions], [q.answer == "yes" for q in questions]
    names = [question.subject for question in questions]
    return {
        "macro_auc": macro_auc(values, labels, names),
        "pooled_auc": auc(values, labels),
        "class_auc": class_auc(values, labels, names),
        "present": Counter(name for name, there in zip(names, labels) if there),
        "absent": Counter(name for name, there in zip(names, labels) if not there),
    }


def grounding_metrics(
    model, processor, items: Sequence[EvaluationItem], alignment: AlignmentConfig | None = None
) -> dict[str, float]:
    """`attention_mass` inside the mask and `pointing_accuracy`, of the blocks and heads that were aligned in training or,
    where it is given, that `alignment` is about."""
    alignment = alignment or model.alignment
    phrases = phrase_attention(model, processor, items)
    _, blocks, heads, _ = phrases.attention.shape
    mass, hits = phrases.scores(alignment.layer_indices(blocks), alignment.head_indices(heads))
    return {"attention_mass": float(mass.mean()), "pointing_accuracy": float(hits.mean())}
