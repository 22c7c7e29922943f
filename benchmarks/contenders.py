"""What `training.py` compares: each function prepares one way of training and gives a function that trains.

That function takes the rows to train on for one epoch and reports the tokens it computed, padding included.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from regraft.data.chats import read_chats
from regraft.methods import Method, parse_method
from regraft.models import load_tokenizer, pick_device, resolve
from regraft.training.batches import Encoded, bucket, collate
from regraft.training.encoding import encode
from regraft.training.loop import train
from regraft.training.memory import peak_gib
from regraft.training.steps import LoopSettings, share_of_rate

EXAMPLE = Path(__file__).parents[1] / "examples/utility-support/data/train.jsonl"

Run = Callable[[Sequence[Encoded]], dict[str, Any]]


class Workload(NamedTuple):
    """One model, one method, the same rows for all."""

    model: Path
    method: Method
    tokenizer: Any
    rows: list[Encoded]
    tokens_per_batch: int
    max_length: int
    device: str
    packing: bool
    micro_tokens: int = 0

    @classmethod
    def load(cls, settings: Any, make: Callable[..., list[Any]]) -> Workload:
        """Read the chats and encode them."""
        model = resolve(settings.model).path
        tokenizer = load_tokenizer(model)
        if settings.data:
            examples = read_chats(settings.data)[: settings.chats]
        else:
            source = read_chats(EXAMPLE)
            examples = make(source, settings.chats, settings.max_length, settings.seed, tokenizer)
        rows = [encode(tokenizer, e, settings.max_length) for e in examples]
        method = parse_method(json.loads(settings.method))
        device = pick_device("auto")
        return cls(
            model,
            method,
            tokenizer,
            rows,
            settings.tokens_per_batch,
            settings.max_length,
            device,
            not settings.padded,
            settings.micro_tokens,
        )

    @property
    def rows_per_batch(self) -> int:
        """Rows that come to the tokens of a batch on average, for those who count rows."""
        mean = sum(len(r.ids) for r in self.rows) / len(self.rows)
        return max(1, round(self.tokens_per_batch / mean))

    def prepared(self) -> tuple[Any, Any]:
        """The base and the model around it, with the same first weights for all."""
        import torch

        base = self.method.load_base(self.model, "bfloat16", self.device)
        torch.manual_seed(0)
        return base, self.method.apply(base)

    def peak_gib(self) -> float:
        """Of this process, or its CUDA device."""
        return peak_gib(self.device)


def regraft(work: Workload, folder: Path) -> Run:
    """Regraft's loop as a trial runs it."""
    base, model = work.prepared()

    def run(rows: Sequence[Encoded]) -> dict[str, Any]:
        settings = LoopSettings(
            work.method.learning_rate, 1.0, work.tokens_per_batch, evaluations=1, packing=work.packing,
            micro_tokens=work.micro_tokens,
        )  # fmt: skip
        # What a trial evaluates at its points is not training: one short row.
        held_out = [min(rows, key=lambda r: len(r.ids))]
        with counted(base) as tokens:
            train(
                model, base, rows, held_out, settings,
                pad_id=0, device=work.device, report=lambda _: None,
            )  # fmt: skip
        return {"computed": sum(tokens)}

    return run


def regraft_parity(work: Workload, folder: Path) -> Run:
    """Regraft's loop, with the loss of every step."""
    base, model = work.prepared()

    def run(rows: Sequence[Encoded]) -> dict[str, Any]:
        steps = len(bucket(rows, work.tokens_per_batch, rng=None))
        settings = LoopSettings(work.method.learning_rate, 1.0, work.tokens_per_batch, evaluations=steps)
        held_out = [min(rows, key=lambda r: len(r.ids))]
        done = train(
            model, base, rows, held_out, settings, pad_id=0, device=work.device, report=lambda _: None
        )
        return {"losses": [point.train_loss for point in done.points]}

    return run


def trainer(work: Workload, folder: Path) -> Run:
    """`transformers.Trainer` with rows at random, its own choice."""
    return _hugging_face(work, folder)


def trainer_grouped(work: Workload, folder: Path) -> Run:
    """`transformers.Trainer`, rows grouped by length; on small sets the option groups little."""
    return _hugging_face(work, folder, train_sampling_strategy="group_by_length")


def trainer_bucketed(work: Workload, folder: Path) -> Run:
    """`transformers.Trainer` handed Regraft's own batches, padded: what no option of its own gives."""
    from transformers import Trainer

    base, model = work.prepared()
    arguments = _arguments(folder, per_device_train_batch_size=1, learning_rate=work.method.learning_rate)

    def run(rows: Sequence[Encoded]) -> dict[str, Any]:
        groups = planned(rows, work)
        with counted(base) as tokens:
            Trainer(
                model,
                arguments,
                data_collator=lambda batch: collate(batch[0], 0).masked,
                train_dataset=groups,
            ).train()
        return {"computed": sum(tokens)}

    return run


def trainer_parity(work: Workload, folder: Path) -> Run:
    """`transformers.Trainer` on Regraft's own batches, in their order, with its schedule of rates."""
    import torch
    from transformers import Trainer, TrainerCallback

    _, model = work.prepared()

    def run(rows: Sequence[Encoded]) -> dict[str, Any]:
        groups = planned(rows, work)
        losses: list[float] = []

        class Keep(TrainerCallback):  # type: ignore[misc]
            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                if "loss" in logs:
                    losses.append(logs["loss"])

        optimiser = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=work.method.learning_rate, weight_decay=0.0
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: share_of_rate("linear", len(groups), 0.1, step)
        )

        class InOrder(Trainer):  # type: ignore[misc]
            def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
                return torch.utils.data.SequentialSampler(groups)

        InOrder(
            model,
            _arguments(folder, logging_steps=1, logging_strategy="steps", per_device_train_batch_size=1),
            data_collator=lambda batch: collate(batch[0], 0).masked,
            train_dataset=groups,
            optimizers=(optimiser, schedule),
            callbacks=[Keep()],
        ).train()
        return {"losses": losses}

    return run


def trl(work: Workload, folder: Path) -> Run:
    """TRL's `SFTTrainer` with packing, without gradient checkpointing: the fastest of its choices."""
    rows = max(1, work.tokens_per_batch // work.max_length)
    settings = _base_settings(work, packing=True, gradient_checkpointing=False)
    return _sft(work, folder, settings | {"per_device_train_batch_size": rows})


def trl_grouped(work: Workload, folder: Path) -> Run:
    """TRL with rows grouped by length, without gradient checkpointing."""
    settings = {"train_sampling_strategy": "group_by_length", "gradient_checkpointing": False}
    return _sft(work, folder, _base_settings(work, **settings))


def trl_default(work: Workload, folder: Path) -> Run:
    """TRL as it comes, gradient checkpointing included."""
    return _sft(work, folder, _base_settings(work))


def planned(rows: Sequence[Encoded], work: Workload) -> list[list[Encoded]]:
    """The batches of Regraft's first epoch, in its order."""
    from regraft.training.distributed import Workers
    from regraft.training.steps import plan_steps

    settings = LoopSettings(work.method.learning_rate, 1.0, work.tokens_per_batch)
    return [step.groups[0] for step in plan_steps(rows, settings, Workers())]


def _arguments(folder: Path, **changed: Any) -> Any:
    from transformers import TrainingArguments

    common = {"save_strategy": "no", "report_to": "none", "num_train_epochs": 1, "disable_tqdm": True}
    common |= {"logging_strategy": "no", "max_grad_norm": 1.0, "remove_unused_columns": False, "seed": 0}
    return TrainingArguments(str(folder), **(common | changed))


def _base_settings(work: Workload, **changed: Any) -> dict[str, Any]:
    common = {"save_strategy": "no", "report_to": "none", "num_train_epochs": 1, "disable_tqdm": True}
    common |= {"logging_strategy": "no", "learning_rate": work.method.learning_rate, "bf16": False}
    common |= {"per_device_train_batch_size": work.rows_per_batch, "max_length": work.max_length, "seed": 0}
    return common | changed


def _hugging_face(work: Workload, folder: Path, **changed: Any) -> Run:
    from transformers import DataCollatorForSeq2Seq, Trainer

    base, model = work.prepared()
    arguments = _arguments(
        folder,
        per_device_train_batch_size=work.rows_per_batch,
        learning_rate=work.method.learning_rate,
        **changed,
    )

    def run(rows: Sequence[Encoded]) -> dict[str, Any]:
        data = [{"input_ids": list(r.ids), "labels": list(r.labels)} for r in rows]
        collator = DataCollatorForSeq2Seq(work.tokenizer, padding=True)
        with counted(base) as tokens:
            Trainer(model, arguments, data_collator=collator, train_dataset=data).train()
        return {"computed": sum(tokens)}

    return run


def _sft(work: Workload, folder: Path, settings: dict[str, Any]) -> Run:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    base, model = work.prepared()

    def run(rows: Sequence[Encoded]) -> dict[str, Any]:
        data = Dataset.from_list([{"input_ids": list(r.ids), "labels": list(r.labels)} for r in rows])
        arguments = SFTConfig(str(folder), **settings)
        trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=work.tokenizer)
        with counted(base) as tokens:
            trainer.train()
        return {"computed": sum(tokens)}

    return run


@contextmanager
def counted(base: Any) -> Any:
    """Counts the positions that pass the embeddings."""
    tokens: list[int] = []
    hook = base.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: tokens.append(args[0].numel())
    )
    try:
        yield tokens
    finally:
        hook.remove()


CONTENDERS: dict[str, Callable[[Workload, Path], Run]] = {
    f.__name__: f
    for f in (
        regraft, trainer, trainer_grouped, trainer_bucketed, trl, trl_grouped, trl_default, regraft_parity,
        trainer_parity,
    )
}  # fmt: skip
