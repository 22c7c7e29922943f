"""Methods whose weights PEFT puts beside the base's own layers, and the layers that they name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from regraft.errors import InfeasibleTrialError
from regraft.methods.base import DTypeName, Support, trainable_to_fp32
from regraft.methods.quantised import OnAnyBase

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

#: The scale of an update: a number, the rank, or twice the rank. The words follow a rank that
#: is searched, so that LoRA's factor of alpha / rank stays.
Alpha = Annotated[int, Field(ge=1)] | Literal["rank", "double"]


def scale_of(alpha: Alpha, rank: int) -> int:
    """The number that an alpha stands for at a rank."""
    return {"rank": rank, "double": 2 * rank}[alpha] if isinstance(alpha, str) else alpha


class TunerMethod(OnAnyBase):
    """A method whose weights PEFT puts beside the base's own layers, and takes off again."""

    #: How often its forward keeps the adapted layers' inputs and outputs for the backward pass, each in the
    #: base's type; fitted to what `benchmarks/preflight.py` measures.
    kept_inputs: ClassVar[float] = 3.0
    kept_outputs: ClassVar[float] = 0.0
    #: Bytes kept for each of the adapted layers' own weights, where an update is made as large as they are.
    kept_weights: ClassVar[float] = 0.0
    support: ClassVar[Support] = Support(merges=True)

    target_modules: str | tuple[str, ...] = Field(
        "all-linear", description="Names of the layers to adapt, or all-linear: all but the output."
    )

    @property
    def targets(self) -> str | list[str]:
        """`target_modules` as PEFT takes them."""
        return self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)

    def peft_config(self) -> PeftConfig:
        """PEFT's configuration of this method."""
        raise NotImplementedError

    def check_targets(self, base: nn.Module) -> None:
        """Refuse names of layers that the base does not have.

        Args:
            base: The base model; on the meta device will do.

        Raises:
            InfeasibleTrialError: With the field, the names, and those there are.
        """
        require_layers(base, "target_modules", self.targets)

    def apply(self, base: nn.Module) -> nn.Module:
        """Put the trained weights beside the base's layers, in fp32."""
        from peft import get_peft_model

        self.check_targets(base)
        return trainable_to_fp32(get_peft_model(base, self.peft_config()))

    def release(self, model: nn.Module) -> nn.Module | None:
        """Take the trained weights off again; those of the base never changed."""
        base: nn.Module = model.unload()  # type: ignore[operator]
        if hasattr(base, "peft_config"):
            del base.peft_config
        return base.requires_grad_(False)

    def load_merged(self, base_path: Path, folder: Path, dtype: DTypeName, device: str) -> nn.Module | None:
        """Put the trained weights into the base's own.

        A base in four bits is taken out of them first and stays so: rounded to four bits again, the weights
        would lose most of what was trained (SmolLM2-135M: cross-entropy 2.70 → 4.19; merged in full, the
        answers' distribution is 0.003 nats away).
        """
        import torch

        base: Any = self.load_base(base_path, dtype, device)
        if self.quantised:
            base = base.dequantize(getattr(torch, dtype))
        model: Any = self.attach(base, folder)
        merged: nn.Module = model.merge_and_unload()
        if hasattr(merged, "peft_config"):
            del merged.peft_config
        return merged.requires_grad_(False).eval()


def require_layers(base: nn.Module, field: str, targets: str | Sequence[str]) -> None:
    """Refuse targets of which any names no layer; PEFT minds only if none of them does.

    Args:
        base: The base model.
        field: Where the targets stand.
        targets: Last parts of layers' names, or one regular expression for whole names, as PEFT takes them.

    Raises:
        InfeasibleTrialError: With the targets without a layer, and the names there are.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    output = base.get_output_embeddings()  # type: ignore[operator]
    layers = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding | Conv1D)
    }
    inner = {n for n, m in layers.items() if m is not output and not isinstance(m, torch.nn.Embedding)}
    there = ", ".join(sorted({name.rpartition(".")[2] for name in inner}))
    if isinstance(targets, str):
        missing = [] if _names_some(targets, layers, inner) else [targets]
        hint = "; one text is a regular expression for whole names, a list holds names"
    else:
        missing = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in layers)]
        missing, hint = missing or ([] if targets else ["(none)"]), ""
    if missing:
        raise InfeasibleTrialError(
            f"{field}: the base model has no layer {', '.join(missing)}; it has {there or 'no linear layers'}"
            + hint,
            f"name layers of this model in {field}, or all-linear",
        )


def _names_some(pattern: str, layers: Iterable[str], inner: Iterable[str]) -> bool:
    if pattern.lower() == "all-linear":
        return any(inner)
    try:
        return any(re.fullmatch(pattern, name) for name in layers)
    except re.error:
        return False
