"""Steps of fixed shapes say what plain steps say, whatever joins, leaves and moves; here they are not recorded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers

from regraft.errors import ConfigError
from regraft.evals import graphs
from regraft.evals import slots as slots_module
from regraft.evals.decode import decode
from regraft.evals.graphs import Fixed, row_bucket, wanted
from regraft.evals.slots import Slots

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = (3, 40, 7, 7, 61, 1, 12, 25, 50, 5, 18)
NEW = 24


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Fixed]:
    """Steps of fixed shapes on the CPU, of small sizes, so that a few tokens pass many of them; those done."""
    found: list[Fixed] = []
    step = Slots.step_fixed

    def counted(self: Slots, fixed: Fixed) -> torch.Tensor:
        found.append(fixed)
        return step(self, fixed)

    monkeypatch.setattr(slots_module, "wanted", lambda base: base not in graphs._refused)
    for module in (slots_module, graphs):
        monkeypatch.setattr(module, "COLUMNS", 16)
    monkeypatch.setattr(graphs, "_STEPS_BEFORE", 0)
    monkeypatch.setattr(Slots, "step_fixed", counted)
    return found


def model(family: str = "llama", attention: str = "sdpa") -> Any:
    """A random model that looks back."""
    config = transformers.AutoConfig.for_model(
        family, vocab_size=200, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, attn_implementation=attention,
        bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    found = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in found.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return found


def answers(base: Any, places: int = 4, lengths: Sequence[int] = LENGTHS) -> dict[int, list[int]]:
    """Greedy answers of different lengths: a third of the prompts end early."""
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 200, (n,), generator=draw).tolist() for n in lengths]

    def inputs(some: Sequence[int]) -> dict[str, torch.Tensor]:
        widest = max(len(prompts[i]) for i in some)
        ids, mask = torch.zeros(2, len(some), widest, dtype=torch.long)
        for row, i in enumerate(some):
            ids[row, widest - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, widest - len(prompts[i]) :] = 1
        return {"input_ids": ids, "attention_mask": mask}

    ends = frozenset(range(2, 200, 30))
    with torch.inference_mode():
        return dict(decode(base, [*map(len, prompts)], inputs, ends=ends, max_new_tokens=NEW, places=places))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_steps_of_fixed_shapes_say_the_same(
    family: str, attention: str, steps: list[Fixed], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = model(family, attention)
    found = answers(base, 7)
    with monkeypatch.context() as plain:
        plain.setattr(slots_module, "wanted", lambda _: False)
        assert found == answers(base, 7)
    assert len({len(answer) for answer in found.values()}) > 3
    assert {fixed.rows for fixed in steps} >= {1, 2, 7}
    assert len({fixed.columns for fixed in steps}) > 2


@pytest.mark.parametrize("before", [0, 3])
def test_graphs_are_used_again_and_few_are_kept(
    before: int, steps: list[Fixed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a step says does not depend on whether its graph is new, old, or was thrown away meanwhile."""
    base = model()
    wanted_answers = answers(base)
    recorded: list[tuple[int, int]] = []
    record = graphs.Graphs._record

    def counted(self: graphs.Graphs, slots: Slots, key: Any) -> Any:
        recorded.append((key.rows, key.columns))
        graph = record(self, slots, key)
        assert len(self._graphs) < kept
        return graph

    monkeypatch.setattr(graphs.Graphs, "_record", counted)
    monkeypatch.setattr(graphs, "_STEPS_BEFORE", before)
    for kept in (32, 2):
        recorded.clear()
        steps.clear()
        monkeypatch.setattr(graphs, "_KEPT", kept)
        assert answers(base) == wanted_answers
        assert len(recorded) < len(steps) / 3


def test_columns_that_nobody_looks_at_are_given_up(steps: list[Fixed]) -> None:
    """One long row makes the buffers wide; when it is gone, steps of short rows become narrow again."""
    with torch.inference_mode():
        slots = Slots(model(), 2)
        for length in (70, 5):
            ids = torch.arange(3, 3 + length)[None]
            slots.read({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        slots.step([3, 4])
        assert steps[-1].columns == 80
        slots.leave(0)
        for token in range(3, 20):
            slots.step([token])
    assert steps[-1].columns == 32
    assert steps[-1].rows == 1


@pytest.mark.parametrize("takes", ["raises", "ignores"])
def test_a_model_that_does_not_take_prepared_masks_goes_on_without(
    takes: str, steps: list[Fixed], caplog: pytest.LogCaptureFixture
) -> None:
    base = model()

    def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs["attention_mask"].ndim < 4:
            return None
        if takes == "raises":
            raise ValueError("too many values to unpack")
        return args, kwargs | {"attention_mask": torch.zeros_like(kwargs["attention_mask"])}

    expected = answers(base)
    steps.clear()
    base.register_forward_pre_hook(hook, with_kwargs=True)
    with caplog.at_level(logging.WARNING):
        assert answers(base) == expected
        tried = len(steps)
        assert answers(base) == expected
    assert len(steps) == tried < 3, "it is not tried again"
    (said,) = caplog.records
    assert ("too many values" if takes == "raises" else "of the largest logit") in said.getMessage()


def test_a_free_slot_never_holds_what_is_no_number(steps: list[Fixed]) -> None:
    """Rows that only fill up go through the model too; whoever joins later must not read NaN from them."""
    base = model()
    with torch.inference_mode():
        slots = Slots(base, 4)
        ids = torch.arange(3, 12)[None].expand(3, -1)
        slots.read({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        for slot in (2, 1):
            slots.leave(slot)
        for token in range(3, 30):
            assert slots.step([token]).isfinite().all()
        late = ids[:1, :2]
        slots.read({"input_ids": late, "attention_mask": torch.ones_like(late)})
        assert slots.step([3, 4]).isfinite().all()
        assert all(buffer.isfinite().all() for layer in slots._layers for buffer in layer.buffers)
    assert steps


def test_rows_are_filled_up_to_sizes_that_repeat() -> None:
    assert [row_bucket(n, 100) for n in (1, 2, 3, 5, 9, 16, 17, 33, 96, 97)] == [
        1, 2, 4, 8, 16, 16, 32, 48, 96, 100,
    ]  # fmt: skip
    assert row_bucket(9, 12) == 12


def test_graphs_are_for_cuda_and_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    base = model()
    assert not wanted(base)
    monkeypatch.setenv(graphs.SWITCH, "off")
    with pytest.raises(ConfigError, match="REGRAFT_CUDA_GRAPHS is 'off'"):
        wanted(base)
