"""What every fine-tuning method is: settings and behaviour in one frozen class.

This module knows torch and transformers only inside functions, so that configurations can be read and
checked without loading either.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from regraft.errors import ModelError
from regraft.methods.hooks import StepHooks
from regraft.records import Example, Message

if TYPE_CHECKING:
    import torch
    from torch import nn

Kind = Literal["control", "full", "adapter"]
DTypeName = Literal["bfloat16", "float32"]


class Support(NamedTuple):
    """What can be done with a method beside training and answering; `tests/core/test_support.py` tries it.

    Attributes:
        quantises: It trains on a base held in four bits as on the same values held in full.
        merges: Its adapter goes into the base's weights without a change of what the model says.
        mixes: Rows of one batch may each take their own adapter (PEFT's `adapter_names`).
        plain_lora: Its files are LoRA's, which engines with LoRA kernels (vLLM) take.
        replicas: It trains on several workers that hold a copy each (DDP).
        shards: It trains with the weights split over several workers (FSDP2).
        packs: Several examples may share a row in training, each seeing itself alone.
        recomputes: Its activations may be computed again in the backward pass.
    """

    quantises: bool = False
    merges: bool = False
    mixes: bool = False
    plain_lora: bool = False
    replicas: bool = True
    shards: bool = True
    packs: bool = True
    recomputes: bool = True


class Method(BaseModel):
    """One way of fine-tuning (or of not doing so). Subclasses add a `name` literal and their fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ClassVar[Kind] = "adapter"
    support: ClassVar[Support] = Support()
    #: Whether its answers come from an endpoint, so that no base is loaded here.
    remote: ClassVar[bool] = False
    #: Whether `release` gives the base back as it was before training.
    keeps_base: ClassVar[bool] = True
    #: Time of a step by its count of operations, beside LoRA's; measured by `benchmarks/preflight.py` on a
    #: CPU.
    slowness: ClassVar[float] = 1.0
    #: Fields that make up the short label of a trial, in order.
    label_fields: ClassVar[tuple[str, ...]] = ("learning_rate",)

    name: str
    learning_rate: float = Field(gt=0, le=10)

    @property
    def trains(self) -> bool:
        """Whether there is anything to train."""
        return self.kind != "control"

    @property
    def row_tokens(self) -> int:
        """Positions that the method adds to every row."""
        return 0

    @property
    def quantised(self) -> bool:
        """Whether the base is held in fewer bits than `model.dtype` has."""
        return False

    @property
    def label(self) -> str:
        """A short name for tables and run lists, such as `lora rank=8 lr=0.001`."""
        short = {"learning_rate": "lr", "virtual_tokens": "tokens"}
        parts = [f"{short.get(f, f)}={getattr(self, f):g}" for f in self.label_fields]
        return " ".join([self.name, *parts])

    def hooks(self, model: nn.Module) -> StepHooks:
        """What this method does in the loop, to a model that `apply` made, beside taking gradients."""
        return StepHooks()

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

    def load_merged(self, base_path: Path, folder: Path, dtype: DTypeName, device: str) -> nn.Module | None:
        """Load one plain model that answers alone, what was trained being in its weights.

        Returns:
            A transformers model in `dtype`; None if the method trains nothing that weights could take in.
        """
        return None


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
