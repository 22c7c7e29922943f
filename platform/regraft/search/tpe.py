"""Optuna's tree-structured Parzen estimator over the conditional space (Bergstra et al., 2011)."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from regraft.methods import Method, parse_method
from regraft.search.base import Outcome, Proposer, Search, key
from regraft.search.space import Arm, Range

if TYPE_CHECKING:
    import optuna

#: How often a proposal that was made before is asked anew, and then drawn, before the space is exhausted.
_PATIENCE = 50


class TPE(Search):
    """Draws that learn from what came of those before; with several objectives, towards their Pareto front.

    What is not open is tried once, first, and counts. Trials that were stopped early count as worse than
    those that were not, and infeasible ones as worst; with several objectives neither is learned from.
    """

    learns: ClassVar[bool] = True
    name: Literal["tpe"] = "tpe"
    trials: int = Field(ge=1, description="How many methods to try in all.")
    startup: int = Field(10, ge=1, description="Draws at random before it begins to learn.")
    minimise: tuple[str, ...] = Field(("eval_loss",), description="Recorded figures to bring down.")
    maximise: tuple[str, ...] = Field((), description="Recorded figures to bring up.")

    @model_validator(mode="after")
    def _aims(self) -> TPE:
        if not self.objectives:
            raise ValueError("minimise and maximise are both empty: nothing to search for")
        return self

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the figures, those to minimise first."""
        return (*self.minimise, *self.maximise)

    def proposer(self, arms: Sequence[Arm], *, samples: int, seed: int) -> Proposer:
        """A study in memory; `samples` plays no part."""
        return _Study(self, arms, seed)

    def preview(self, arms: Sequence[Arm], *, samples: int, seed: int) -> tuple[Method, ...]:
        """What is fixed, and the draws before anything is learned."""
        proposer = self.proposer(arms, samples=samples, seed=seed)
        count = min(self.trials, self.startup + sum(not arm.is_open for arm in arms))
        return tuple(m for _ in range(count) if (m := proposer.ask()) is not None)


class _Study(Proposer):
    """One study: what is open is an arm (a category) and the fields of that arm alone."""

    def __init__(self, settings: TPE, arms: Sequence[Arm], seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._settings = settings
        self._fixed = [parse_method(arm.fixed) for arm in arms if not arm.is_open]
        self._open = {str(index): arm for index, arm in enumerate(arms) if arm.is_open}
        self._asked, self._rng = 0, random.Random(seed)
        self._running: dict[str, optuna.Trial] = {}
        self._seen: dict[str, Outcome | None] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # group, multivariate
            self._study = optuna.create_study(
                directions=[
                    *(optuna.study.StudyDirection.MINIMIZE for _ in settings.minimise),
                    *(optuna.study.StudyDirection.MAXIMIZE for _ in settings.maximise),
                ],
                sampler=optuna.samplers.TPESampler(
                    seed=seed,
                    n_startup_trials=settings.startup,
                    multivariate=True,
                    group=True,  # fields of one arm are modelled together, apart from those of the others
                    constant_liar=True,  # several trials run at once: do not propose beside them
                ),
            )

    def ask(self) -> Method | None:
        """The next method that was not proposed before; None after `trials`, or if the space is exhausted."""
        if self._asked >= self._settings.trials and not self._fixed:
            return None
        if self._fixed:
            method = self._fixed.pop(0)
            self._asked += 1
            self._seen.setdefault(key(method), None)
            return method
        for attempt in range(2 * _PATIENCE if self._open else 0):
            if attempt >= _PATIENCE:  # it clings to what it knows: draw something else
                arm = self._rng.choice(list(self._open.values()))
                if (drawn := self._place(parse_method(arm.draw(self._rng)))) is not None:
                    self._study.enqueue_trial(drawn[0])
            trial = self._study.ask()
            method = parse_method(self._suggest(trial))
            name = key(method)
            if name not in self._seen:
                self._seen[name] = None
                self._running[name] = trial
                self._asked += 1
                return method
            self._close(trial, self._seen[name])
        return None

    def tell(self, method: Method, outcome: Outcome) -> None:
        """Learn it, if the method lies in the space; of each method once."""
        name = key(method)
        if self._seen.get(name) is not None:
            return
        self._seen[name] = outcome
        trial = self._running.pop(name, None)
        if trial is not None:
            self._close(trial, outcome)

    def recall(self, method: Method, outcome: Outcome, *, counts: bool) -> None:
        """Learn what came of a method before, if it lies in the space and ran to its end.

        One of another sweep may be proposed again: the result is found then, and counts.
        """
        import optuna

        if counts:
            self._asked += 1
            self._seen[key(method)] = outcome
            self._fixed = [m for m in self._fixed if m != method]
        values, place = self._values(outcome), self._place(method)
        if outcome.status == "completed" and values is not None and place is not None:
            params, distributions = place
            made = optuna.trial.create_trial(params=params, distributions=distributions, values=values)
            self._study.add_trial(made)

    @property
    def left(self) -> int:
        """Those not asked for yet."""
        return max(len(self._fixed), self._settings.trials - self._asked)

    def _suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        arm_name = str(trial.suggest_categorical("arm", list(self._open)))
        arm = self._open[arm_name]
        found = dict(arm.fixed)
        for field, values in arm.choices.items():
            place = trial.suggest_categorical(f"{arm_name}.{field}", list(range(len(values))))
            found[field] = values[int(place)]
        for field, spec in arm.ranges.items():
            parameter, log = f"{arm_name}.{field}", spec.kind == "loguniform"
            if spec.whole:
                found[field] = trial.suggest_int(parameter, round(spec.low), round(spec.high), log=log)
            else:
                found[field] = spec.tidy(trial.suggest_float(parameter, spec.low, spec.high, log=log))
        return found

    def _place(self, method: Method) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Where a method lies in the space, if it does."""
        from optuna.distributions import CategoricalDistribution

        have = method.model_dump(mode="json")
        for arm_name, arm in self._open.items():
            # What an arm leaves out stands at its default.
            drawn = {f: have[f] for f in (*arm.choices, *arm.ranges)} if arm.method == method.name else {}
            if not drawn or key(parse_method(arm.fixed | drawn)) != key(method):
                continue
            params: dict[str, Any] = {"arm": arm_name}
            kinds: dict[str, Any] = {"arm": CategoricalDistribution(list(self._open))}
            for field, values in arm.choices.items():
                if drawn[field] not in values:
                    break
                params[f"{arm_name}.{field}"] = values.index(drawn[field])
                kinds[f"{arm_name}.{field}"] = CategoricalDistribution(list(range(len(values))))
            else:
                for field, spec in arm.ranges.items():
                    distribution = _distribution(spec)
                    # Methods have rounded values, which may lie a little outside.
                    if not spec.tidy(spec.low) <= drawn[field] <= spec.tidy(spec.high):
                        break
                    inside = min(max(drawn[field], distribution.low), distribution.high)
                    params[f"{arm_name}.{field}"] = inside
                    kinds[f"{arm_name}.{field}"] = distribution
                else:
                    return params, kinds
        return None

    def _close(self, trial: optuna.Trial, outcome: Outcome | None) -> None:
        import optuna

        states = optuna.trial.TrialState
        if outcome is None or outcome.status == "failed":  # unknown, or a bug: nothing to learn
            self._study.tell(trial, state=states.FAIL)
            return
        values = self._values(outcome)
        if outcome.status == "completed" and values is not None:
            self._study.tell(trial, values)
        elif len(self._settings.objectives) > 1:  # Optuna prunes single-objective studies alone
            self._study.tell(trial, state=states.FAIL)
        else:
            if values is not None and outcome.status == "stopped":
                trial.report(values[0], outcome.point)
            self._study.tell(trial, state=states.PRUNED)

    def _values(self, outcome: Outcome) -> list[float] | None:
        found = [outcome.figures.get(name) for name in self._settings.objectives]
        known = [value for value in found if value is not None and not math.isnan(value)]
        return known if len(known) == len(found) else None


def _distribution(spec: Range) -> Any:
    from optuna.distributions import FloatDistribution, IntDistribution

    log = spec.kind == "loguniform"
    if spec.whole:
        return IntDistribution(round(spec.low), round(spec.high), log=log)
    return FloatDistribution(spec.low, spec.high, log=log)
