"""Which samples of a batch share a row, so that little of it is padding."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heapreplace


def packed_rows(
    lengths: Sequence[int],
    most: int | None = None,
    image_tokens: Sequence[int] | None = None,
    slack: float = 0.1,
) -> list[list[int]]:
    """Puts samples together into rows of nearly the same length.

    All rows of a batch are padded to its longest, so what counts is not how full single rows are, but how even they are:
    samples go, the longest first, to the row that is the shortest so far (Graham 1969, longest processing time first).
    Attention is computed between all of a row's text and all of its text and images, masked or not: of the numbers of
    rows that leave nearly as little padding as the best, the one with the fewest such pairs is taken.

    Args:
        lengths: of the samples, in tokens.
        most: longest row of several samples; one that is longer by itself has a row of its own. Twice the longest sample when
            left out.
        image_tokens: of all images of each sample; the row with the most of them sets how many all rows are given.
        slack: how much larger than with the least padding the batch may be.

    Returns:
        For each row the numbers of its samples, in their order. The same lengths always give the same rows.
    """
    longest = max(lengths)
    most = 2 * longest if most is None else max(longest, most)
    image_tokens = [0] * len(lengths) if image_tokens is None else image_tokens
    found: list[tuple[int, int, list[list[int]]]] = []
    least = float("inf")
    count = -(-sum(lengths) // most)
    # No row is shorter than the longest sample: from some number of rows on, more of them only hold more padding.
    while count <= len(lengths) and count * longest <= (1 + slack) * least:
        rows, widest = _even_rows(lengths, count)
        if widest <= most:
            keys = widest + max(sum(image_tokens[sample] for sample in row) for row in rows)
            found.append((count * widest, count * widest * keys, rows))
            least = min(least, count * widest)
        count += 1
    near = [(pairs, rows) for size, pairs, rows in found if size <= (1 + slack) * least]
    return min(near, key=lambda each: each[0])[1]


def _even_rows(lengths: Sequence[int], count: int) -> tuple[list[list[int]], int]:
    rows: list[list[int]] = [[] for _ in range(count)]
    shortest = [(0, number) for number in range(count)]
    heapify(shortest)
    for sample in sorted(range(len(lengths)), key=lambda sample: -lengths[sample]):
        length, number = shortest[0]
        rows[number].append(sample)
        heapreplace(shortest, (length + lengths[sample], number))
    return [sorted(row) for row in rows], max(length for length, _ in shortest)
