"""Fine-tuning methods: one file a family; the union below is the registry.

To add a method, write one file with a subclass of `Method` and add it to `AnyMethod`: the configuration,
its schema, the sweep and the contract tests pick it up from here.
"""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field, TypeAdapter

from regraft.methods.adalora import AdaLoRA
from regraft.methods.base import Method
from regraft.methods.endpoint import Endpoint
from regraft.methods.few_shot import FewShot
from regraft.methods.full import Full
from regraft.methods.ia3 import IA3
from regraft.methods.lora import DoRA, LoRA, RsLoRA
from regraft.methods.lora_init import OLoRA, PiSSA
from regraft.methods.oft import OFT
from regraft.methods.p_tuning import PTuning
from regraft.methods.prefix_tuning import PrefixTuning
from regraft.methods.products import LoHa, LoKr
from regraft.methods.prompt_tuning import PromptTuning
from regraft.methods.qlora import QLoRA
from regraft.methods.vera import VeRA
from regraft.methods.zero_shot import ZeroShot

AnyMethod = Annotated[
    ZeroShot
    | FewShot
    | Endpoint
    | Full
    | LoRA
    | RsLoRA
    | DoRA
    | PiSSA
    | OLoRA
    | AdaLoRA
    | QLoRA
    | VeRA
    | OFT
    | IA3
    | LoHa
    | LoKr
    | PromptTuning
    | PTuning
    | PrefixTuning,
    Field(discriminator="name"),
]

METHOD_CLASSES: tuple[type[Method], ...] = get_args(get_args(AnyMethod)[0])
METHODS_BY_NAME: dict[str, type[Method]] = {str(c.model_fields["name"].default): c for c in METHOD_CLASSES}
_ADAPTER: TypeAdapter[Method] = TypeAdapter(AnyMethod)


def parse_method(settings: dict[str, object]) -> Method:
    """Build a method from its settings.

    Args:
        settings: `name` and any of that method's fields.

    Raises:
        pydantic.ValidationError: If the name or a field is unknown, or a value is out of range.
    """
    return _ADAPTER.validate_python(settings)


__all__ = [
    "IA3",
    "METHODS_BY_NAME",
    "METHOD_CLASSES",
    "OFT",
    "AdaLoRA",
    "AnyMethod",
    "DoRA",
    "Endpoint",
    "FewShot",
    "Full",
    "LoHa",
    "LoKr",
    "LoRA",
    "Method",
    "OLoRA",
    "PTuning",
    "PiSSA",
    "PrefixTuning",
    "PromptTuning",
    "QLoRA",
    "RsLoRA",
    "VeRA",
    "ZeroShot",
    "parse_method",
]
