"""Where training stands, on disk or in an object store: enough to go on as if there had been no crash.

The batches follow from the seed, and random numbers from the seed and a micro-batch's place, so trained
weights, optimiser state and counters are all there is to keep: adapters alone where only adapters train. The
last checkpoint alone is kept.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, NamedTuple

from regraft.errors import ServiceError
from regraft.methods.hooks import StepHooks
from regraft.records import LossPoint
from regraft.training.distributed import Workers
from regraft.training.sharding import load_parts, save_part
from regraft.training.storage import Versions

if TYPE_CHECKING:
    import torch
    from torch import nn

_log = logging.getLogger(__name__)


class Progress(NamedTuple):
    """The counters of a run after `step` of `total` steps. Losses are sums over tokens, in nats."""

    step: int
    total: int
    tokens_seen: int
    loss_sum: float
    loss_tokens: int
    seconds: float
    points: tuple[LossPoint, ...]
    first_loss: float | None = None  # mean of the first step, by which divergence is judged


class Checkpoints:
    """The last checkpoint of one trial."""

    def __init__(
        self,
        versions: Versions,
        every_seconds: float,
        workers: Workers = Workers(),  # noqa: B008
    ) -> None:
        """Keep checkpoints.

        Args:
            versions: Of this trial alone, on storage that all its workers reach.
            every_seconds: Least time between two; more where writing one takes long, so that no more than a
                twentieth of the time goes there. With 0 there is one after every step, however long it takes.
            workers: This process's place among its peers.
        """
        self.versions, self.every_seconds, self._workers = versions, every_seconds, workers
        self._last = time.monotonic()
        self._took = 0.0

    @property
    def due(self) -> bool:
        """Whether to `save` now: on the first worker, whose clock decides, or on all if each holds a part."""
        least = max(self.every_seconds, 20 * self._took) if self.every_seconds else 0.0
        mine = self._workers.rank == 0 and time.monotonic() - self._last >= least
        return bool(self._workers.total(mine)) if self._workers.shard else mine

    def save(
        self,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        progress: Progress,
        hooks: StepHooks = StepHooks(),  # noqa: B008
    ) -> None:
        """Replace the last checkpoint; a crash in between leaves the old one, or the new one."""
        import torch
        from safetensors.torch import save_file

        began, trained, workers = time.monotonic(), _trained(model), self._workers
        # Parts of another number of workers, left by a crash, are not mixed with these.
        name = f"step-{progress.step}-of-{workers.size}"
        with self.versions.writing(name) as folder:
            if workers.shard:
                save_part(folder, trained, optimiser, workers)
            else:
                weights = {name: p.detach().contiguous() for name, p in trained.items()}
                save_file(weights, folder / "weights.safetensors")
                torch.save(optimiser.state_dict(), folder / "optimiser.pt")
            if workers.rank == 0 and (state := hooks.state()):
                save_file({k: v.contiguous() for k, v in state.items()}, folder / "method.safetensors")
        if workers.shard:
            workers.barrier()
        if workers.rank == 0:
            about = progress._asdict() | {"points": [p.model_dump() for p in progress.points]}
            self.versions.point_to(name, about)
        self._last = time.monotonic()
        self._took = self._last - began

    def restore(
        self,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        total: int,
        device: str,
        hooks: StepHooks = StepHooks(),  # noqa: B008
    ) -> Progress | None:
        """Put model and optimiser where the last checkpoint left them; None if there is none that fits.

        The number of workers may be another than when it was written. All must call this.

        Args:
            model: As it was when training began.
            optimiser: Over the same parameters in the same order.
            total: Steps of the whole run; a checkpoint of another plan is not used.
            device: Where the model is.
            hooks: What the method does in the loop; takes back what it knew.

        Raises:
            ServiceError: If the workers do not find the same.
        """
        found = self._restore(model, optimiser, total, device, hooks)
        step = found.step if found else 0
        # Nobody goes on, and replaces what another still reads, before all have read.
        if self._workers.total(step) != step * self._workers.size:
            raise ServiceError(
                f"the workers find different checkpoints in {self.versions.uri}",
                "give cluster.storage a folder that all nodes share",
            )
        return found

    def _restore(
        self, model: nn.Module, optimiser: torch.optim.Optimizer, total: int, device: str, hooks: StepHooks
    ) -> Progress | None:
        import torch
        from safetensors.torch import load_file

        latest = self.versions.latest()
        if latest is None:
            return None
        name, counters = latest
        trained = _trained(model)
        fits = counters["total"] == total
        with self.versions.reading(name) as folder:
            if fits and self._workers.shard:
                fits = load_parts(folder, trained, optimiser)
            elif fits:
                weights = load_file(folder / "weights.safetensors", device=device)
                fits = weights.keys() == trained.keys()
            if not fits:
                _log.warning(
                    "%s/%s is of another run: training starts from the beginning", self.versions.uri, name
                )
                return None
            if not self._workers.shard:
                with torch.no_grad():
                    for key, parameter in trained.items():
                        parameter.copy_(weights[key])
                # weights_only: a checkpoint runs no code, whoever wrote it.
                state = torch.load(folder / "optimiser.pt", map_location=device, weights_only=True)
                optimiser.load_state_dict(state)
            if (folder / "method.safetensors").exists():
                hooks.restore(load_file(folder / "method.safetensors", device=device))
        points = tuple(LossPoint.model_validate(p) for p in counters.pop("points"))
        return Progress(**counters, points=points)

    def clear(self) -> None:
        """Delete what was kept: the trial is finished."""
        self.versions.clear()


def _trained(model: nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def versions_of(storage: str, key: str) -> Versions | None:
    """Where a trial keeps its checkpoint; None without storage."""
    if not storage:
        return None
    path, question, options = storage.partition("?")
    return Versions(f"{path.rstrip('/')}/checkpoints/{key}{question}{options}")
