# SPDX-License-Identifier: Apache-2.0
"""The exceptions tensorpager raises. Every message says what failed, where, likely why, and what to do.

Wrong arguments raise the built-in ``ValueError`` and ``TypeError``. The native core raises these classes by name.
"""

from __future__ import annotations


class TensorPagerError(Exception):
    """Base of every error that tensorpager defines."""


class BudgetError(TensorPagerError):
    """What must be resident at the same time does not fit the budget; the message says which step and how much it needs."""


class MemoryMapError(TensorPagerError, MemoryError):
    """The kernel refused memory, a mapping or its protection."""


class EngineError(TensorPagerError):
    """The I/O engine that was asked for can't run here; the message says what stops it."""


class ClosedError(TensorPagerError):
    """The pager was closed; its model's weights are no longer in memory."""


class ForkedProcessError(TensorPagerError):
    """A pager was used in a child of ``fork()``, which has neither its memory nor its I/O thread."""


class IoError(TensorPagerError, OSError):
    """A file could not be opened, read or written. ``errno`` is the system's error number, 0 when there is none."""


class CorruptPageError(IoError):
    """A page came back from the spill with other bytes than it left with."""


class CheckpointError(TensorPagerError, ValueError):
    """A checkpoint breaks a rule of its format.

    Attributes:
        path: the file.
        rule: the rule's name (a value of ``tensorpager.header.Rule``).
    """

    def __init__(self, message: str, *, path: str, rule: str) -> None:
        super().__init__(message)
        self.path = path
        self.rule = rule


class PagedTensorError(TensorPagerError):
    """An operation that would take a paged tensor out of its address space (``model.half()``, ``p.data = other``)."""


class TraceError(TensorPagerError):
    """A model could not be run on fake tensors; paging then learns its steps from the first real pass."""
