"""What a method does in the training loop beside taking gradients. Most methods do nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class StepHooks:
    """The places where a method may take part in a run; this one takes part in none.

    The loop calls them on every worker, with the same gradients on each, so they must not draw random numbers
    that differ between workers.
    """

    def begin(self, steps: int) -> None:
        """Told before the first step how many there will be.

        Raises:
            regraft.errors.InfeasibleTrialError: If the method cannot do with so few.
        """

    def optimiser(self, groups: list[dict[str, Any]], rate: float) -> torch.optim.Optimizer | None:
        """An optimiser of the method's own choice over parameter groups; None for the loop's AdamW."""
        return None

    def penalty(self) -> torch.Tensor | None:
        """What is added to the mean loss of a step, with its gradients; None for nothing."""
        return None

    def after_step(self, step: int) -> None:
        """Called after the optimiser's step (from 1), while the gradients are still there."""

    def state(self) -> dict[str, torch.Tensor]:
        """What has to be kept beside weights and optimiser to go on exactly from here."""
        return {}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Take back what `state` gave."""
