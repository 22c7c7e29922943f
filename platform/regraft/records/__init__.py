"""Frozen records passed between the stages; each carries the id of the one before it.

This package knows no stage: only the shapes that flow along the line. Everything here serialises to JSON and
back without loss, so that a record can be an MLflow artifact, a line of a log, or a Ray argument.
"""

from regraft.records.base import Record, content_hash
from regraft.records.choice import (
    AnswerDifference,
    Comparison,
    GateCheck,
    Interval,
    Leaderboard,
    LeaderboardRow,
    ModelVersion,
    Parity,
    PathParity,
    Probe,
    PromotionDecision,
)
from regraft.records.data import DatasetVersion, Example, Message, Role
from regraft.records.evaluation import EvalReport, ExampleScore, Likelihood
from regraft.records.feedback import Feedback
from regraft.records.monitoring import (
    Action,
    AnswerLogprob,
    Attribution,
    DecisionOutcome,
    DescriptorChange,
    DriftKind,
    DriftReport,
    Evidence,
    QualitySignal,
    RetrainDecision,
    Shown,
    Side,
    TestResult,
    TopicChange,
)
from regraft.records.traffic import CapturedExchange
from regraft.records.trials import FIGURES, Cost, LossPoint, Speed, TrialResult, TrialStatus

__all__ = [
    "FIGURES",
    "Action",
    "AnswerDifference",
    "AnswerLogprob",
    "Attribution",
    "CapturedExchange",
    "Comparison",
    "Cost",
    "DatasetVersion",
    "DecisionOutcome",
    "DescriptorChange",
    "DriftKind",
    "DriftReport",
    "EvalReport",
    "Evidence",
    "Example",
    "ExampleScore",
    "Feedback",
    "GateCheck",
    "Interval",
    "Leaderboard",
    "LeaderboardRow",
    "Likelihood",
    "LossPoint",
    "Message",
    "ModelVersion",
    "Parity",
    "PathParity",
    "Probe",
    "PromotionDecision",
    "QualitySignal",
    "Record",
    "RetrainDecision",
    "Role",
    "Shown",
    "Side",
    "Speed",
    "TestResult",
    "TopicChange",
    "TrialResult",
    "TrialStatus",
    "content_hash",
]
