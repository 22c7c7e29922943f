"""An alarm over many checks whose false alarms are bounded however often it is looked at.

Testing each window at 5 % raises a false alarm in three of four streams of fifty checks. The
Shiryaev-Roberts e-detector sums up the evidence instead: `M = e (M + 1)` with an e-value for each check, and
the alarm at `M >= arl`.

The guarantee: as long as nothing changes, at least `arl` checks pass on average before the first alarm. It
holds if each check's p-value, given the checks before it, is at most x with a chance of at most x. Checks
against one frozen reference share its rows, which makes this nearly but not quite true; a compared part of
ten windows' size keeps it close.

Sources: e-detectors: Shin, Ramdas and Rinaldo (arXiv:2203.03532), after Shiryaev and Roberts; calibrators
from p to e: Vovk and Wang (2021), here the mean of `k p^(k-1)` at k = 1/4 and k = 1/2.
"""

from __future__ import annotations

import math

from pydantic import Field

from regraft.records import Record

#: Hourly checks and one false alarm in a quarter of a year come to 2,200.
DEFAULT_ARL = 1000.0
#: Evidence beyond this tells nothing more, and must stay a finite number.
_MOST = 1e12
_LAST = 20


class Step(Record):
    """One check that was counted."""

    check_id: str
    p_value: float


class SequentialState(Record):
    """What the checks since the reference was frozen add up to. Each step gives a new record.

    Attributes:
        reference_id: The reference that the checks compare with.
        started: When it began, UTC in ISO 8601; "" if nobody said.
        arl: Average run length: checks to the first false alarm, on average at least this many.
        value: The evidence M.
        checks: How many checks it is made of.
        seen: Ids of all checks that were counted against this reference.
        last: The latest of them with their p-values, at most 20.
        alarmed_by: The check that raised the alarm, which stays until the reset.
    """

    reference_id: str = Field(min_length=1)
    started: str = ""
    arl: float = Field(DEFAULT_ARL, gt=1, allow_inf_nan=False)
    value: float = Field(0.0, ge=0, allow_inf_nan=False)
    checks: int = Field(0, ge=0)
    seen: tuple[str, ...] = ()
    last: tuple[Step, ...] = ()
    alarmed_by: str | None = None

    @property
    def alarm(self) -> bool:
        """Whether the evidence has reached `arl` since the last reset."""
        return self.alarmed_by is not None

    def step(self, p_value: float, check_id: str) -> SequentialState:
        """Count one check. The same check again changes nothing, whatever p-value comes with it.

        Args:
            p_value: Of an exact test, in (0, 1].
            check_id: Names the check, such as the id of its report.

        Raises:
            ValueError: If the p-value is not in (0, 1].
        """
        e = e_value(p_value)
        if check_id in self.seen:
            return self
        value = min(e * (self.value + 1.0), _MOST)
        raised = self.alarmed_by is None and value >= self.arl
        return self.model_copy(
            update={
                "value": value,
                "checks": self.checks + 1,
                "seen": (*self.seen, check_id),
                "last": (*self.last, Step(check_id=check_id, p_value=p_value))[-_LAST:],
                "alarmed_by": check_id if raised else self.alarmed_by,
            }
        )

    def reset(self, reference_id: str, started: str = "") -> SequentialState:
        """Begin again without evidence, as after a promotion or when an alarm was dealt with.

        Args:
            reference_id: The new reference. With the same one, checks counted before are not counted again.
            started: The present, UTC in ISO 8601.
        """
        return SequentialState(
            reference_id=reference_id,
            started=started,
            arl=self.arl,
            seen=self.seen if reference_id == self.reference_id else (),
        )


def e_value(p_value: float) -> float:
    """Turn a p-value into an e-value: on average at most 1 if nothing changed.

    Raises:
        ValueError: If the p-value is not in (0, 1].
    """
    if math.isnan(p_value) or not 0 < p_value <= 1:
        raise ValueError(
            f"p_value must be in (0, 1], not {p_value}: permutation tests count the real labelling"
        )
    return float(0.125 * p_value**-0.75 + 0.25 * p_value**-0.5)
