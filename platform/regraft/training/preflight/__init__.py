"""What a trial will need, from configuration alone: memory, time, and how it fits."""

from regraft.training.preflight.fitting import CARDS, mend, micro_tokens, on_card
from regraft.training.preflight.memory import GIB, Batching, Memory, predict
from regraft.training.preflight.shapes import Shape, shape_of, trained_by
from regraft.training.preflight.timing import UTILISATION, flops_per_token, matmul_rate, seconds

__all__ = [
    "CARDS",
    "GIB",
    "UTILISATION",
    "Batching",
    "Memory",
    "Shape",
    "flops_per_token",
    "matmul_rate",
    "mend",
    "micro_tokens",
    "on_card",
    "predict",
    "seconds",
    "shape_of",
    "trained_by",
]
