"""What is chosen, judged and registered."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict

from regraft.records.base import Record
from regraft.records.trials import TrialStatus


class Interval(Record):
    """A mean with its confidence interval."""

    mean: float
    low: float
    high: float
    level: float = 0.95


class LeaderboardRow(Record):
    """One candidate of a leaderboard.

    Of one that was repeated, `quality` is over the examples' means of all its seeds, and `seeds` are the
    seeds' own means; key, run and metrics are those of the first. `final` is over examples that played no
    part in the choice, where it was measured. `p_control` is the one-sided p-value of its lead on the best
    control, corrected for how many candidates were held against it.
    """

    rank: int | None
    key: str
    run_id: str
    label: str
    method: dict[str, Any]
    status: TrialStatus
    reason: str = ""
    quality: Interval | None = None
    final: Interval | None = None
    p_control: float | None = None
    seeds: tuple[float, ...] = ()
    metrics: dict[str, float] = {}
    on_pareto_front: bool = False
    is_control: bool = False
    meets_constraints: bool = False

    @property
    def is_endpoint(self) -> bool:
        """Whether a model elsewhere gave the answers."""
        return self.method.get("name") == "endpoint"


class Leaderboard(Record):
    """Trials in order of the objective, with the winner among those that meet the constraints.

    `optimism` is by how much the best of so many may look better than it is on what it was chosen by, in the
    objective's unit: an estimate, by resampling.
    """

    sweep_id: str
    dataset_id: str
    objective: str
    rows: tuple[LeaderboardRow, ...]
    winner_key: str | None = None
    winner_reason: str = ""
    optimism: float | None = None

    def marks(self, row: LeaderboardRow) -> list[str]:
        """What a table says of a row beside its figures, for people."""
        found = ["winner"] if row.key == self.winner_key else []
        found += ["control"] if row.is_control else []
        found += ["Pareto"] if row.on_pareto_front else []
        found += [f"{len(row.seeds)} seeds {min(row.seeds):.3f} to {max(row.seeds):.3f}"] if row.seeds else []
        return found + ([row.status] if row.status != "completed" else [])


class ModelVersion(Record):
    """A registered, immutable version of a served model."""

    name: str
    version: int
    logged_model_id: str
    run_id: str
    method: dict[str, Any]
    base_model: str
    base_revision: str
    dataset_id: str

    @property
    def served_id(self) -> str:
        """The name clients may pin: `name/version`."""
        return f"{self.name}/{self.version}"


class AnswerDifference(Record):
    """Two answers to one prompt that are not the same.

    `token` is the index of the first token that differs, and `gap` how much likelier the reference model
    finds the one continuation there than the other, in nats; infinite where only one of them goes on.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    prompt: str
    expected: str
    got: str
    token: int
    gap: float
    tie: bool


class PathParity(Record):
    """Answers of one way to run a version beside those of its adapter on its base.

    `largest_gap` is that of all differences, `tolerance` what passes for a tie, both in nats; `differences`
    are a few of them, those that do not pass first.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    prompts: int
    equal: int
    ties: int
    largest_gap: float
    tolerance: float
    differences: tuple[AnswerDifference, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether all answers are the same, but for ties."""
        return self.equal + self.ties == self.prompts


class Probe(Record):
    """A prompt and the beginning of what the adapter on its base answers, as token ids.

    What loads a version asks it the same, wherever that is, before it answers anybody.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


class Parity(Record):
    """Whether a version gives the same greedy answers however it is run.

    `paths` are the ways that were compared with the adapter on its base (`merged`, `served`, `recorded`),
    `left_out` why others were not. `probes` are a few of the reference answers.
    """

    version: str
    paths: dict[str, PathParity]
    left_out: dict[str, str] = {}
    probes: tuple[Probe, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether what is served, and every other way that was compared, answers alike."""
        return "served" in self.paths and all(path.ok for path in self.paths.values())


class Comparison(Record):
    """A paired comparison of two candidates over the same examples.

    `difference` is challenger minus incumbent of the mean score, `low` and `high` bound it at `level`;
    `p_value` is one-sided, of a permutation test: how often a difference this high or higher comes about
    where neither is better.
    """

    metric: str
    against: str = ""
    split: str
    examples: int
    challenger_mean: float
    incumbent_mean: float
    difference: float
    low: float
    high: float
    level: float
    p_value: float


class GateCheck(Record):
    """One bound of the gate: a figure of the challenger, what it was held against, and whether it held.

    `incumbent` is the figure of whom it is compared with, where it is; None for a bound of its own.
    """

    figure: str
    challenger: float | None
    against: str = ""
    incumbent: float | None = None
    rule: str
    ok: bool


class PromotionDecision(Record):
    """The gate's word on a challenger, with its evidence.

    `incumbent` is the champion, or the control before there is one. `examples_to_settle` is about how many
    would tell whether a lead of the size that was seen is one, where that is open.
    """

    id: str
    outcome: Literal["promote", "reject", "inconclusive"]
    reason: str
    challenger: str
    incumbent: str
    evidence: tuple[Comparison, ...]
    checks: tuple[GateCheck, ...] = ()
    parity: Parity | None = None
    examples_to_settle: int | None = None
