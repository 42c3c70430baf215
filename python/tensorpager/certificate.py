# SPDX-License-Identifier: Apache-2.0
"""How good a schedule is, and by what proof: what it moves, what any schedule has to move, and what that takes.

[Note: break-even tokens]
Per pass, compute takes C0 + c * T seconds for T tokens (C0: the optimizer), and the drive S + a * T (S: weights,
gradients and optimizer state; a * T: activations that are paged). Transfers hide behind compute from T* = (S - C0) /
(c - a) tokens on, and never where a >= c. For full fine-tuning with everything on the drive, S is B bytes per parameter
over the bandwidth BW, and c is 8 flops per parameter (2 forward, 4 backward, 2 recomputed) over the rate F: T* = B * F
/ (8 * BW). For inference c is 2 flops and S the part of the weights that is not resident: T* = B * F / (2 * BW).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SECONDS_PER_DAY", "Certificate"]

SECONDS_PER_DAY = 86_400.0
TERA = 1e12


@dataclass(frozen=True)
class Certificate:
    """One pass in steady state. Bytes are whole pages.

    device_in_bytes, device_out_bytes: into the device's frames and out of them, both tiers together. drive_*: read from
    and written to drives. *_bound_bytes: no schedule with these budgets moves less, None when no solver was there (see
    `proof`). pass_seconds: predicted. compute_seconds: of all steps. time_bound_seconds: no schedule takes less on this
    hardware. lru_drive_bytes: LRU's, with the same knowledge of dead content; of two tiers as if they were one memory,
    which is a little more than two can hold. tokens: per pass, 0 when unknown.
    break_even_tokens: see the note; None when it means nothing, infinity when transfers never hide.
    """

    device_in_bytes: int
    device_out_bytes: int
    drive_read_bytes: int
    drive_written_bytes: int
    device_bound_bytes: float | None
    drive_bound_bytes: float | None
    lru_drive_bytes: int
    pass_seconds: float
    compute_seconds: float
    drive_seconds: float
    time_bound_seconds: float
    stall_seconds: float
    tokens: int
    break_even_tokens: float | None
    drive_endurance_bytes: float
    proof: str

    @property
    def drive_bytes(self) -> int:
        """Read and written."""
        return self.drive_read_bytes + self.drive_written_bytes

    @property
    def bytes_gap(self) -> float | None:
        """Drive bytes over their bound, 1.0 at best; None without a bound."""
        if self.drive_bound_bytes is None:
            return None
        return self.drive_bytes / self.drive_bound_bytes if self.drive_bound_bytes else 1.0

    @property
    def time_gap(self) -> float:
        """Predicted time over its bound, 1.0 at best."""
        return self.pass_seconds / self.time_bound_seconds if self.time_bound_seconds else 1.0

    @property
    def terabytes_written_per_1000_passes(self) -> float:
        """To drives."""
        return 1000 * self.drive_written_bytes / TERA

    @property
    def passes_of_endurance(self) -> float | None:
        """Passes until the drives have taken their rated writes; None when that is unknown or nothing is written."""
        if not self.drive_endurance_bytes or not self.drive_written_bytes:
            return None
        return self.drive_endurance_bytes / self.drive_written_bytes

    @property
    def terabytes_written_per_day(self) -> float:
        """When passes follow one another all day."""
        return self.drive_written_bytes / self.pass_seconds * SECONDS_PER_DAY / TERA if self.pass_seconds else 0.0
