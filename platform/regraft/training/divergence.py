"""When a run is given up for diverged although its loss is still a number."""

from __future__ import annotations

import math
from collections import deque

from regraft.errors import InfeasibleTrialError

_SHARE = 0.1
_LEAST_STEPS = 8
_RISE_NATS = 2.0


class DivergenceWatch:
    """Watches the training loss of each step.

    Diverged is a run whose loss, over the last tenth of its steps, is both worse than guessing every token of
    the vocabulary alike and two nats above where it began, on average. Both are needed: a spike passes, so
    does a start that is worse than guessing, as that of random soft prompts may be.

    Args:
        total: Steps of the whole run.
        vocabulary: Tokens the model chooses among.
        first: The loss of the first step, where the run goes on from a checkpoint.
    """

    def __init__(self, total: int, vocabulary: int, first: float | None = None) -> None:
        self.first = first
        self._total, self._guessing = total, math.log(vocabulary)
        self._last: deque[float] = deque(maxlen=max(_LEAST_STEPS, math.ceil(total * _SHARE)))

    def see(self, step: int, loss: float) -> None:
        """Take a step's mean loss, in nats a supervised token.

        Raises:
            InfeasibleTrialError: If it is no number, or the run has diverged.
        """
        if not math.isfinite(loss):
            raise InfeasibleTrialError(f"diverged: the loss is {loss} at step {step} of {self._total}")
        if self.first is None:
            self.first = loss
        self._last.append(loss)
        mean = sum(self._last) / len(self._last)
        if len(self._last) == self._last.maxlen and mean > max(self._guessing, self.first + _RISE_NATS):
            raise InfeasibleTrialError(
                f"diverged: the loss of the last {len(self._last)} steps is {mean:.2f} on average at step "
                f"{step} of {self._total}; it began at {self.first:.2f}, and guessing gives "
                f"{self._guessing:.2f}"
            )
