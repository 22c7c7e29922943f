"""Regraft's loop and transformers' Trainer on identical batches: speed is not bought with other gradients."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from regraft.methods import parse_method
from regraft.methods.base import trainable_parameters
from regraft.records import Example, LossPoint, Message
from regraft.training import loop as loops
from regraft.training.batches import Encoded, collate
from regraft.training.distributed import Workers
from regraft.training.encoding import encode
from regraft.training.loop import train
from regraft.training.steps import LoopSettings, plan_steps, share_of_rate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def rows(tiny_tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    chats = []
    for index in range(24):
        texts = [
            ("user", "Who pays? " * (1 + index % 5)),
            ("assistant", f"We do, {index}. " * (1 + index % 3)),
        ]
        turns = tuple(Message(role=r, content=t) for r, t in texts * (1 + index % 2))  # type: ignore[arg-type]
        chats.append(Example(id=str(index), messages=turns))
    return [encode(tiny_tokenizer, c, 500) for c in chats]


def trainer_run(model: Any, groups: list[list[list[Encoded]]], rate: float, folder: Path) -> list[float]:
    """The loss of each step; a step is a list of micro-batches."""
    losses: list[float] = []

    class Keep(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    class InOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(flat)

    flat = [group for step in groups for group in step]
    optimiser = torch.optim.AdamW(trainable_parameters(model), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: share_of_rate("linear", len(groups), 0.1, step)
    )
    arguments = TrainingArguments(
        str(folder), num_train_epochs=1, per_device_train_batch_size=1, logging_steps=1, report_to="none",
        gradient_accumulation_steps=len(groups[0]), max_grad_norm=1.0, save_strategy="no", disable_tqdm=True,
        remove_unused_columns=False, use_cpu=True,
    )  # fmt: skip
    InOrder(
        model, arguments, data_collator=lambda batch: collate(batch[0], 0).masked, train_dataset=flat,
        optimizers=(optimiser, schedule), callbacks=[Keep()],
    ).train()  # fmt: skip
    return losses


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "settings", [{"name": "lora", "rank": 4}, {"name": "full"}, {"name": "ia3"}], ids=lambda s: str(s["name"])
)
def test_losses_and_weights_are_those_of_the_trainer(
    settings: dict[str, object],
    accumulate: int,
    rows: list[Encoded],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Full fine-tuning trains under bf16 autocast; the comparison is in fp32.
    monkeypatch.setattr(loops, "autocast", lambda *_: torch.autocast("cpu", enabled=False))
    rate, weights, losses = 1e-3, [], []
    loop = LoopSettings(rate, 1.0, 256, accumulate=accumulate)
    plan = plan_steps(rows, loop, Workers())
    assert len(plan) >= 5
    assert all(len(step.groups) == accumulate for step in plan[:-1])
    plan = plan[: len(plan) - (len(plan[-1].groups) < accumulate)]  # a short last step is not Trainer's way
    for own in (True, False):
        method = parse_method(settings)
        base = method.load_base(tiny_model, "float32", "cpu")
        torch.manual_seed(0)
        model = method.apply(base)
        if own:
            monkeypatch.setattr(loops, "plan_steps", lambda *_: plan)
            points: list[LossPoint] = []
            held_out = rows[:1]
            each = loop._replace(evaluations=len(plan))
            train(model, base, rows, held_out, each, pad_id=0, device="cpu", report=points.append)
            losses.append([p.train_loss for p in points])
        else:
            losses.append(trainer_run(model, [list(s.groups) for s in plan], rate, tmp_path))
        weights.append([p.detach().clone() for p in trainable_parameters(model)])
    ours, theirs = losses
    assert len(ours) == len(theirs) == len(plan)
    assert ours == pytest.approx(theirs, abs=2e-5)
    assert ours[0] - min(ours) > 0.01  # something was learned: the curve is no flat line
    for a, b in zip(*weights, strict=True):
        # Adam divides by the gradient's own size: what is nearly nothing may turn its sign.
        assert float((a - b).abs().mean()) < 0.02 * rate
