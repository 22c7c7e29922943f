"""The training loop, in plain torch: it knows no Ray, no MLflow and no method.

It takes a model whose trainable parameters are marked, and reports through a function it is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

from regraft.methods.base import trainable_parameters
from regraft.methods.hooks import StepHooks
from regraft.records import LossPoint
from regraft.training.batches import Batch, Encoded, bucket, collate, pack, require_supervised
from regraft.training.checkpoints import Checkpoints, Progress
from regraft.training.distributed import Workers
from regraft.training.divergence import DivergenceWatch
from regraft.training.kernels import fast_kernels
from regraft.training.loss import supervised_positions_only
from regraft.training.memory import freed_memory_kept
from regraft.training.modes import autocast, checkpointing, compiled
from regraft.training.packing import may_share, require_packable
from regraft.training.sharding import gather, is_sharded, shard
from regraft.training.steps import LoopSettings, make_optimiser, plan_steps, set_rate
from regraft.watchdog import alive

if TYPE_CHECKING:
    from torch import nn

Report = Callable[[LossPoint], None]
Probe = Callable[[], dict[str, float]]


class Layout(NamedTuple):
    """How a group of examples becomes tensors, and where.

    Attributes:
        device: Where they go.
        pad_id: Token id of the padding.
        packed: Whether the examples share one row.
        share: Whether what they begin with alike stands in it once.
    """

    device: str
    pad_id: int
    packed: bool = False
    share: bool = False

    def batch(self, group: Sequence[Encoded]) -> Batch:
        """The group on the device."""
        made = pack(group, share=self.share) if self.packed else collate(group, self.pad_id)
        return made.to(self.device)


class Outcome(NamedTuple):
    """What training came to."""

    points: tuple[LossPoint, ...]
    tokens_seen: int
    seconds: float

    @property
    def eval_loss(self) -> float | None:
        """The last evaluation loss, in nats a supervised token."""
        return next((p.eval_loss for p in reversed(self.points) if p.eval_loss is not None), None)


def train(
    model: nn.Module,
    base: nn.Module,
    train_set: Sequence[Encoded],
    evaluation_set: Sequence[Encoded],
    settings: LoopSettings,
    *,
    pad_id: int,
    device: str,
    report: Report,
    workers: Workers = Workers(),  # noqa: B008
    checkpoints: Checkpoints | None = None,
    probe: Probe | None = None,
    hooks: StepHooks = StepHooks(),  # noqa: B008
) -> Outcome:
    """Train the parameters that require gradients.

    Each step's loss is the sum over the step's supervised tokens, of all workers, over their number: a token
    counts the same whatever batch it falls into. AdamW, linear warm-up, then the schedule.

    Args:
        model: What is called, in training mode afterwards: the base itself or a PEFT model around it.
        base: The transformers model inside.
        train_set: Training examples.
        evaluation_set: Examples for the evaluation loss.
        settings: How to train.
        pad_id: Token id of the padding.
        device: Where the model is.
        report: Called on every worker after each evaluation; may raise to stop the trial.
        workers: This process's place among its peers.
        checkpoints: Where to go on from, and to keep the state; the first worker writes. What was reported
            before a crash is reported again.
        probe: Scores the model at each evaluation, in evaluation mode; its time is not counted, and other
            workers wait for it.
        hooks: What the method does beside taking gradients.

    Raises:
        InfeasibleTrialError: If the run diverges, or there is nothing to train or evaluate on.
    """
    import torch

    require_supervised(evaluation_set, "evaluate")
    layout = _layout(model, base, train_set, settings, pad_id, device)
    shard(model, base, device, workers)  # before anything holds on to a parameter
    parameters = trainable_parameters(model)
    plan = plan_steps(train_set, settings, workers)
    total = len(plan)
    hooks.begin(total)
    optimiser = make_optimiser(parameters, settings, hooks)
    marks = {round(total * (i + 1) / settings.evaluations) for i in range(settings.evaluations)}
    points: list[LossPoint] = []
    seen, since_loss, since_tokens, started, paused = 0, 0.0, 0, time.monotonic(), 0.0
    done = checkpoints.restore(model, optimiser, total, device, hooks) if checkpoints else None
    first = 1 + (done.step if done else 0)
    if done is not None:
        seen, since_loss, since_tokens = done.tokens_seen, done.loss_sum, done.loss_tokens
        started -= done.seconds
        for point in done.points:
            points.append(point)
            report(point)
    watch = DivergenceWatch(total, _vocabulary(base), done.first_loss if done else None)
    precision = autocast(model, device)
    with (
        supervised_positions_only(base),
        fast_kernels(base, device, packed=settings.packing),
        checkpointing(base, settings.gradient_checkpointing),
        compiled(base, settings.compile),
        freed_memory_kept(device),
    ):
        wrapped = model if workers.shard else workers.wrap(model)
        for step, (groups, token_sum, tokens) in enumerate(plan[first - 1 :], start=first):
            wrapped.train()
            rate = set_rate(optimiser, settings, total, step)
            # Random numbers follow from the step and the micro-batch's place in it: neither from when it was
            # reached, nor from who works on it.
            first_seed = settings.seed * 2**40 + step * 2**16 + workers.rank
            batches = (layout.batch(group) for group in groups)
            # Gradients are averaged over workers; the division is by the tokens of all of them.
            loss_here = _gradients(
                wrapped, batches, len(groups), precision, workers.size / token_sum,
                range(first_seed, 2**63, workers.size), hooks,
            )  # fmt: skip
            workers.average_gradients([p for p in parameters if not is_sharded(p)])
            loss_sum = workers.total(loss_here)
            watch.see(step, loss_sum / token_sum)
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_gradient_norm)
            optimiser.step()
            hooks.after_step(step)
            optimiser.zero_grad(set_to_none=True)
            seen += tokens
            since_loss, since_tokens = since_loss + loss_sum, since_tokens + token_sum
            if step in marks:
                pause = time.monotonic()
                point = LossPoint(
                    step=step,
                    tokens_seen=seen,
                    train_loss=since_loss / since_tokens,
                    eval_loss=evaluation_loss(
                        model,
                        evaluation_set,
                        settings.micro_tokens or settings.tokens_per_batch,
                        layout,
                        workers,
                    ),
                    learning_rate=rate,
                    scores=_scores(probe, model, device) if probe else {},
                )
                since_loss, since_tokens = 0.0, 0
                points.append(point)
                report(point)
                paused += time.monotonic() - pause
            if checkpoints and step < total and checkpoints.due:
                seconds = time.monotonic() - started - paused
                counters = (step, total, seen, since_loss, since_tokens, seconds, tuple(points), watch.first)
                checkpoints.save(model, optimiser, Progress(*counters), hooks)
    gather(model, keep=workers.rank == 0)
    return Outcome(tuple(points), seen, time.monotonic() - started - paused)


def _scores(probe: Probe, model: nn.Module, device: str) -> dict[str, float]:
    model.eval()
    with autocast(model, device):
        return probe()


def evaluation_loss(
    model: nn.Module,
    examples: Sequence[Encoded],
    tokens_per_batch: int,
    layout: Layout,
    workers: Workers = Workers(),  # noqa: B008
) -> float:
    """Mean loss over the supervised tokens of `examples`, in nats; inside `supervised_positions_only`.

    Workers share the examples, and all get the loss over all of them.
    """
    import torch

    model.eval()
    total = 0.0
    with torch.no_grad(), autocast(model, layout.device):
        for group in workers.share(bucket(examples, tokens_per_batch, rng=None)):
            total += float(model(**layout.batch(group).inputs).loss)
            alive()
    return workers.total(total) / sum(e.supervised for e in examples)


def _layout(
    model: nn.Module,
    base: nn.Module,
    train_set: Sequence[Encoded],
    settings: LoopSettings,
    pad_id: int,
    device: str,
) -> Layout:
    """How the examples lie in their batches; refuses what cannot be trained on so."""
    require_supervised(train_set, "train")
    if not settings.packing:
        return Layout(device, pad_id)
    require_packable(base, train_set, device)
    return Layout(device, pad_id, packed=True, share=may_share(model, base, train_set, device))


def _vocabulary(base: Any) -> int:
    return int(base.config.get_text_config().vocab_size)


def _gradients(
    wrapped: Any,
    batches: Iterable[Batch],
    count: int,
    precision: Any,
    weight: float,
    seeds: Sequence[int],
    hooks: StepHooks,
) -> float:
    """Add up a step's gradients over its micro-batches, of the loss times `weight`; gives the summed loss.

    The device is asked for the loss once a step.
    """
    import torch

    total: Any = 0.0
    for place, batch in enumerate(batches, start=1):
        torch.manual_seed(seeds[place - 1] % 2**63)
        last = place == count
        # Workers exchange gradients once a step: with the last micro-batch.
        with _no_exchange(wrapped, not last):
            with precision:
                loss = wrapped(**batch.inputs).loss
            extra = hooks.penalty() if last else None
            (loss * weight if extra is None else loss * weight + extra).backward()
        total += loss.detach()
        alive()
    return float(total)


def _no_exchange(wrapped: Any, wanted: bool) -> Any:
    return wrapped.no_sync() if wanted and hasattr(wrapped, "no_sync") else nullcontext()
