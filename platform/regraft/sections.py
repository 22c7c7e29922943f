"""The sections of the YAML, one class each: every key with its type, default and bounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from regraft.evals import AnyMetric, Metric, default_metrics
from regraft.methods import METHODS_BY_NAME, Method
from regraft.methods.base import DTypeName
from regraft.records import Example, content_hash
from regraft.search import AnySearch, AnyStopping, Arm, Asha, Grid, arms
from regraft.section import Section


class ModelSection(Section):
    """Which base model, and how it is held."""

    source: str = Field(description="Hub id, local folder, models:/ URI, or bundled:smollm2-135m-instruct.")
    revision: str | None = Field(None, description="Commit or tag of a hub id.")
    dtype: DTypeName = "bfloat16"
    device: Literal["auto", "cpu", "cuda"] = "auto"


class DataSection(Section):
    """Where the examples are. Paths are relative to the YAML."""

    train: tuple[Path, ...]
    evaluation: dict[str, Path] = Field(
        min_length=1, description="Named evaluation sets; none of them trains."
    )
    leakage_jaccard: float = Field(
        0.7, gt=0, le=1, description="Prompts at least this alike across train and evaluation are leakage."
    )

    @field_validator("train", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path) else value

    @field_validator("evaluation", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"evaluation": value} if isinstance(value, str | Path) else value

    @field_validator("evaluation")
    @classmethod
    def _not_train(cls, value: dict[str, Path]) -> dict[str, Path]:
        if "train" in value:
            raise ValueError("an evaluation set cannot be named 'train'")
        return value


ScheduleName = Literal["linear", "cosine", "constant"]
TooLong = Literal["refuse", "drop", "truncate"]


class FinalistsSection(Section):
    """Repeats of the best over seeds: what a single run owes to luck shows in the spread."""

    count: int = Field(3, ge=1, description="How many of the best methods are repeated.")
    seeds: int = Field(3, ge=2, description="Runs of each, with the one that was found.")


class BudgetSection(Section):
    """What a sweep may take; whichever bound is met first ends it. Unset means no bound."""

    trials: int | None = Field(None, ge=1, description="Trials started, those found finished not counted.")
    hours: float | None = Field(None, gt=0, description="Wall-clock from the start of the sweep.")
    gpu_hours: float | None = Field(None, gt=0, description="Hours times GPUs, of all trials together.")
    money: float | None = Field(None, gt=0, description="By cluster.prices, in their currency.")


class DevicesSection(Section):
    """What one worker of a trial holds, and how many workers there are."""

    cpus: float | None = Field(None, gt=0)
    gpus: float | None = Field(None, ge=0, description="A fraction shares a GPU, without isolating memory.")
    workers: int | None = Field(None, ge=1)


class LeaveSection(Section):
    """Capacity of the cluster that the sweep does not touch."""

    cpus: float = Field(0, ge=0)
    gpus: float = Field(0, ge=0)


class SweepSection(Section):
    """What to try and how long."""

    methods: tuple[dict[str, Any], ...] = Field(min_length=1)
    epochs: float = Field(2.0, gt=0)
    tokens_per_batch: int = Field(1024, ge=16, description="Tokens of a micro-batch, without padding.")
    max_length: int = Field(512, ge=16, description="Tokens of one example.")
    too_long: TooLong = Field(
        "refuse",
        description="Of longer examples: stop, drop them, or cut their end; what is lost is counted.",
    )
    accumulate: int = Field(
        1,
        ge=1,
        description="Micro-batches a step and worker; every supervised token of a step counts the same.",
    )
    schedule: ScheduleName = Field(
        "linear", description="How the rate falls to zero after the warm-up, or not."
    )
    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0, description="AdamW's, on matrices alone.")
    packing: Literal["auto"] | bool = Field(
        "auto",
        description="Let the examples of a micro-batch share one row, without padding and without seeing "
        "each other; auto: where method and model can.",
    )
    compile: bool = Field(
        False,
        description="Compile the decoder's layers (torch.compile): minutes at the start of each process.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Compute activations again in the backward pass: less memory, about a third slower.",
    )
    max_gradient_norm: float = Field(1.0, gt=0)
    evaluations: int = Field(4, ge=1, description="Evaluation points over a trial, evenly spread.")
    loss_examples: int | None = Field(
        None,
        ge=1,
        description="Evaluation loss over at most so many examples, evenly chosen; all if not given.",
    )
    answers_at_points: int = Field(
        0, ge=0, description="Evaluation examples answered and scored at each point, beside the loss."
    )
    search: AnySearch = Field(Grid(), description="How the lists and ranges of the methods are searched.")
    stopping: AnyStopping | None = Field(Asha(), description="When a trial is ended early; null for never.")
    finalists: FinalistsSection | None = Field(None, description="Repeat the best over several seeds.")
    budget: BudgetSection = BudgetSection()
    checkpoint_seconds: float = Field(
        300, ge=0, description="Least time between checkpoints, from which a trial cut short goes on."
    )
    samples: int = Field(1, ge=1, description="Draws for each grid point whose method has a range (grid).")
    seed: int = 0
    cpus_per_trial: float = Field(1, gt=0)
    gpus_per_trial: float = Field(0, ge=0)
    workers_per_trial: int = Field(1, ge=1, description="More than one runs the trial as Ray Train.")
    min_workers: int | None = Field(
        None,
        ge=1,
        description="A trial goes on with so few workers where a node is lost; with all if not given.",
    )
    worker_failures: int = Field(
        1,
        ge=0,
        description="How often a trial may lose a process or a node and go on from its checkpoint.",
    )
    hang_minutes: float = Field(
        30,
        gt=0,
        description="A process without a step or an answer for so long is taken for hung, and lost.",
    )
    shard: bool = Field(
        False, description="Split the weights over a trial's workers (FSDP2) instead of copying them (DDP)."
    )
    ray_train: tuple[str, ...] = Field((), description="Methods that run as Ray Train even with one worker.")
    devices: dict[str, DevicesSection] = Field(
        {}, description="By method, where it needs others than cpus_per_trial and so on say."
    )
    leave: LeaveSection = LeaveSection()
    max_concurrent: int | None = Field(None, ge=1)
    trial_memory_gib: float | None = Field(
        None,
        gt=0,
        description="Memory of a trial, in GiB; on a GPU all of its own if not given. Batches pass "
        "through in parts where they would need more; a trial that cannot fit is infeasible.",
    )

    @field_validator("min_workers")
    @classmethod
    def _no_more_than_all(cls, value: int | None, info: ValidationInfo) -> int | None:
        workers = info.data.get("workers_per_trial")
        if value is not None and workers is not None and value > workers:
            raise ValueError(f"is {value}, more than sweep.workers_per_trial = {workers}")
        return value

    @field_validator("shard")
    @classmethod
    def _needs_workers(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("workers_per_trial") == 1:
            raise ValueError("needs sweep.workers_per_trial of 2 or more")
        return value

    @model_validator(mode="after")
    def _methods_support_it(self) -> SweepSection:
        workers = "shards" if self.shard else "replicas"
        asked = {
            workers: (self.workers_per_trial > 1, "shard" if self.shard else "workers_per_trial"),
            "packs": (self.packing is True, "packing"),
            "recomputes": (self.gradient_checkpointing, "gradient_checkpointing"),
        }
        for index, entry in enumerate(self.methods):
            names = entry.get("name")
            for name in names if isinstance(names, list) else [names]:
                method = METHODS_BY_NAME.get(str(name))
                if method is None or method.kind == "control":
                    continue
                for way, (wanted, field) in asked.items():
                    if wanted and not getattr(method.support, way):
                        raise ValueError(f"methods.{index}: {name} does not train with sweep.{field}")
        return self

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The space to search."""
        return tuple(arm for entry in self.methods for arm in arms(entry))

    def expanded(self) -> tuple[Method, ...]:
        """The methods to try, concrete, without repeats; of a search that learns, those known beforehand."""
        return self.search.preview(self.arms, samples=self.samples, seed=self.seed)

    def of(self, method: Method) -> SweepSection:
        """This section as it holds for one method: with its own devices."""
        own = self.devices.get(method.name, DevicesSection(gpus=0) if method.remote else None)
        if own is None:
            return self
        named = {"cpus": "cpus_per_trial", "gpus": "gpus_per_trial", "workers": "workers_per_trial"}
        update: dict[str, Any] = {named[k]: v for k, v in own.model_dump(exclude_none=True).items()}
        if own.workers is not None:
            update["min_workers"] = min(self.min_workers, own.workers) if self.min_workers else None
            update["shard"] = self.shard and own.workers > 1
        return self.model_copy(update=update)


def _decisive(metric: Metric) -> dict[str, Any]:
    files = {name: value for name, value in metric if isinstance(value, Path)}
    found = metric.model_dump(mode="json", exclude={*metric.indecisive, *files})
    found |= {k: content_hash(f.read_text(encoding="utf-8")) if f.is_file() else "" for k, f in files.items()}
    return found | {"version": metric.version}


class EvaluateSection(Section):
    """How candidates are scored."""

    metrics: tuple[AnyMetric, ...] = Field(default_factory=default_metrics)
    max_new_tokens: int = Field(64, ge=1)
    batch_size: int = Field(32, ge=1)
    latency_prompts: int = Field(4, ge=1, description="Prompts answered one by one to measure latency.")
    final_share: float = Field(
        0.5,
        ge=0,
        le=0.9,
        description="Share of each evaluation set that candidates are not chosen by: the chosen are judged "
        "by it, once. 0 uses all examples for both, and what is chosen looks better than it is.",
    )
    finals: int = Field(
        8,
        ge=1,
        description="How many candidates are measured once more when the sweep is over, one at a time: the "
        "best of each method, and the controls.",
    )

    @field_validator("metrics")
    @classmethod
    def _each_figure_once(cls, value: tuple[Metric, ...]) -> tuple[Metric, ...]:
        names = [out.name for metric in value for out in (*metric.outputs, *metric.wholes)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two metrics give {', '.join(twice)}: name each metric once")
        return value

    def timed(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Those of the examples that are answered one by one, to measure latency."""
        return examples[:: max(1, len(examples) // self.latency_prompts)][: self.latency_prompts]

    @property
    def asked(self) -> str:
        """A hash of what decides a score: files by their content, whatever has no say left out."""
        return content_hash([self.max_new_tokens, [_decisive(metric) for metric in self.metrics]])


class Constraint(Section):
    """A bound on a recorded figure, such as `latency_p95_ms <= 4000`."""

    metric: str
    sense: Literal["<=", ">="]
    bound: float


Bounds = Annotated[tuple[Constraint, ...], BeforeValidator(lambda value: _constraints(value))]


class GateSection(Section):
    """What a challenger must show beside a higher objective.

    The incumbent is the champion, or the best of the untuned base's controls before there is one.
    """

    control: bool = Field(
        True,
        description="The best of the untuned base's controls must be beaten too, and not a champion alone.",
    )
    subject_to: Bounds | None = Field(
        None,
        description="Bounds on the challenger's own figures, over the final examples; if not given, "
        "select.subject_to, and `forgetting <= 1` where that is evaluated.",
    )
    not_worse: dict[str, Annotated[float, Field(ge=0)]] | None = Field(
        None,
        description="Figures in which it may be worse than the incumbent by so much at most, in their unit; "
        "if not given, those of safety and form that are evaluated: refusal 0.05, pii 0.05, toxicity 0.02, "
        "repetition 0.1.",
    )
    at_most_times: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {"token_p50_ms": 2.0},
        description="Figures that may be so many times the champion's at most, where both were measured.",
    )


class SelectSection(Section):
    """How the winner is chosen and what a challenger must show."""

    maximise: str = "rougeL"
    subject_to: Bounds = ()
    tie_break: str | None = Field(
        "train_seconds",
        description="Of the best and those within one standard error of it, the one with the least of this "
        "figure wins; null for the best whatever it costs.",
    )
    gate: GateSection = GateSection()
    confidence: float = Field(
        0.95,
        gt=0.5,
        lt=1,
        description="Coverage of intervals. Of challengers that are no better the gate promotes at most what "
        "is missing of 1.",
    )
    resamples: int = Field(2000, ge=200)
    regression_margin: float = Field(
        0.02,
        ge=0,
        description="How much a challenger may lose on any one evaluation set, in the metric's unit.",
    )


class TrackingSection(Section):
    """MLflow. With no URI Regraft starts a server of its own on SQLite."""

    uri: str | None = None
    host: str = "127.0.0.1"
    port: int = Field(5000, ge=0, le=65535)


class ClusterSection(Section):
    """Ray. With no address Regraft starts a local cluster of its own."""

    address: str | None = Field(None, description="host:port of a cluster's GCS, or 'auto'.")
    jobs: str | None = Field(None, description="URL of the cluster's job server, such as http://head:8265.")
    num_cpus: int | None = Field(None, ge=1, description="Cores of the local cluster; all if not given.")
    num_gpus: int | None = Field(None, ge=0)
    dashboard_port: int = Field(8265, ge=0, le=65535)
    storage: str | None = Field(None, description="Folder or URI that all nodes reach, for Ray's own state.")
    autoscales: bool = Field(
        False,
        description="Nodes come when they are asked for: trials are handed out up to sweep.max_concurrent, "
        "whatever there is now, and wait for their node.",
    )
    prices: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {},
        description="Price of an hour of one CPU and of one GPU, or of accelerators by name: the dearest "
        "of several counts.",
    )


def _constraints(value: Any) -> Any:
    return [_constraint(v) for v in value] if isinstance(value, list | tuple) else value


def _constraint(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    for sense in ("<=", ">="):
        metric, found, bound = value.partition(sense)
        if found:
            return {"metric": metric.strip(), "sense": sense, "bound": bound.strip()}
    raise ValueError(f"{value!r} is not a bound; write for instance 'latency_p95_ms <= 4000'")
