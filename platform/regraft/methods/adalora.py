"""AdaLoRA: LoRA whose ranks are shared out while it trains (Zhang et al., arXiv:2303.10512)."""

from __future__ import annotations

import types
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from regraft.errors import InfeasibleTrialError
from regraft.methods.base import Support
from regraft.methods.hooks import StepHooks
from regraft.methods.tuner import Alpha, TunerMethod, scale_of

if TYPE_CHECKING:
    import torch
    from peft import AdaLoraConfig
    from torch import nn

_FEWEST_STEPS = 4


class AdaLoRA(TunerMethod):
    """Singular triplets on every layer, of which training keeps the more important ones.

    It is saved as plain LoRA, of the largest rank that a layer kept.
    """

    label_fields: ClassVar[tuple[str, ...]] = ("rank", "learning_rate")
    kept_outputs: ClassVar[float] = 2.7
    slowness: ClassVar[float] = 1.4
    support: ClassVar[Support] = Support(quantises=True, merges=True, mixes=True, plain_lora=True)

    name: Literal["adalora"] = "adalora"
    learning_rate: float = Field(1e-2, gt=0, le=1e-1)
    rank: int = Field(8, ge=1, le=1024, description="Triplets a layer, on average, at the end.")
    initial_rank: int | None = Field(
        None,
        ge=1,
        le=2048,
        description="Triplets of every layer at the start; 1.5 times the rank if not given.",
    )
    alpha: Alpha = Field(
        "double", description="Scale: a number, `rank`, or `double`, once or twice the initial rank."
    )
    dropout: float = Field(0.0, ge=0, lt=1)
    first_share: float = Field(0.1, ge=0, lt=1, description="Share of the run before ranks begin to fall.")
    last_share: float = Field(0.3, ge=0, lt=1, description="Share of the run with the ranks that are left.")
    orthogonality: float = Field(
        0.1, ge=0, description="Weight of the penalty that keeps the triplets orthogonal."
    )

    @property
    def start_rank(self) -> int:
        """Triplets of every layer at the start."""
        return max(self.rank, self.initial_rank or round(1.5 * self.rank))

    def peft_config(self) -> AdaLoraConfig:
        """The ranks; how many steps there will be is told later."""
        from peft import AdaLoraConfig

        return AdaLoraConfig(
            init_r=self.start_rank,
            target_r=self.rank,
            lora_alpha=scale_of(self.alpha, self.start_rank),
            lora_dropout=self.dropout,
            orth_reg_weight=self.orthogonality,
            total_step=_FEWEST_STEPS,
            target_modules=self.targets,
            task_type="CAUSAL_LM",
        )

    def apply(self, base: nn.Module) -> nn.Module:
        """Put the triplets beside the layers, in fp32."""
        model: Any = super().apply(base)
        for layer in _layers(model).values():
            # On a base in bf16 PEFT 0.21 makes the number it divides by a trained parameter.
            layer.ranknum["default"].requires_grad_(False)
        tuner = model.base_model
        # PEFT's forward adds the penalty to every loss; here it belongs to a step, whatever its
        # micro-batches.
        tuner.forward = types.MethodType(lambda self, *args, **kwargs: self.model(*args, **kwargs), tuner)
        return model  # type: ignore[no-any-return]

    def hooks(self, model: nn.Module) -> StepHooks:
        """The budget of ranks, and the penalty."""
        return _Budget(model, self)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write plain LoRA: the triplets that are left, scaled, with zeros where a layer kept fewer."""
        import torch
        from peft import LoraConfig
        from safetensors.torch import save_file

        layers = _layers(model)
        kept = {name: torch.nonzero(m.lora_E["default"].flatten()).flatten() for name, m in layers.items()}
        rank = max(1, *map(len, kept.values()))
        tensors: dict[str, torch.Tensor] = {}
        for name, layer in layers.items():
            a, b, e = (getattr(layer, f"lora_{part}")["default"].detach() for part in "ABE")
            scale = layer.scaling["default"] / (layer.ranknum["default"] + 1e-5)  # as PEFT's own forward
            rows = kept[name].to(a.device)
            low, high = a.new_zeros(rank, a.shape[1]), b.new_zeros(b.shape[0], rank)
            low[: len(rows)] = (a * e * scale)[rows]
            high[:, : len(rows)] = b[:, rows]
            tensors[f"base_model.model.{name}.lora_A.weight"] = low.cpu()
            tensors[f"base_model.model.{name}.lora_B.weight"] = high.cpu()
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=self.targets,
            task_type="CAUSAL_LM",
            inference_mode=True,
            base_model_name_or_path=model.peft_config["default"].base_model_name_or_path,  # type: ignore[index, union-attr]
        ).save_pretrained(str(folder))


class _Budget(StepHooks):
    """PEFT's allocator of ranks, told of every step."""

    def __init__(self, model: Any, method: AdaLoRA) -> None:
        self._tuner = model.base_model
        self._config = model.peft_config["default"]
        self._allocator = self._tuner.rankallocator
        self._method = method

    def begin(self, steps: int) -> None:
        """Lay the phases over the run: all ranks, falling ranks, what is left."""
        if steps < _FEWEST_STEPS:
            raise InfeasibleTrialError(
                f"adalora: {steps} steps are too few to share out ranks, it takes {_FEWEST_STEPS}",
                "raise sweep.epochs, or lower sweep.tokens_per_batch or sweep.accumulate",
            )
        first = int(self._method.first_share * steps)
        last = min(int(self._method.last_share * steps), steps - first - 2)
        self._allocator.set_total_step(steps)
        self._config.tinit, self._config.tfinal = first, max(0, last)

    def penalty(self) -> torch.Tensor | None:
        """How far the triplets are from orthogonal: the mean Frobenius norm, weighted (section 3.2)."""
        import torch

        if not self._method.orthogonality:
            return None
        norms = []
        for layer in _layers(self._tuner.model).values():
            a, b = layer.lora_A["default"], layer.lora_B["default"]
            norms += [
                torch.linalg.matrix_norm(p - torch.eye(len(p), device=p.device)) for p in (a @ a.T, b.T @ b)
            ]
        return self._method.orthogonality * torch.stack(norms).mean()

    def after_step(self, step: int) -> None:
        """Weigh the triplets by this step's gradients, and take away what is over the budget."""
        self._tuner.update_and_allocate(step)

    def state(self) -> dict[str, torch.Tensor]:
        """The averages that importance is judged by, and the triplets that are left."""
        import torch

        found = {
            f"{kind}/{name}": value
            for kind in ("ipt", "exp_avg_ipt", "exp_avg_unc")
            for name, value in getattr(self._allocator, kind).items()
        }
        pattern = self._config.rank_pattern or {}
        return found | {f"pattern/{name}": torch.tensor(kept) for name, kept in pattern.items()}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Take them back."""
        pattern: dict[str, list[bool]] = {}
        for key, value in state.items():
            kind, name = key.split("/", 1)
            if kind == "pattern":
                pattern[name] = value.tolist()
            else:
                getattr(self._allocator, kind)[name] = value
        self._config.rank_pattern = pattern or None


def _layers(model: Any) -> dict[str, Any]:
    """The adapted layers by their names in the base."""
    found = {name: m for name, m in model.named_modules() if hasattr(m, "lora_E") and "default" in m.lora_E}
    return {name.removeprefix("base_model.model."): m for name, m in found.items()}
