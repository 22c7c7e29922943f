"""What every fine-tuning method is: settings and behaviour in one frozen class.

This module knows torch and transformers only inside functions, so that configurations can be read and
checked without loading either.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from regraft.errors import InfeasibleTrialError, ModelError
from regraft.records import Example, Message

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from torch import nn

Kind = Literal["control", "full", "adapter"]
DTypeName = Literal["bfloat16", "float32"]


class Support(NamedTuple):
    """What can be done with a method beside training and answering; `tests/core/test_support.py` tries it.

    Attributes:
        merges: Its adapter goes into the base's weights without a change of what the model says.
        mixes: Rows of one batch may each take their own adapter (PEFT's `adapter_names`).
        plain_lora: Its files are LoRA's, which engines with LoRA kernels (vLLM) take.
        replicas: It trains on several workers that hold a copy each (DDP).
        shards: It trains with the weights split over several workers (FSDP2).
    """

    merges: bool = False
    mixes: bool = False
    plain_lora: bool = False
    replicas: bool = True
    shards: bool = True


class Method(BaseModel):
    """One way of fine-tuning (or of not doing so). Subclasses add a `name` literal and their fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ClassVar[Kind] = "adapter"
    quantised: ClassVar[bool] = False
    support: ClassVar[Support] = Support()
    #: Whether `release` gives the base back as it was before training.
    keeps_base: ClassVar[bool] = True
    #: Fields that make up the short label of a trial, in order.
    label_fields: ClassVar[tuple[str, ...]] = ("learning_rate",)

    name: str
    learning_rate: float = Field(gt=0, le=10)

    @property
    def trains(self) -> bool:
        """Whether there is anything to train."""
        return self.kind != "control"

    @property
    def label(self) -> str:
        """A short name for tables and run lists, such as `lora rank=8 lr=0.001`."""
        short = {"learning_rate": "lr", "virtual_tokens": "tokens"}
        parts = [f"{short.get(f, f)}={getattr(self, f):g}" for f in self.label_fields]
        return " ".join([self.name, *parts])

    def shown(self, train: Sequence[Example]) -> tuple[Message, ...]:
        """Turns to show before every prompt, taken from the training split; none for most methods."""
        return ()

    def load_base(self, path: Path, dtype: DTypeName, device: str) -> nn.Module:
        """Load the base model this method starts from, in evaluation mode and frozen.

        Args:
            path: Folder with a transformers model in safetensors.
            dtype: Type of the frozen weights.
            device: A torch device string.

        Raises:
            regraft.errors.InfeasibleTrialError: If this method cannot run on the device.
        """
        return load_causal_lm(path, dtype, device)

    def apply(self, base: nn.Module) -> nn.Module:
        """Make the base trainable by this method; the base may be changed in place."""
        raise NotImplementedError

    def release(self, model: nn.Module) -> nn.Module | None:
        """Give back the clean base from a model that `apply` made, or None if it is no longer clean."""
        raise NotImplementedError

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write what was trained as plain files (safetensors) into `folder`."""
        model.save_pretrained(folder, safe_serialization=True)  # type: ignore[operator]

    def attach(self, base: nn.Module, folder: Path) -> nn.Module:
        """Load what `save` wrote onto a clean base from `load_base`, for inference."""
        from peft import PeftModel

        if (folder / "adapter_model.bin").exists():
            raise ValueError(f"{folder} holds a pickled adapter; adapters load from safetensors only")
        return PeftModel.from_pretrained(base, str(folder), is_trainable=False).eval()  # type: ignore[no-any-return]

    def load(self, base_path: Path, folder: Path | None, dtype: DTypeName, device: str) -> nn.Module:
        """Load a model ready to answer: the base, with what was trained on top.

        Evaluation and serving both come through here: what was evaluated is what is served.
        """
        base = self.load_base(base_path, dtype, device)
        return base if folder is None else self.attach(base, folder)


class TunerMethod(Method):
    """A method whose weights PEFT puts beside the base's own layers, and takes off again."""

    #: How often its forward keeps the adapted layers' inputs and outputs for the backward pass, each in the
    #: base's type; fitted to what `benchmarks/preflight.py` measures.
    kept_inputs: ClassVar[float] = 3.0
    kept_outputs: ClassVar[float] = 0.0
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


def empty_causal_lm(path: Path) -> nn.Module:
    """The layers of a model without their weights, on the meta device: costs nothing, computes nothing.

    Raises:
        ModelError: If transformers cannot build the model of `config.json`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}/config.json: transformers cannot build this model: {str(error).splitlines()[0]}",
            "check model.source and the version of transformers",
        ) from error


def load_causal_lm(path: Path, dtype: DTypeName, device: str, **kwargs: Any) -> nn.Module:
    """Load a causal language model from a local folder of safetensors, frozen and in evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True, **kwargs
    )
    if "quantization_config" not in kwargs:
        model = model.to(device)
    model.requires_grad_(False)
    return model.eval()  # type: ignore[no-any-return]


def trainable_to_fp32(model: nn.Module) -> nn.Module:
    """Hold trainable weights in fp32: bf16 has too few digits for small updates to add up."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def trainable_parameters(model: nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that a trial updates."""
    return [p for p in model.parameters() if p.requires_grad]
