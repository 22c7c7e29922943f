"""One YAML, one model: `Experiment` and its sections.

Reading a file checks all of it before anything starts; an error names the field, the file and the line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from regraft.errors import ConfigError
from regraft.explain import did_you_mean, dotted, explain, explain_method, place
from regraft.monitor_sections import MonitorSection, QualitySection, RetrainSection, WebhookSection
from regraft.records import FIGURES
from regraft.search import SearchError, expand
from regraft.section import Section
from regraft.sections import (
    BudgetSection,
    ClusterSection,
    Constraint,
    DataSection,
    DevicesSection,
    EvaluateSection,
    FinalistsSection,
    GateSection,
    LeaveSection,
    ModelSection,
    SelectSection,
    SweepSection,
    TrackingSection,
)
from regraft.serve_sections import ServeSection

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"

__all__ = [
    "BudgetSection",
    "ClusterSection",
    "Constraint",
    "DataSection",
    "DevicesSection",
    "EvaluateSection",
    "Experiment",
    "FinalistsSection",
    "GateSection",
    "LeaveSection",
    "ModelSection",
    "MonitorSection",
    "QualitySection",
    "RetrainSection",
    "Section",
    "SelectSection",
    "ServeSection",
    "SweepSection",
    "TrackingSection",
    "WebhookSection",
    "experiment_file",
]


def experiment_file(path: Path) -> Path:
    """The file of an experiment, given that or its folder."""
    return path / "regraft.yaml" if path.is_dir() else path


class Experiment(Section):
    """Everything about one model that is kept good: `regraft.yaml`."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    model: ModelSection
    data: DataSection
    sweep: SweepSection
    evaluate: EvaluateSection = EvaluateSection()
    select: SelectSection = SelectSection()
    serve: ServeSection = ServeSection()
    monitor: MonitorSection = MonitorSection()
    retrain: RetrainSection = RetrainSection()
    tracking: TrackingSection = TrackingSection()
    cluster: ClusterSection = ClusterSection()

    @property
    def directions(self) -> dict[str, str]:
        """Which way each recorded figure is better: `higher`, `lower`, or empty for neither."""
        found = dict.fromkeys([*FIGURES, "eval_loss"], "lower") | {
            "tokens_seen": "",
            "tokens_per_second": "higher",
        }
        outputs = (out for metric in self.evaluate.metrics for out in (*metric.outputs, *metric.wholes))
        return found | {out.name: out.better for out in outputs}

    @model_validator(mode="after")
    def _known_metrics(self) -> Experiment:
        directions, select = self.directions, self.select
        names = sorted(out.name for metric in self.evaluate.metrics for out in metric.outputs)
        if select.maximise not in names:
            raise ValueError(f"select.maximise: is {select.maximise!r}, but evaluate.metrics gives {names}")
        if directions[select.maximise] != "higher":
            raise ValueError(
                f"select.maximise: of {select.maximise!r} more is not better; bound it in select.subject_to"
            )
        bounds = {
            "select.subject_to": select.subject_to,
            "select.gate.subject_to": select.gate.subject_to or (),
        }
        used = {f"{where}.{i}": c.metric for where, own in bounds.items() for i, c in enumerate(own)}
        for aim in ("minimise", "maximise"):
            used |= {f"sweep.search.{aim}.{i}": n for i, n in enumerate(getattr(self.sweep.search, aim, ()))}
        falling = {f"select.gate.at_most_times.{name}": name for name in select.gate.at_most_times}
        falling |= {"select.tie_break": select.tie_break} if select.tie_break else {}
        used |= falling | {f"select.gate.not_worse.{name}": name for name in select.gate.not_worse or ()}
        for where, name in used.items():
            if name not in directions:
                hint = did_you_mean(name, directions) or f"; there are {sorted(directions)}"
                raise ValueError(f"{where}: no trial records {name!r}{hint}")
            if where in falling and directions[name] != "lower":
                raise ValueError(f"{where}: of {name!r} less is not better")
            if "not_worse" in where and not directions[name]:
                raise ValueError(f"{where}: neither more nor less of {name!r} is better")
        return self

    @model_validator(mode="after")
    def _priced(self) -> Experiment:
        if self.sweep.budget.money is not None and not self.cluster.prices:
            raise ValueError("sweep.budget.money: needs cluster.prices, as {CPU: 0.05, GPU: 2.0} an hour")
        return self

    @model_validator(mode="after")
    def _bounded(self) -> Experiment:
        if self.cluster.autoscales and self.sweep.max_concurrent is None:
            raise ValueError(
                "cluster.autoscales: needs sweep.max_concurrent: how many trials may run at once"
            )
        return self

    @classmethod
    def load(cls, path: Path | str) -> Experiment:
        """Read and check an experiment file; its relative paths become absolute.

        Raises:
            ConfigError: If the file is missing, is not YAML, or has a wrong key or value. The message names
                the line and the field.
        """
        path = experiment_file(Path(path))
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}", "give the path of a regraft.yaml") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: byte {error.start} is not UTF-8", "save the file as UTF-8") from error
        try:
            tree = yaml.compose(text, Loader=yaml.SafeLoader)
            raw = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not valid YAML: {error}", "mend the syntax at that line") from error
        if not isinstance(raw, dict):
            raise ConfigError(
                f"{path}: the top level must be a mapping", "start from examples/utility-support/regraft.yaml"
            )
        try:
            experiment = cls.model_validate(raw, context={"folder": path.resolve().parent})
        except ValidationError as error:
            raise explain(path, tree, error, cls) from error
        experiment._check_methods(path, tree)
        return experiment.resolved(path.resolve().parent)

    def resolved(self, folder: Path) -> Experiment:
        """The same experiment with its relative paths taken from `folder`."""

        def absolute(value: Path) -> Path:
            return value if value.is_absolute() else folder / value

        data = self.data.model_copy(
            update={
                "train": tuple(absolute(p) for p in self.data.train),
                "evaluation": {k: absolute(p) for k, p in self.data.evaluation.items()},
            }
        )
        retrain = self.retrain.model_copy(
            update={
                "reviewed": absolute(self.retrain.reviewed) if self.retrain.reviewed else None,
                "evaluation": {k: absolute(p) for k, p in self.retrain.evaluation.items()},
            }
        )
        metrics = tuple(
            metric.model_copy(update={k: absolute(v) for k, v in metric if isinstance(v, Path)})
            for metric in self.evaluate.metrics
        )
        evaluate = self.evaluate.model_copy(update={"metrics": metrics})
        model = self.model
        if (folder / model.source).is_dir():
            model = model.model_copy(update={"source": str((folder / model.source).resolve())})
        return self.model_copy(
            update={"data": data, "retrain": retrain, "evaluate": evaluate, "model": model}
        )

    def _check_methods(self, path: Path, tree: Any) -> None:
        for index, entry in enumerate(self.sweep.methods):
            where = ("sweep", "methods", index)
            try:
                expand(entry, samples=self.sweep.samples, seed=self.sweep.seed)
            except SearchError as error:
                raise ConfigError(
                    f"{place(path, tree, (*where, error.field))}: {dotted((*where, error.field))}: {error}",
                    "see docs/configuration.md for values, lists and ranges",
                ) from error
            except ValidationError as error:
                raise explain_method(path, tree, where, entry, error) from error
        known = {arm.method for arm in self.sweep.arms}
        for field in ("ray_train", "devices"):
            for name in getattr(self.sweep, field):
                if name not in known:
                    raise ConfigError(
                        f"{place(path, tree, ('sweep', field))}: sweep.{field}: {name!r} is not swept",
                        f"name one of {sorted(known)}",
                    )
