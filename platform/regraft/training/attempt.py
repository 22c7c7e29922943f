"""What a trial does between its start and its record: train, save, load as serving does, score."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from regraft.data.dataset import evaluation_parts
from regraft.energy import EnergyMeter
from regraft.errors import InfeasibleTrialError
from regraft.methods import Method
from regraft.methods.base import trainable_parameters
from regraft.methods.endpoint import Endpoint
from regraft.models import ResolvedModel, embedding_rows, load_tokenizer, pick_device, resolve
from regraft.records import Cost, DatasetVersion, Example, LossPoint, TrialResult, TrialStatus
from regraft.tracking.trials import TrialRun
from regraft.training.batches import Encoded
from regraft.training.candidate import BaseCache, nats_of_texts, score, speed
from regraft.training.checkpoints import Checkpoints, versions_of
from regraft.training.distributed import Workers
from regraft.training.encoding import Encodings, encode_evaluation, encode_train, evenly
from regraft.training.kernels import fast_kernels
from regraft.training.loop import Layout, Outcome, evaluation_loss, train
from regraft.training.loss import supervised_positions_only
from regraft.training.memory import device_gib, peak_gib, require_memory, reset_peak
from regraft.training.packing import may_share, require_packable
from regraft.training.preflight import Batching, micro_tokens
from regraft.training.remote import ask_endpoint
from regraft.training.spec import TrialSpec
from regraft.training.steps import LoopSettings
from regraft.watchdog import alive

_log = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]


class Attempt:
    """The state of a running trial, so that its record can be written however it ends."""

    def __init__(
        self,
        spec: TrialSpec,
        dataset: DatasetVersion,
        run: TrialRun | None,
        report: Report,
        bases: BaseCache,
        workers: Workers,
    ) -> None:
        self.spec, self.dataset, self.run, self.report = spec, dataset, run, report
        self.bases, self.workers = bases, workers
        self.points: list[LossPoint] = []
        self.started = time.monotonic()
        self.cost = Cost()
        self.meter: EnergyMeter | None = None
        self.data: dict[str, int] = {}
        self.base_nats: dict[str, float] = {}
        self.device = pick_device("cpu" if spec.parsed.remote else spec.model.device)
        kept = versions_of(spec.storage, spec.key)
        self.checkpoints = Checkpoints(kept, spec.sweep.checkpoint_seconds, workers) if kept else None
        #: The micro-batch to try, in tokens, should memory run out now; 0 if a smaller one does not help.
        self.smaller = 0

    def go(self) -> TrialResult:
        """Train and score."""
        spec, method = self.spec, self.spec.parsed
        if isinstance(method, Endpoint):
            return self._ask(method)
        import torch

        reset_peak(self.device)
        base_model = resolve(spec.model.source, spec.model.revision)
        if base_model.revision != spec.base_revision:
            raise InfeasibleTrialError(
                f"the base here is {base_model.revision}, that of the sweep {spec.base_revision}"
            )
        micro = self._fit(base_model.path)
        tokenizer = load_tokenizer(base_model.path)
        known = embedding_rows(base_model.path)
        shown = method.shown(self.dataset.split("train"))
        chosen_by = evaluation_parts(self.dataset, spec.evaluate.final_share).selection
        held_out = self._counted(
            "evaluation", encode_evaluation(tokenizer, chosen_by, spec.sweep, known, shown)
        )
        examples = tuple(e.after(shown) for e in chosen_by)
        # What is to be sharded may not fit on a device: it goes there layer by layer. Quantising needs one.
        first = "cpu" if self.workers.shard and not method.quantised else self.device
        base = self.bases.take(method, base_model.path, spec.model.dtype, first)
        if not self.workers.shard:
            self.base_nats = self.bases.nats(
                base, tokenizer, spec.evaluate, method, base_model.path, spec.model.dtype, self.device
            )
        # First weights are drawn here; what this process did before must not decide them.
        torch.manual_seed(spec.sweep.seed)
        model = method.apply(base)
        alive()
        pad_id = int(tokenizer.pad_token_id)
        trainable = sum(p.numel() for p in trainable_parameters(model))
        self.cost = Cost(trainable_parameters=trainable)
        if method.trains:
            rows = self._counted("train", encode_train(tokenizer, self.dataset, spec.sweep, known))
            packing = self._packing(method, base, rows)
            half = (micro or spec.sweep.tokens_per_batch) // 2
            self.smaller = half if half >= max(len(row.ids) for row in rows) else 0
            with EnergyMeter(self.device) as self.meter:
                outcome = train(
                    model, base, rows, held_out, self._loop_settings(method, micro, packing),
                    pad_id=pad_id, device=self.device, report=self._on_point, workers=self.workers,
                    checkpoints=self.checkpoints, probe=self._probe(model, tokenizer, examples),
                    hooks=method.hooks(model),
                )  # fmt: skip
            self.smaller = 0
        else:
            packing = self._packing(method, base, held_out)
            share = packing and may_share(model, base, held_out, self.device)
            with supervised_positions_only(base), fast_kernels(base, self.device, packed=packing):
                loss = evaluation_loss(
                    model,
                    held_out,
                    tokens_per_batch=spec.sweep.tokens_per_batch,
                    layout=Layout(self.device, pad_id, packing, share),
                )
            outcome = Outcome((), 0, 0.0)
            self.points = [
                LossPoint(step=0, tokens_seen=0, train_loss=loss, eval_loss=loss, learning_rate=0.0)
            ]
        self.cost = self.cost.model_copy(
            update={
                "train_seconds": outcome.seconds,
                "money": outcome.seconds / 3600 * spec.price_per_hour,
                "tokens_seen": outcome.tokens_seen,
                "memory_peak_gib": peak_gib(self.device),
                **self._energy(outcome.seconds),
            }
        )
        if self.workers.rank != 0:
            return self.result("completed")
        return self._score(method, model, base_model, tokenizer, examples)

    def _ask(self, endpoint: Endpoint) -> TrialResult:
        """Score what an endpoint answers; nothing is loaded."""
        examples = evaluation_parts(self.dataset, self.spec.evaluate.final_share).selection
        found = ask_endpoint(
            endpoint, examples, self.spec.evaluate, dataset_id=self.spec.dataset_id, split="evaluation"
        )
        self.data |= found.counts
        self.cost = Cost(answer_money=found.money)
        return self.result("completed").model_copy(update={"report": found.report, "speed": found.speed})

    def _fit(self, base: Path) -> int:
        """The micro-batch that fits, in tokens; 0 for whole batches.

        What cannot fit is refused on all workers if on one: the others would wait for it.
        """
        spec, problem, tokens = self.spec, None, 0
        limit = spec.sweep.trial_memory_gib or device_gib(self.device)
        batching = Batching.of(spec.sweep, spec.evaluate, sharded=self.workers.shard)
        if limit is not None:
            asked = (spec.parsed, base, spec.model.dtype, self.device)
            tokens = micro_tokens(*asked, batching, limit)
            try:
                require_memory(*asked, limit, batching._replace(tokens_per_batch=tokens))
            except InfeasibleTrialError as error:
                problem = error.problem
        if found := self.workers.first_problem(problem):
            raise InfeasibleTrialError(found)
        tokens = min(tokens or batching.tokens_per_batch, spec.micro_tokens or batching.tokens_per_batch)
        if tokens == batching.tokens_per_batch:
            return 0
        self.data["micro_batch_tokens"] = tokens
        return tokens

    def _score(
        self, method: Method, model: Any, base_model: ResolvedModel, tokenizer: Any, examples: Any
    ) -> TrialResult:
        """Save what was trained, load it again as serving will, and score that."""
        import torch

        spec, path, dtype = self.spec, base_model.path, self.spec.model.dtype
        model_id = None
        with tempfile.TemporaryDirectory(prefix="regraft-trial-") as folder:
            kept = Path(folder)
            method.save(model, kept)
            clean = None if self.workers.shard else method.release(model)
            if self.workers.shard:  # the base lay in parts, or not on the device
                base = method.load_base(path, dtype, self.device)
                self.base_nats = nats_of_texts(base, tokenizer, spec.evaluate)
                del base
            if clean is None:
                model = method.load(path, kept, dtype, self.device)
            elif method.trains:
                model = method.attach(clean, kept)
            model.eval()
            report = score(
                model, tokenizer, examples, spec.evaluate,
                dataset_id=spec.dataset_id, split="evaluation", base_nats=self.base_nats,
            )  # fmt: skip
            timing = None
            if spec.timed:
                timing = speed(model, tokenizer, examples, spec.evaluate, torch.get_num_threads())
            if method.trains:
                size = sum(f.stat().st_size for f in kept.rglob("*") if f.is_file())
                self.cost = self.cost.model_copy(update={"adapter_bytes": size})
                if self.run is not None:
                    step = self.points[-1].step if self.points else 0
                    name = method.label.replace(" ", "-").replace("=", "").replace(".", "_")
                    model_id = self.run.log_adapter(kept, name=name, params=spec.params, step=step)
        # Peak memory is of training and of answering: whatever was higher.
        self.cost = self.cost.model_copy(update={"memory_peak_gib": peak_gib(self.device)})
        # What was loaded for scoring is clean below, even where the trained model was not.
        self.bases.give_back(method.release(model), method, path, dtype, self.device)
        return self.result("completed").model_copy(
            update={"report": report, "speed": timing, "logged_model_id": model_id}
        )

    def _counted(self, name: str, found: Encodings) -> Sequence[Encoded]:
        """The rows of a set; what became of its examples is kept with the record."""
        self.data |= {f"{name}_{figure}": count for figure, count in found.counts.items()}
        if self.workers.rank == 0:
            lost = len(found.rows) < len(found.lengths) or found.truncated
            _log.log(logging.WARNING if lost else logging.INFO, "%s: %s", name, found.summary)
        return found.rows

    def _probe(
        self, model: Any, tokenizer: Any, examples: Sequence[Example]
    ) -> Callable[[], dict[str, float]] | None:
        """What scores a few answers of the model as it is; None where nobody asks.

        The first worker answers; all of them where each holds a part of the weights.
        """
        wanted, settings = self.spec.sweep.answers_at_points, self.spec.evaluate
        if not wanted or (self.workers.rank != 0 and not self.workers.shard):
            return None
        asked = evenly(examples, wanted)
        # The answers alone are looked at: probabilities have their loss at each point.
        by_answers = tuple(m for m in settings.metrics if not (m.asks_likelihood or m.texts))
        settings = settings.model_copy(update={"metrics": by_answers})

        def probe() -> dict[str, float]:
            found = score(
                model, tokenizer, asked, settings, dataset_id=self.spec.dataset_id, split="evaluation"
            )
            return found.means

        return probe

    def _packing(self, method: Method, base: Any, rows: Sequence[Encoded]) -> bool:
        """Whether examples share rows: as asked, or where method and model can."""
        wanted = self.spec.sweep.packing
        if wanted == "auto":
            wanted = method.support.packs
            try:
                if wanted:
                    require_packable(base, rows, self.device)
            except InfeasibleTrialError as error:
                _log.info("batches are padded: %s", error.problem)
                wanted = False
        self.data["packed"] = int(wanted)
        return wanted

    def _loop_settings(self, method: Method, micro: int, packing: bool) -> LoopSettings:
        sweep = self.spec.sweep
        of_the_sweep = sweep.model_dump(include=set(LoopSettings._fields))  # they bear the same names
        own = {"learning_rate": method.learning_rate, "micro_tokens": micro, "packing": packing}
        return LoopSettings(**(of_the_sweep | own))

    def _energy(self, seconds: float = 0.0) -> dict[str, Any]:
        """What training has used so far, evaluations at its points included; nothing where none trains."""
        if self.meter is None:
            return {}
        found = self.meter.so_far()
        how = [found.how]
        if self.workers.size > 1:
            how.append(f"of the first of {self.workers.size} workers alone")
        if seconds > found.seconds:
            how.append(f"of the last {found.seconds:.0f} s of training, since it went on from a checkpoint")
        return {"energy_wh": found.watt_hours, "energy_how": "; ".join(how)}

    def _on_point(self, point: LossPoint) -> None:
        self.points.append(point)
        if self.run is not None:
            self.run.log_curve([point])
        self.cost = self.cost.model_copy(
            update={
                "tokens_seen": point.tokens_seen,
                "train_seconds": time.monotonic() - self.started,
                "memory_peak_gib": peak_gib(self.device),
                **self._energy(),
            }
        )
        metrics = {"eval_loss": point.eval_loss, "point": len(self.points), "status": "training"}
        self.report(metrics | {"cost": self.cost.model_dump(), "curve": point.model_dump(mode="json")})

    def record(self, result: TrialResult) -> TrialResult:
        """Write the record, on the first worker; what is finished needs no checkpoint any more. Gives it."""
        if self.run is None:
            return result
        result = self.run.finish(result)
        if self.checkpoints and result.status != "failed":
            self.checkpoints.clear()
        return result

    def result(self, status: TrialStatus, reason: str = "") -> TrialResult:
        """The record as far as it is known."""
        return self.spec.result(
            status,
            reason,
            eval_loss=next((p.eval_loss for p in reversed(self.points) if p.eval_loss is not None), None),
            cost=self.cost,
            data=dict(self.data),
            curve=tuple(self.points),
        )
