"""What a sweep has taken and may still take: time, GPU-hours, money. Pure bookkeeping over a clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
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

    trials: int
    hours: float
    gpu_hours: float
    money: float

    def __str__(self) -> str:
        """For people."""
        words = f"{self.trials} trials in {_span(self.hours)}"
        words += f", {self.gpu_hours:.2f} GPU-hours" if self.gpu_hours else ""
        return words + (f", cost {self.money:.2f}" if self.money else "")


class Ledger:
    """Who runs, since when, at what price; whether one more trial still fits.

    What a trial will take is learned from those that are finished: their seconds over their relative effort.
    Until one is, any trial is let in; the bound itself still ends it.

    Args:
        budget: The bounds.
        clock: Seconds, ever rising.
    """

    def __init__(self, budget: BudgetSection, clock: Callable[[], float] = time.monotonic) -> None:
        self._budget, self._clock = budget, clock
        self._began = clock()
        self._running: dict[str, tuple[float, Demand, float]] = {}
        self._rates: list[float] = []
        #: Seconds of each trial that ended, from when it was handed out, by key.
        self.took: dict[str, float] = {}
        self._trials, self._gpu_seconds, self._money = 0, 0.0, 0.0

    def start(self, key: str, demand: Demand, effort: float) -> None:
        """A trial starts; `effort` is its training relative to the others', in any unit."""
        self._trials += 1
        self._running[key] = (self._clock(), demand, effort)

    def end(self, key: str, *, whole: bool) -> float:
        """A trial ends; one that ran to its end teaches what others will take. Gives its seconds."""
        started, demand, effort = self._running.pop(key)
        took = self._clock() - started
        self._gpu_seconds += took * demand.gpus
        self._money += took * demand.price / HOUR
        self.took[key] = took
        if whole and effort > 0:
            self._rates.append(took / effort)
        return took

    @property
    def spent(self) -> Spent:
        """What was taken until now, running trials included."""
        now = self._clock()
        held = [(now - started, demand) for started, demand, _ in self._running.values()]
        return Spent(
            self._trials,
            (now - self._began) / HOUR,
            (self._gpu_seconds + sum(s * d.gpus for s, d in held)) / HOUR,
            self._money + sum(s * d.price for s, d in held) / HOUR,
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
        started, _, effort = self._running[key]
        return max(0.0, (self.expected(effort) or 0.0) - (self._clock() - started))

    def refuses(self, demand: Demand, effort: float) -> str | None:
        """Why a trial may not start any more; None if it may."""
        if self._budget.trials is not None and self._trials >= self._budget.trials:
            return f"{self._budget.trials} trials were started"
        seconds = self.expected(effort) or 0.0
        spent = self.spent
        # What runs still takes its time too: side by side with this one, but not for free.
        held = [(self.ahead(key), running) for key, (_, running, _) in self._running.items()]
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
