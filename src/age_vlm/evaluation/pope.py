"""POPE scores as three projects compute them.

POPE (Li et al., *Evaluating Object Hallucination in Large Vision-Language Models*, 2023) asks yes/no questions about
objects. The projects that report it parse answers and aggregate differently, so a metric means nothing without the name
of its scorer:

- `official` (LLaVA `eval_pope`): text before the first ".", commas dropped, split at spaces; `No`, `not` or `no` is no,
  anything else yes. Aggregate: mean of the splits.
- `vlmevalkit` (`YOrN_Extraction`): lower case, punctuation stripped; yes without no, or no without yes, otherwise
  unknown, which is a wrong answer. Aggregate: pooled.
- `lmms-eval`: lower case, stripped, then exactly `yes` or `no`, otherwise unknown ("Yes." is wrong). Aggregate: pooled.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError, one_of


SCORERS = ("official", "vlmevalkit", "lmms-eval")


@dataclass(frozen=True)
class PopeRecord:
    """One question with the answer a model gave.

    `mode` is the split (`random`, `popular`, `adversarial`); comma-separated names count once in each, `None` counts in
    the pooled metrics only.
    """

    question_id: str
    label: str
    answer: str
    mode: str | None = None


def _parse_official(answer: str) -> str:
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"}.intersection(words) else "yes"


_VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def _parse_vlmevalkit(answer: str) -> str:
    text = answer.lower()
    # The VQA rule: punctuation that touches a space, or stands in a text with a number such as 1,000, vanishes; any
    # other becomes a space. Only the first 32 periods go, because the project passes a regex flag where re.sub takes a
    # count.
    number = re.search(r"\d,\d", text) is not None
    table = {p: "" if number or f"{p} " in text or f" {p}" in text else " " for p in _VQA_PUNCTUATION}
    words = re.sub(r"\.(?!\d)", "", text.translate(str.maketrans(table)), count=32).split()
    if ("yes" in words) == ("no" in words):
        return "unknown"
    return "yes" if "yes" in words else "no"


def _parse_lmms_eval(answer: str) -> str:
    text = answer.lower().strip()
    return text if text in ("yes", "no") else "unknown"


_PARSERS = {"official": _parse_official, "vlmevalkit": _parse_vlmevalkit, "lmms-eval": _parse_lmms_eval}


def parse(answer: str, scorer: str = "official") -> str:
    """What `scorer` reads in a free-text answer: `"yes"`, `"no"` or `"unknown"` (never for `official`).

    Raises UserError for an unknown scorer.
    """
    return _PARSERS[_known(scorer)](answer)


def _known(scorer: str) -> str:
    if scorer not in _PARSERS:
        raise UserError(f"scorer: got {scorer!r}, expected {one_of(scorer, SCORERS)}.")
    return scorer


def join_answers(questions: Iterable[Any], answers: Mapping[str, str] | Iterable[tuple[str, str]]) -> list[PopeRecord]:
    """Join questions and answers by question id, never by position.

    Args:
        questions: objects with `id`, `answer` (the label) and `mode`, such as `age_vlm.data.questions.Question`.
        answers: model answers, as a mapping from question id to text or as (question id, text) pairs.

    Raises UserError when an id comes twice, or is in one of the two only.
    """
    questions = list(questions)
    pairs = list(answers.items() if isinstance(answers, Mapping) else answers)
    ids = [question.id for question in questions]
    _no_duplicates(ids, "questions")
    _no_duplicates([key for key, _ in pairs], "answers")
    given = dict(pairs)
    missing = [key for key in ids if key not in given]
    if missing:
        raise UserError(
            f"answers: got none for {len(missing)} of {len(ids)} (first: {missing[0]!r}), expected every question id."
        )
    known = set(ids)
    extra = [key for key in given if key not in known]
    if extra:
        raise UserError(f"answers: got {len(extra)} unknown (first: {extra[0]!r}), expected ids of the questions only.")
    return [PopeRecord(question.id, question.answer, given[question.id], question.mode) for question in questions]


def _no_duplicates(ids: list[str], where: str) -> None:
    twice = [key for key, times in Counter(ids).items() if times > 1]
    if twice:
        raise UserError(f"{where}: got {twice[0]!r} {ids.count(twice[0])} times, expected each question id once.")


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _metrics(pairs: list[tuple[str, str]], scorer: str) -> dict[str, float]:
    counts = Counter(pairs)
    n = len(pairs)
    tp, fp, missed = counts["yes", "yes"], counts["no", "yes"], counts["yes", "no"]
    predicted_yes, labelled_yes = tp + fp, sum(label == "yes" for label, _ in pairs)
    if scorer != "lmms-eval":
        missed = labelled_yes - tp
    precision, recall = _ratio(tp, predicted_yes), _ratio(tp, tp + missed)
    return {
        "count": n,
        "accuracy": _ratio(tp + counts["no", "no"], n),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": _ratio(labelled_yes if scorer == "lmms-eval" else predicted_yes, n),
        "predicted_yes_ratio": _ratio(predicted_yes, n),
        "unknown_ratio": _ratio(sum(said == "unknown" for _, said in pairs), n),
    }


def score(records: Iterable[PopeRecord], scorer: str = "official") -> dict[str, Any]:
    """POPE metrics of one model, computed as `scorer` does.

    Returns `{"scorer": name, "splits": {mode: metrics}, "aggregate": metrics}`. Metrics are fractions (VLMEvalKit
    prints them times 100): `accuracy`, `precision`, `recall`, `f1`, `yes_ratio`, beside `count`, `predicted_yes_ratio`
    and `unknown_ratio`. An undefined ratio is 0. The aggregate of `official` is the mean of the splits, as papers
    average the three F1 (without any split, the pooled metrics); that of the others is pooled over all questions.

    Two quirks of lmms-eval are kept: an unknown answer to a yes question lowers accuracy but not recall, and
    `yes_ratio` counts the labels. `predicted_yes_ratio` is the share of answers read as yes for every scorer.

    Raises UserError for an unknown scorer, no records, an id that comes twice, or a label other than yes and no.
    """
    _known(scorer)
    records = list(records)
    if not records:
        raise UserError("records: got none, expected at least one question.")
    _no_duplicates([record.question_id for record in records], "records")
    pooled: list[tuple[str, str]] = []
    splits: dict[str, list[tuple[str, str]]] = {}
    for record in records:
        label = record.label.strip().lower()
        if label not in ("yes", "no"):
            raise UserError(f"label of question {record.question_id!r}: got {record.label!r}, expected yes or no.")
        pair = (label, parse(record.answer, scorer))
        modes = record.mode.split(",") if record.mode else []
        pooled.extend([pair] * max(len(modes), 1))
        for mode in modes:
            splits.setdefault(mode, []).append(pair)
    metrics = {mode: _metrics(pairs, scorer) for mode, pairs in splits.items()}
    aggregate = _metrics(pooled, scorer)
    if scorer == "official" and metrics:
        mean = {key: sum(split[key] for split in metrics.values()) / len(metrics) for key in aggregate}
        aggregate = {**mean, "count": aggregate["count"]}
    return {"scorer": scorer, "splits": metrics, "aggregate": aggregate}
