"""Where training stands, on disk: enough to go on after a crash as if there had been none.

The batches follow from the seed, and random numbers from the seed and a micro-batch's place, so trained
weights, optimiser state and counters are all there is to keep. One folder, replaced whole: the last
checkpoint alone.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from regraft.errors import ServiceError
from regraft.methods.hooks import StepHooks
from regraft.records import LossPoint
from regraft.training.distributed import Workers
from regraft.training.sharding import load_parts, save_part

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
        folder: Path,
        every_seconds: float,
        workers: Workers = Workers(),  # noqa: B008
    ) -> None:
        """Keep checkpoints.

        Args:
            folder: Of this trial alone, on storage that all its workers reach; made when first needed.
            every_seconds: Least time between two; more where writing one takes long, so that no more than a
                twentieth of the time goes there. With 0 there is one after every step, however long it takes.
            workers: This process's place among its peers.
        """
        self.folder = folder
        self._part, self._old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("part", "old"))
        self.every_seconds, self._workers = every_seconds, workers
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
        if workers.rank == 0:
            shutil.rmtree(self._part, ignore_errors=True)
            self._part.mkdir(parents=True)
        if workers.shard:
            workers.barrier()
            save_part(self._part, trained, optimiser, workers)
            workers.barrier()
        else:
            weights = {name: p.detach().contiguous() for name, p in trained.items()}
            save_file(weights, self._part / "weights.safetensors")
            torch.save(optimiser.state_dict(), self._part / "optimiser.pt")
        if workers.rank == 0:
            if state := hooks.state():
                save_file({k: v.contiguous() for k, v in state.items()}, self._part / "method.safetensors")
            self._put_in_place(progress)
        self._last = time.monotonic()
        self._took = self._last - began

    def _put_in_place(self, progress: Progress) -> None:
        counters = progress._asdict() | {"points": [p.model_dump() for p in progress.points]}
        (self._part / "progress.json").write_text(json.dumps(counters))
        if self.folder.exists():  # or the old one is all there is, after a crash between the two renames
            shutil.rmtree(self._old, ignore_errors=True)
            self.folder.rename(self._old)
        self._part.rename(self.folder)
        shutil.rmtree(self._old, ignore_errors=True)

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
                f"the workers find different checkpoints in {self.folder.parent}",
                "give cluster.storage a folder that all nodes share",
            )
        return found

    def _restore(
        self, model: nn.Module, optimiser: torch.optim.Optimizer, total: int, device: str, hooks: StepHooks
    ) -> Progress | None:
        import torch
        from safetensors.torch import load_file

        folder = self.folder if self.folder.exists() else self._old  # a crash between two renames
        if not (folder / "progress.json").exists():
            return None
        counters: dict[str, Any] = json.loads((folder / "progress.json").read_text())
        trained = _trained(model)
        fits = counters["total"] == total
        if fits and self._workers.shard:
            fits = load_parts(folder, trained, optimiser)
        elif fits:
            weights = load_file(folder / "weights.safetensors", device=device)
            fits = weights.keys() == trained.keys()
        if not fits:
            _log.warning("%s is of another run: training starts from the beginning", folder)
            return None
        if not self._workers.shard:
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(weights[name])
            # weights_only: a checkpoint runs no code, whoever wrote it.
            state = torch.load(folder / "optimiser.pt", map_location=device, weights_only=True)
            optimiser.load_state_dict(state)
        if (folder / "method.safetensors").exists():
            hooks.restore(load_file(folder / "method.safetensors", device=device))
        points = tuple(LossPoint.model_validate(p) for p in counters.pop("points"))
        return Progress(**counters, points=points)

    def clear(self) -> None:
        """Delete what was kept: the trial is finished."""
        for folder in (self.folder, self._part, self._old):
            shutil.rmtree(folder, ignore_errors=True)


def _trained(model: nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def checkpoint_folder(storage: str, key: str) -> Path | None:
    """Where a trial keeps its checkpoint; None without storage, and on object stores (no renames)."""
    return None if not storage or "://" in storage else Path(storage).resolve() / "checkpoints" / key
