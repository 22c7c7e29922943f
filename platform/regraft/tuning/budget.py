"""What a sweep has taken and may still take: time, GPU-hours, money. Pure bookkeeping over a clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection
from typing import NamedTuple

from regraft.config import BudgetSection

HOUR = 3600.0


class Demand(NamedTuple):
    """What a running trial holds: cores, GPUs, and the price of an hour of both."""

    cpus: float
    gpus: float
    price: float = 0.0


class Spent(NamedTuple):
    """What was taken so far. Money is in the currency of `cluster.prices`."""

    trials: int = 0
    hours: float = 0.0
    gpu_hours: float = 0.0
    money: float = 0.0

    def __str__(self) -> str:
        """For people."""
        words = f"{self.trials} trials in {_span(self.hours)}"
        words += f", {self.gpu_hours:.2f} GPU-hours" if self.gpu_hours else ""
        return words + (f", cost {self.money:.2f}" if self.money else "")


class _Held(NamedTuple):
    """What a trial holds, since when it was handed out, and since when it really runs."""

    handed: float
    since: float
    demand: Demand
    effort: float


class Ledger:
    """Who runs, since when, at what price; whether one more trial still fits.

    What a trial will take is learned from those that are finished: their seconds over their relative effort.
    Until one is, any trial is let in; the bound itself still ends it.

    Args:
        budget: The bounds.
        clock: Seconds, ever rising.
        before: What the same sweep took until it was cut short.
        known: Keys of the trials that were started then; started again, none of them counts as one more.
    """

    def __init__(
        self,
        budget: BudgetSection,
        clock: Callable[[], float] = time.monotonic,
        before: Spent = Spent(),  # noqa: B008
        known: Collection[str] = (),
    ) -> None:
        self._budget, self._clock, self._before = budget, clock, before
        self._began = clock()
        self._running: dict[str, _Held] = {}
        self._rates: list[float] = []
        #: Seconds of each trial that ended, from when it was handed out, by key.
        self.took: dict[str, float] = {}
        self._started, self._gpu_seconds, self._money = set(known), 0.0, 0.0

    def start(self, key: str, demand: Demand, effort: float) -> None:
        """A trial is handed out; `effort` is its training relative to the others', in any unit."""
        self._started.add(key)
        now = self._clock()
        self._running[key] = _Held(now, now, demand, effort)

    def runs(self, key: str) -> None:
        """A trial that was handed out has got what it asked for: on a busy cluster, later."""
        self._running[key] = self._running[key]._replace(since=self._clock())

    def end(self, key: str, *, whole: bool) -> float:
        """A trial ends; one that ran to its end teaches what others will take. Gives its seconds."""
        held = self._running.pop(key)
        now = self._clock()
        took = now - held.since
        self._gpu_seconds += took * held.demand.gpus
        self._money += took * held.demand.price / HOUR
        self.took[key] = now - held.handed
        if whole and held.effort > 0:
            self._rates.append(took / held.effort)
        return took

    @property
    def spent(self) -> Spent:
        """What was taken until now, running trials included."""
        now = self._clock()
        held = [(now - h.since, h.demand) for h in self._running.values()]
        return Spent(
            len(self._started),
            self._before.hours + (now - self._began) / HOUR,
            self._before.gpu_hours + (self._gpu_seconds + sum(s * d.gpus for s, d in held)) / HOUR,
            self._before.money + self._money + sum(s * d.price for s, d in held) / HOUR,
        )

    def expected(self, effort: float) -> float | None:
        """Seconds that a trial of this effort takes, as far as is known."""
        return statistics.median(self._rates) * effort if self._rates else None

    @property
    def average(self) -> float | None:
        """Mean seconds of the trials that ended, however they did."""
        return statistics.fmean(self.took.values()) if self.took else None

    def ahead(self, key: str) -> float:
        """Seconds that a running trial still takes, as far as is known."""
        held = self._running[key]
        return max(0.0, (self.expected(held.effort) or 0.0) - (self._clock() - held.since))

    def refuses(self, key: str, demand: Demand, effort: float) -> str | None:
        """Why a trial may not start any more; None if it may."""
        most = self._budget.trials
        if most is not None and key not in self._started and len(self._started) >= most:
            return f"{most} trials were started"
        seconds = self.expected(effort) or 0.0
        spent = self.spent
        # What runs still takes its time too: side by side with this one, but not for free.
        held = [(self.ahead(other), running.demand) for other, running in self._running.items()]
        held.append((seconds, demand))
        would = {
            "hours": (spent.hours + seconds / HOUR, self._budget.hours),
            "gpu_hours": (spent.gpu_hours + sum(s * d.gpus for s, d in held) / HOUR, self._budget.gpu_hours),
            "money": (spent.money + sum(s * d.price for s, d in held) / HOUR, self._budget.money),
        }
        for name, (value, bound) in would.items():
            if bound is not None and value > bound:
                return f"it would bring {name} to {value:.3g}, over the budget of {bound:g}"
        return None

    @property
    def over(self) -> str | None:
        """Which bound is used up, if one is; what runs has to end then."""
        spent = self.spent
        for name in ("hours", "gpu_hours", "money"):
            bound = getattr(self._budget, name)
            if bound is not None and getattr(spent, name) >= bound:
                return f"the sweep's budget of {bound:g} {name} is used up"
        return None


def _span(hours: float) -> str:
    return f"{hours * 60:.1f} min" if hours < 2 else f"{hours:.1f} h"
