"""How many tokens the slots answer with, beside transformers' `generate` and beside vLLM."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from serving_models import make_adapter
from vllm_side import RANKS, Round, VllmSide, bound_to

MIXED: tuple[dict[str, Any], ...] = (
    {"name": "lora", "rank": 4},
    {"name": "lora", "rank": 16},
    {"name": "dora", "rank": 8},
    {"name": "ia3"},
    {"name": "prompt_tuning", "virtual_tokens": 16},
)
Prompt = Sequence[int]


class Engines:
    """A base in slots, versions on it, and the same base for `generate`; on a CPU bound to one core.

    Args:
        model: Folder of the base model.
        folder: For adapters.
        device: Where to hold them.
        prompts: Token ids of what is asked.
        tokens: Of each answer, at most.
        most: Requests at once, at most.
        say: Told of what is measured.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        device: str,
        prompts: Sequence[Prompt],
        *,
        tokens: int,
        most: int,
        say: Callable[[str], None],
    ) -> None:
        import torch

        from regraft.methods import parse_method
        from regraft.models import load_tokenizer
        from serving.engines.adapters import Adapter, read_adapter
        from serving.engines.base import EngineLimits
        from serving.engines.slots import SlotEngine, SlotsBase

        torch.set_num_threads(1)
        self.model, self.prompts, self.tokens, self.say = model, prompts, tokens, say
        self._cuda = device.startswith("cuda")
        self.core = None if self._cuda else min(os.sched_getaffinity(0))
        self._tokenizer = load_tokenizer(model)
        loras = [{"name": "lora", "rank": rank} for rank in RANKS]
        kinds = {"mixed": MIXED, "lora": loras}
        self.files = {
            name: [
                make_adapter(s, model, folder / f"{name}-{n}", device=device) for n, s in enumerate(settings)
            ]
            for name, settings in kinds.items()
        }
        limits = EngineLimits(max_batch=most, max_queued=most, threads=1)
        with self.bound():
            base, self._plain = (
                parse_method({"name": "zero_shot"}).load_base(model, "bfloat16", device) for _ in range(2)
            )
            self._slots = SlotsBase(base, self._tokenizer, limits)
        alone = SlotEngine(self._slots, Adapter())
        self._versions = {
            name: [SlotEngine(self._slots, read_adapter(file, base)) for file in files]
            for name, files in self.files.items()
        }
        self._versions = {"base": [alone], **self._versions, "mixed": [alone, *self._versions["mixed"]]}

    def close(self) -> None:
        """Free the models."""
        self._slots.close()

    def bound(self) -> AbstractContextManager[None]:
        """Bind this thread and those it starts to the core; on CUDA do nothing."""
        return bound_to(self.core)

    def beside_generate(self, streams: int, few: int, rounds: int) -> dict[str, float]:
        """The median speed of `sequential`, `slots` and `mixed`, by turns, in tokens a CPU-second.

        On CUDA in tokens a second that passes, as all others.

        Args:
            streams: Requests at once.
            few: How many `generate` answers one after another.
            rounds: Turns of each.
        """
        asked = self._asked(streams)
        sides: dict[str, Callable[[], Round]] = {
            "sequential": lambda: self._timed(lambda: self._sequential(asked[:few])),
            "slots": lambda: self._together("base", asked),
            "mixed": lambda: self._together("mixed", asked),
        }
        return self._by_turns(f"{streams} streams", sides, rounds)

    def beside_vllm(self, python: Path, streams: int, rounds: int) -> dict[str, float]:
        """The median speed of the slots and of vLLM, by turns: of the base, and of LoRA adapters mixed.

        Nobody's answer ends before it has all of its tokens. The base takes three times as many turns.
        """
        asked, found = self._asked(streams), {}
        for what, adapters in {"base": [], "lora": self.files["lora"]}.items():
            with (
                VllmSide(python, self.model, adapters, core=self.core, streams=streams) as vllm,
                _endless(self._slots),
            ):
                vllm.answer(asked, 8)  # warm up
                self._together(what, asked)
                sides: dict[str, Callable[[], Round]] = {
                    f"slots, {what}": lambda what=what: self._together(what, asked),  # type: ignore[misc]
                    f"vllm, {what}": lambda vllm=vllm: vllm.answer(asked, self.tokens),  # type: ignore[misc]
                }
                # vLLM takes ten times as long with adapters.
                turns = rounds if adapters else 3 * rounds
                found |= self._by_turns(f"{streams} streams to the end", sides, turns)
        return found

    def _asked(self, streams: int) -> list[Prompt]:
        return [self.prompts[i % len(self.prompts)] for i in range(streams)]

    def _by_turns(self, title: str, sides: dict[str, Callable[[], Round]], rounds: int) -> dict[str, float]:
        made: dict[str, list[Round]] = {name: [] for name in sides}
        for work in sides.values() if self._cuda else ():
            work()  # steps are recorded, and kernels compiled
        for _ in range(rounds):
            for name, work in sides.items():
                made[name].append(work())
        middle = {
            n: statistics.median(r.tokens / (r.seconds if self._cuda else r.cpu_seconds) for r in own)
            for n, own in made.items()
        }
        passed = {n: statistics.median(r.tokens / r.seconds for r in own) for n, own in made.items()}
        unit = "s" if self._cuda else "CPU-s"
        for name in sides:
            self.say(
                f"{title}: {name} {middle[name]:.1f} tokens/{unit}, {passed[name]:.1f} tokens a second passed"
            )
        return middle

    def _timed(self, work: Callable[[], int]) -> Round:
        """On a CPU its own time is what counts: other work on the machine disturbs that least."""
        spent, began = time.process_time(), time.perf_counter()
        with self.bound():
            tokens = work()
        spent, passed = time.process_time() - spent, time.perf_counter() - began
        return Round(tokens, spent, passed)

    def _together(self, versions: str, prompts: Sequence[Prompt]) -> Round:
        return self._timed(lambda: at_once(self._versions[versions], prompts, self.tokens))

    def _sequential(self, prompts: Sequence[Prompt]) -> int:
        """Answer one after another; gives how many tokens."""
        import torch

        from regraft.evals.generation import contiguous_head

        total, model, words = 0, self._plain, self._tokenizer
        # transformers is spared torch's slow product with the strided last position: it is not what is
        # measured.
        with torch.inference_mode(), contiguous_head(model):
            for prompt in prompts:
                ids = torch.tensor([prompt], device=model.device)
                out = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                    max_new_tokens=self.tokens, pad_token_id=words.pad_token_id,
                    eos_token_id=words.eos_token_id,
                )  # fmt: skip
                total += out.shape[1] - ids.shape[1]
        return total


def at_once(engines: Sequence[Any], prompts: Sequence[Prompt], tokens: int) -> int:
    """Answer all together, of one version after another; gives how many tokens."""
    from serving.engines.base import Finished, GenerationRequest

    async def one(engine: Any, prompt: Prompt) -> int:
        count = 0
        async for event in engine.submit(GenerationRequest(tuple(prompt), tokens, whole=True)):
            if isinstance(event, Finished):
                count = event.completion_tokens
        return count

    async def all_of_them() -> list[int]:
        asked = (one(engines[i % len(engines)], p) for i, p in enumerate(prompts))
        return await asyncio.gather(*asked)

    return sum(asyncio.run(all_of_them()))


@contextmanager
def _endless(slots: Any) -> Iterator[None]:
    """Let no answer end before it has all of its tokens; between requests."""
    ends, slots._eos = slots._eos, frozenset()
    try:
        yield
    finally:
        slots._eos = ends
