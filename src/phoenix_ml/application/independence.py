"""Whether the rows of a batch get the answers that each would get alone."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.random import Generator

from phoenix_ml.application.ports import Engine
from phoenix_ml.domain.errors import FeatureInvalid, InferenceFailed
from phoenix_ml.domain.rows import ElementType, Outputs, RowFormat, Rows, Scalar

_ROWS: Final = 16
_TRIED_ROWS: Final = 64
_BATCHES: Final = (2, 7, 16)
# A slow model is judged by the rows that it answers in this time, at least two.
_ALONE_S: Final = 1.0
# A batch of another size may add up the same numbers in another order.
_RELATIVE: Final = 1e-5
_OF_GREATEST: Final = 1e-6
_FLOATS: Final = (ElementType.FLOAT32, ElementType.FLOAT64)


def are_rows_independent(engine: Engine, row_format: RowFormat, samples: Sequence[Sequence[Scalar]]) -> bool:
    """Whether varied rows get the same answers alone and in batches of several sizes.

    The rows are the samples and variations of them, the same at each call; those that the engine refuses
    are left out. Also False where fewer than two rows that differ are left. Raises InferenceFailed when the
    engine refuses a batch though it answers each of its rows.
    """
    values: list[Sequence[Scalar]] = []
    packed: list[bytes] = []
    alone: list[Outputs] = []
    started = time.perf_counter()
    for row, data in _varied(row_format, samples):
        try:
            alone.append(engine.run(Rows([row], [data])))
        except InferenceFailed:
            continue
        values.append(row)
        packed.append(data)
        if len(alone) == _ROWS or (len(alone) > 1 and time.perf_counter() - started > _ALONE_S):
            break
    if len(alone) < 2:
        return False
    tolerance = _OF_GREATEST * max(map(_magnitude, alone))
    for size in _BATCHES:
        for start in range(0, len(alone), size):
            part = slice(start, start + size)
            together = engine.run(Rows(values[part], packed[part]))
            if not _agree(alone[part], together, tolerance):
                return False
    return True


def _varied(
    row_format: RowFormat, samples: Sequence[Sequence[Scalar]]
) -> Iterator[tuple[Sequence[Scalar], bytes]]:
    """Rows that differ, with their packed form: the samples, then what is like them."""
    random = np.random.default_rng(16)
    elements = [column.element for column in row_format.columns]
    known = set()
    for number in range(len(samples) + _TRIED_ROWS):
        row = samples[number % len(samples)]
        if number >= len(samples):
            others = samples[int(random.integers(len(samples)))]
            row = [
                _vary(element, value, other, random)
                for element, value, other in zip(elements, row, others, strict=True)
            ]
        try:
            data = row_format.pack(row)
        except FeatureInvalid:  # a variation beyond what the column holds
            continue
        if data not in known:
            known.add(data)
            yield row, data


def _vary(element: ElementType, value: Scalar, other: Scalar, random: Generator) -> Scalar:
    """A value like the one given: a number near it, else one that another sample has."""
    if element in _FLOATS:
        value = float(value)
        near = value if np.isfinite(value) else 0.0
        return near + float(random.normal()) * (abs(near) or 1.0)
    if element is ElementType.BOOL:
        return bool(random.integers(2))
    if element is ElementType.STRING:
        return other
    return int(value) + int(random.integers(-2, 3))


def _magnitude(outputs: Outputs) -> float:
    numbers = np.asarray(outputs.results[0])
    if numbers.dtype.kind != "f" or not np.isfinite(numbers).any():
        return 0.0
    return float(np.abs(numbers[np.isfinite(numbers)]).max())


def _agree(alone: Sequence[Outputs], together: Outputs, tolerance: float) -> bool:
    if len(together.results) != len(alone):
        return False
    return all(
        _is_close(one.results[0], result, tolerance)
        for one, result in zip(alone, together.results, strict=True)
    ) and all(
        _is_close(one.probabilities, [probabilities], _OF_GREATEST)
        for one, probabilities in zip(alone, together.probabilities or (), strict=False)
    )


def _is_close(one: Any, other: Any, tolerance: float) -> bool:
    a, b = np.asarray(one), np.asarray(other)
    if a.dtype.kind != "f":
        return bool(one == other)
    return a.shape == b.shape and np.allclose(a, b, rtol=_RELATIVE, atol=tolerance, equal_nan=True)
