# SPDX-License-Identifier: Apache-2.0
"""The exceptions tensorpager raises. Each message says what failed, where, the likely reason and what to do about it.

Every class derives from `TensorPagerError`, and from a built-in exception where code that knows nothing of tensorpager
would look for one (`OSError`, `ValueError`). The native core raises these classes too: it finds them here by name, so a
class may be added but not renamed without changing csrc/bind.

Arguments out of range raise plain `ValueError` or `TypeError`, as everywhere in Python.
"""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ClosedError",
    "CorruptPageError",
    "EngineError",
    "ForkedProcessError",
    "IoError",
    "MemoryMapError",
    "PagedTensorError",
    "RanksError",
    "TensorPagerError",
    "TraceError",
]


class TensorPagerError(Exception):
    """Base of every error tensorpager raises."""


class IoError(TensorPagerError, OSError):
    """A transfer, or another call on a file, failed. The message names the file, the page and the offset.

    `errno` holds the kernel's error number, or None when the kernel reported success and the file itself was wrong:
    it ended early, or it changed while it was open. The tensor's memory is then not readable: no stale bytes, no hang.
    """

    def __init__(self, error_number: int, message: str) -> None:
        super().__init__(message)  # not both, or str() would begin with "[Errno 5]": the message has it in words
        if error_number:
            self.errno = error_number

    def __reduce__(self) -> tuple[type[IoError], tuple[int, str]]:
        """Copies keep `errno`, which `OSError` itself would drop for an exception made from one argument."""
        return type(self), (self.errno or 0, self.args[0])


class CorruptPageError(IoError):
    """A page came back from disk with other bytes than were written: its checksum, which stays in RAM, differs.

    A failing drive, or another process that wrote to the file. The page is not made readable.
    """


class BudgetError(TensorPagerError):
    """What has to be resident at once does not fit into the budget.

    The message names the step that needs most and the budget that would do. Raise `budget`, or split the step: shorter
    prompts and smaller batches do not help, since weights are what is counted.
    """


class MemoryMapError(TensorPagerError):
    """The kernel refused memory or a mapping; frames for the whole budget are taken at the start, so it shows early.

    Usual reasons: less free memory than the budget, `ulimit -v`, or `vm.max_map_count` (use larger pages).
    """


class EngineError(TensorPagerError):
    """An I/O engine was asked for by name that can't run here. `tensorpager doctor` prints the reason for each engine.

    With `engine="auto"`, the default, another engine is taken and the reason is on record in `Pager.stats()`.
    """


class DeviceError(TensorPagerError):
    """A call of the device's driver failed; the message names the call, the driver's error and its number.

    After an error that loses the context (an illegal address, say, which may be any earlier kernel's) every later call
    fails alike, and a new process is needed. What has a copy in host memory can still be read.
    """


class ClosedError(TensorPagerError):
    """A pager, or a tensor that it pages, was used after `Pager.close()`."""


class ForkedProcessError(TensorPagerError):
    """A pager was used in a child of `fork()`: the child shares neither its frames nor its I/O threads.

    Start workers with the "spawn" or "forkserver" method, or make the pager inside the child. The parent is unharmed.
    """


class CheckpointError(TensorPagerError, ValueError):
    """A checkpoint breaks a rule. `path` names the file, `rule` the rule (a value of `header.Rule`)."""

    def __init__(self, message: str, *, path: str, rule: str) -> None:
        super().__init__(message)
        self.path = path
        self.rule = rule

    def __reduce__(self) -> tuple[object, tuple[str, str, str]]:
        """Lets the error cross to another process, where exceptions are rebuilt from their arguments."""
        return _rebuild_checkpoint_error, (self.args[0], self.path, self.rule)


def _rebuild_checkpoint_error(message: str, path: str, rule: str) -> CheckpointError:
    return CheckpointError(message, path=path, rule=rule)


class PagedTensorError(TensorPagerError):
    """An operation that can't work on a paged parameter was refused: moving it (`model.to`), or replacing its memory.

    A paged parameter has one address for life. Convert or move the model before paging it, or copy the parameter with
    `.detach().clone()`, which gives an ordinary tensor.
    """


class RanksError(TensorPagerError, RuntimeError):
    """Another rank of the process group failed, is gone, or is not of this run; or this group is not the run's.

    What all ranks have to do together (page() and resume() with a store, commit()) was then done by none of them,
    unless the message says that it is undecided: resume() decides it, with all ranks.
    """


class TraceError(TensorPagerError):
    """The steps of the model could not be recorded on fake tensors, so there is no schedule to compute.

    The model still runs, paged on demand. The message names the module and the operation in the way, most often one
    whose result decides what is executed next (`.item()`, a loop over a tensor's values).
    """
