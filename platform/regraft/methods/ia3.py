"""IA3: trained scales of keys, values and inner activations (Liu et al., arXiv:2205.05638)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from regraft.errors import InfeasibleTrialError
from regraft.methods.base import Support
from regraft.methods.tuner import TunerMethod, require_layers

if TYPE_CHECKING:
    from peft import IA3Config
    from torch import nn


class IA3(TunerMethod):
    """One scale a channel: the smallest adapter there is.

    Its quality hangs on the rate (PEFT's method comparison on GSM8K: 31 % to 45 % by rate alone).
    """

    kept_inputs: ClassVar[float] = 1.5
    support: ClassVar[Support] = Support(merges=True)  # PEFT's layers in four bits answer in fp32

    name: Literal["ia3"] = "ia3"
    learning_rate: float = Field(5e-2, gt=0, le=1)
    target_modules: str | tuple[str, ...] = Field(
        ("k_proj", "v_proj", "down_proj"), description="Names of the layers to scale."
    )
    feedforward_modules: tuple[str, ...] = Field(
        ("down_proj",), description="Those of them whose inputs are scaled, not their outputs."
    )

    def check_targets(self, base: nn.Module) -> None:
        """The inner layers have to be there too, and among the targets."""
        super().check_targets(base)
        if self.feedforward_modules:
            require_layers(base, "feedforward_modules", self.feedforward_modules)
        stray = set(self.feedforward_modules) - set(self.targets)
        if stray and not isinstance(self.targets, str):
            raise InfeasibleTrialError(
                f"feedforward_modules: {', '.join(sorted(stray))} is not among target_modules",
                "name in feedforward_modules some of target_modules, or none",
            )

    def peft_config(self) -> IA3Config:
        """Which layers' outputs are scaled, and of which the inputs."""
        from peft import IA3Config

        return IA3Config(
            target_modules=self.targets,
            feedforward_modules=list(self.feedforward_modules),
            task_type="CAUSAL_LM",
        )
