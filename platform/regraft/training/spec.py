"""What a trial is: everything that decides its result, and where it is recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regraft.config import EvaluateSection, ModelSection, SweepSection
from regraft.methods import Method, parse_method
from regraft.records import Record, TrialResult, TrialStatus, content_hash

#: Raised whenever a change to training or evaluation makes earlier trials incomparable.
TRIAL_VERSION = 5


class TrialSpec(Record):
    """Everything that makes a trial what it is, and where it is to be recorded."""

    sweep_id: str
    sweep_run_id: str
    experiment: str
    tracking_uri: str
    method: dict[str, Any]
    model: ModelSection
    base_revision: str
    dataset_id: str
    sweep: SweepSection
    evaluate: EvaluateSection
    storage: str = ""
    repeat_of: str = ""
    #: The most that passes through at once, in tokens, after memory ran out; a step stays the same. 0: whole.
    micro_tokens: int = 0
    #: Whether the search goes by latency: then it is measured in the trial too, beside whatever else runs.
    timed: bool = False
    #: Of all that the trial holds.
    price_per_hour: float = 0.0

    @property
    def parsed(self) -> Method:
        """The method itself."""
        return parse_method(self.method)

    @property
    def key(self) -> str:
        """Hash of what decides the result. A finished trial with this key is never run again."""
        decisive = {
            "epochs",
            "tokens_per_batch",
            "max_length",
            "too_long",
            "warmup_fraction",
            "max_gradient_norm",
            "seed",
            "accumulate",
            "schedule",
            "weight_decay",
            "packing",
        }
        decisive |= {"workers_per_trial", "evaluations", "loss_examples"}
        if self.sweep.shard:  # layers travel in bf16
            decisive.add("shard")
        return content_hash(
            {
                "version": TRIAL_VERSION,
                "method": self.method,
                "base": [self.base_revision, self.model.dtype],
                "dataset": self.dataset_id,
                "sweep": self.sweep.model_dump(mode="json", include=decisive),
                "evaluate": self.evaluate.model_dump(mode="json", exclude={"metrics", "finals"}),
                "scores": self.evaluate.asked,
            }
        )

    @property
    def params(self) -> dict[str, Any]:
        """What people compare trials by: `method`, its fields, and the base model."""
        fields = {("method" if k == "name" else k): v for k, v in self.method.items()}
        fields.setdefault("learning_rate", 0.0)  # the control's: a chart leaves out runs that lack an axis
        return fields | {"base_model": self.model.source, "base_revision": self.base_revision}

    def result(self, status: TrialStatus, reason: str = "", **known: Any) -> TrialResult:
        """A record of this trial, with whatever else is known of it."""
        return TrialResult(
            key=self.key,
            sweep_id=self.sweep_id,
            run_id=known.pop("run_id", ""),
            label=self.parsed.label,
            method=self.method,
            base_model=self.model.source,
            base_revision=self.base_revision,
            dataset_id=self.dataset_id,
            status=status,
            reason=reason,
            seed=self.sweep.seed,
            repeat_of=self.repeat_of,
            **known,
        )

    @property
    def named(self) -> str:
        """The label, with the seed where it is not 0."""
        seed = f" seed={self.sweep.seed}" if self.sweep.seed else ""
        return self.parsed.label + seed

    def with_less(self, tokens: int | None) -> TrialSpec | None:
        """The same trial in smaller micro-batches; None if it was tried so before, or cannot be.

        Args:
            tokens: The micro-batch; half of a batch, if that holds the longest row, where nobody knows.
        """
        if tokens is None:
            half = self.sweep.tokens_per_batch // 2
            tokens = half if self.parsed.trains and half >= self.sweep.max_length else 0
        if not tokens or self.micro_tokens:
            return None
        return self.model_copy(update={"micro_tokens": tokens})

    @property
    def hang_note(self) -> Path | None:
        """Where a process that hangs leaves its stacks: in the storage, where that is a folder."""
        if not self.storage or "://" in self.storage:
            return None
        return Path(self.storage) / "hangs" / f"{self.key}.txt"

    @property
    def points(self) -> int:
        """Progress points of a whole trial: the evaluations, and the end."""
        return self.sweep.evaluations + 1
