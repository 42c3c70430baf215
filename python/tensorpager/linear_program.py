# SPDX-License-Identifier: Apache-2.0
"""A sparse linear program, put together block by block and solved by HiGHS (through scipy, `tensorpager[plan]`)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["LinearProgram", "has_solver"]

Float64Array: TypeAlias = npt.NDArray[np.float64]
Columns: TypeAlias = npt.NDArray[np.int64]


def has_solver() -> bool:
    """Whether scipy, which brings HiGHS, is installed."""
    return find_spec("scipy") is not None


class LinearProgram:
    """Minimise cost * x with 0 <= x <= upper, rows of equalities and of "at most"."""

    def __init__(self) -> None:
        self._cost: list[Float64Array] = []
        self._lower: list[Float64Array] = []
        self._upper: list[Float64Array] = []
        self._count = 0
        self._equal = _Rows()
        self._at_most = _Rows()

    def columns(
        self, count: int, *, cost: npt.ArrayLike = 0.0, lower: npt.ArrayLike = 0.0, upper: npt.ArrayLike = np.inf
    ) -> Columns:
        """New variables; their numbers, for terms."""
        for parts, values in ((self._cost, cost), (self._lower, lower), (self._upper, upper)):
            parts.append(np.broadcast_to(np.asarray(values, np.float64), (count,)))
        self._count += count
        return np.arange(self._count - count, self._count)

    def equal(self, right: npt.ArrayLike, *terms: tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike]) -> None:
        """New rows: sum of the terms == right, a vector. A term is (rows, columns, values), each broadcast alike."""
        self._equal.add(np.asarray(right, np.float64), terms)

    def at_most(self, right: npt.ArrayLike, *terms: tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike]) -> None:
        """New rows: sum of the terms <= right."""
        self._at_most.add(np.asarray(right, np.float64), terms)

    def solve(self) -> tuple[float, Float64Array]:
        """(least cost, x). ImportError without scipy; RuntimeError when HiGHS finds no optimum."""
        from scipy.optimize import linprog

        found = linprog(
            np.concatenate(self._cost),
            A_ub=self._at_most.matrix(self._count),
            b_ub=self._at_most.right(),
            A_eq=self._equal.matrix(self._count),
            b_eq=self._equal.right(),
            bounds=np.column_stack([np.concatenate(self._lower), np.concatenate(self._upper)]),
            method="highs",
        )
        if found.status != 0:
            msg = f"HiGHS found no optimum of a program of {self._count} variables: {found.message}"
            raise RuntimeError(msg)
        return float(found.fun), found.x


class _Rows:
    def __init__(self) -> None:
        self._right: list[Float64Array] = []
        self._terms: list[tuple[npt.NDArray[np.int64], Columns, Float64Array]] = []
        self._count = 0

    def add(self, right: Float64Array, terms: tuple[tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike], ...]) -> None:
        for rows, columns, values in terms:
            parts = np.broadcast_arrays(np.asarray(rows), np.asarray(columns), np.asarray(values, np.float64))
            self._terms.append((parts[0] + self._count, parts[1], parts[2]))
        self._right.append(right)
        self._count += len(right)

    def matrix(self, column_count: int) -> object:
        from scipy.sparse import coo_array

        if not self._count:
            return None
        rows, columns, values = (np.concatenate([np.ravel(term[part]) for term in self._terms]) for part in range(3))
        return coo_array((values, (rows, columns)), (self._count, column_count)).tocsr()

    def right(self) -> Float64Array | None:
        return np.concatenate(self._right) if self._count else None
