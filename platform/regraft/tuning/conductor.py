"""Which trial starts next, and when: search, capacity, budget and repeats in one place. Knows no Ray.

The runner asks for the next trial whenever it could start one, and says what came of each. A trial that does
not fit yet is held, and nothing overtakes it: a wide one is not starved by narrow ones. A trial whose process
was lost comes before new ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from regraft.config import Experiment
from regraft.errors import ServiceError
from regraft.methods import Method
from regraft.records import TrialResult
from regraft.search import Outcome, Proposer
from regraft.training.spec import TrialSpec
from regraft.tuning.budget import Demand, Ledger
from regraft.tuning.plan import demand_of

Find = Callable[[str], TrialResult | None]


class Conductor:
    """The order of a sweep.

    Args:
        experiment: With its sweep.
        proposer: Where methods come from.
        specify: Makes a trial of a method and a seed.
        find: Finds the result of finished work by key.
        ledger: The budget.
        room: Says what the cluster has, less what is to be left alone, and among how many sweeps it is
            shared; the price is ignored. Nodes come and go.
        effort: How much there is to do for a method, beside others.
        say: Called with what is worth seeing.
    """

    def __init__(
        self,
        experiment: Experiment,
        proposer: Proposer,
        specify: Callable[[Method, int], TrialSpec],
        find: Find,
        ledger: Ledger,
        room: Callable[[], tuple[Demand, int]],
        effort: Callable[[Method], float],
        say: Callable[[str], None],
    ) -> None:
        self._experiment, self._proposer, self._specify = experiment, proposer, specify
        self._find, self.ledger, self._room, self._effort, self._say = find, ledger, room, effort, say
        self._most = Demand(0.0, 0.0)
        self._held: TrialSpec | None = None
        self._waits_for_node = False
        #: Trials that were lost and are to run again.
        self.lost: list[TrialSpec] = []
        self._repeats: list[TrialSpec] | None = None
        self._running: dict[str, Demand] = {}
        self.specs: dict[str, TrialSpec] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.found: dict[str, TrialResult] = {}
        self.left_out: list[str] = []
        self._closed = ""
        #: Set from outside, by a signal: everything ends.
        self.cancelled = False

    def next(self) -> TrialSpec | Literal["wait", "done"]:
        """The next trial; `wait` while it does not fit, or more is known later; `done` at the end."""
        while True:
            if over := self.ledger.over:
                self.close(over)
            if self.lost and not self._closed:
                if not self._fits(demand := self._demand(self.lost[0])):
                    return "wait"
                return self._start(self.lost.pop(0), demand)
            spec = self._held or self._propose()
            if not isinstance(spec, TrialSpec):
                return spec
            self._held = None
            found = None if spec.key in self.specs else self._find(spec.key)
            self.specs.setdefault(spec.key, spec)
            if found is not None:
                self._say(f"found {found.label}: {found.status}, not run again")
                # Elsewhere it may have been no repeat, or another's.
                self.found[spec.key] = found.model_copy(update={"repeat_of": spec.repeat_of})
                self._learn(spec, Outcome(found.status, found.figures))
                continue
            demand = self._demand(spec)
            if refused := self._closed or self.ledger.refuses(spec.key, demand, self._effort(spec.parsed)):
                self._leave_out(spec, refused)
                continue
            if not self._fits(demand):
                self._held = spec
                return "wait"
            return self._start(spec, demand)

    def _start(self, spec: TrialSpec, demand: Demand) -> TrialSpec:
        self._running[spec.key] = demand
        self.ledger.start(spec.key, demand, self._effort(spec.parsed))
        return spec

    def again(self, spec: TrialSpec) -> bool:
        """Have a running trial that was lost run once more; whether it will: not in a sweep that ends."""
        if self._closed or self.cancelled or self.ledger.over:
            return False
        self._running.pop(spec.key)
        self.ledger.end(spec.key, whole=False)
        self.lost.append(spec)
        return True

    def recall(self, spec: TrialSpec, result: TrialResult) -> None:
        """A result from before: the search learns from it; if of this very sweep, it counts as tried."""
        own = result.sweep_id == spec.sweep_id
        if own:
            self.specs[spec.key], self.found[spec.key] = spec, result
            self.outcomes[spec.key] = Outcome(result.status, result.figures)
        self._proposer.recall(spec.parsed, Outcome(result.status, result.figures), counts=own)

    def finished(self, key: str, outcome: Outcome) -> float:
        """What came of a trial that ran; gives the seconds it took."""
        self._running.pop(key)
        took = self.ledger.end(key, whole=outcome.status == "completed")
        self._learn(self.specs[key], outcome)
        return took

    def _learn(self, spec: TrialSpec, outcome: Outcome) -> None:
        self.outcomes[spec.key] = outcome
        if not spec.repeat_of:  # a repeat teaches the search nothing new
            self._proposer.tell(spec.parsed, outcome)

    @property
    def outlook(self) -> str:
        """What was taken so far and what is expected still, for people."""
        known = self._proposer.left
        ahead = [self.ledger.ahead(key) for key in self._running]
        words = f"so far {self.ledger.spent}; {len(self._running)} running"
        if known is None:
            return words
        average = self.ledger.average
        if average is None:
            return f"{words}, {known} to come"
        side_by_side = max(1, len(self._running))
        rest = (sum(ahead) + known * average) / side_by_side
        return f"{words}, {known} to come, about {rest / 60:.1f} min more"

    def close(self, reason: str) -> None:
        """Start nothing any more."""
        self._closed = self._closed or reason

    def _propose(self) -> TrialSpec | Literal["wait", "done"]:
        if self._repeats is None:
            method = self._proposer.ask()
            if method is not None:
                return self._specify(method, self._experiment.sweep.seed)
            if self._running:
                return "wait"  # finalists are known when all are in
            self._repeats = [] if self._closed else self._finalists()
        if self._repeats:
            return self._repeats.pop(0)
        return "wait" if self._running else "done"

    def _finalists(self) -> list[TrialSpec]:
        """The best trained methods, once more with each further seed."""
        wanted, aim = self._experiment.sweep.finalists, self._experiment.select.maximise
        if wanted is None:
            return []
        scored = [
            (key, outcome.figures[aim])
            for key, outcome in self.outcomes.items()
            if outcome.status == "completed" and self.specs[key].parsed.trains and aim in outcome.figures
        ]
        best = sorted(scored, key=lambda pair: -pair[1])[: wanted.count]
        first = self._experiment.sweep.seed
        if best:
            self._say(f"repeating the best {len(best)} with {wanted.seeds - 1} more seeds each")
        return [
            self._specify(self.specs[key].parsed, first + more)
            for more in range(1, wanted.seeds)
            for key, _ in best
        ]

    def _leave_out(self, spec: TrialSpec, why: str) -> None:
        if not self.left_out:
            self._say(f"left out from here on: {why}")
        self.left_out.append(f"{spec.parsed.label}: {why}")
        self._closed = self._closed or why

    def _demand(self, spec: TrialSpec) -> Demand:
        return demand_of(spec.parsed, self._experiment, self._room()[0])

    def _fits(self, demand: Demand) -> bool:
        """Whether a trial can start now; of several sweeps each has its share, and room for one trial."""
        bound = self._experiment.sweep.max_concurrent
        if bound is not None and len(self._running) >= bound:
            return False
        room, sweeps = self._room()
        self._most = Demand(max(self._most.cpus, room.cpus), max(self._most.gpus, room.gpus))
        cpus = sum(d.cpus for d in self._running.values()) + demand.cpus
        gpus = sum(d.gpus for d in self._running.values()) + demand.gpus
        share = 1.0 / sweeps if self._running else 1.0
        if cpus <= room.cpus * share + 1e-9 and gpus <= room.gpus * share + 1e-9:
            self._waits_for_node = False
            return True
        if self._running:
            return False
        if demand.cpus > self._most.cpus + 1e-9 or demand.gpus > self._most.gpus + 1e-9:
            raise ServiceError(
                f"a trial takes {demand.cpus:g} CPUs and {demand.gpus:g} GPUs; for this sweep there are "
                f"{room.cpus:g} and {room.gpus:g}",
                "lower sweep.cpus_per_trial, sweep.gpus_per_trial, sweep.workers_per_trial, sweep.devices or "
                "sweep.leave, or add nodes",
            )
        if not self._waits_for_node:
            self._say(f"waiting for a node: {room.cpus:g} CPUs and {room.gpus:g} GPUs are left")
            self._waits_for_node = True
        return False
