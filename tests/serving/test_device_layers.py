"""A GPU's kernels, interpreted on a CPU: layers, adapters and whole answers are those of torch's operations."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from regraft.evals import graphs
from regraft.evals import slots as slots_module
from regraft.evals.slots import Slots
from regraft.methods import parse_method
from regraft.models import load_tokenizer
from serving.engines import device_layers
from serving.engines import slots as slots_engine
from serving.engines.adapters import Adapter, read_adapter
from serving.engines.base import EngineLimits, GenerationRequest
from serving.engines.mixed import Mix, MixedLinear
from serving.engines.slots import SlotEngine, SlotsBase

pytest.importorskip("triton")
from serving.engines import device_kernels


@pytest.mark.parametrize(("heads", "own", "width", "columns"), [(4, 2, 16, 128), (3, 3, 24, 1100)])
def test_rows_turn_keep_and_see_what_torch_says(
    heads: int, own: int, width: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    rows, end = 3, columns - 20
    qkv = torch.randn(rows, (heads + 2 * own) * width, dtype=torch.bfloat16)
    angles = torch.randn(rows, 1, width // 2).repeat(1, 1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    keys, values = torch.randn(2, 5, own, columns + 16, width).bfloat16()
    begins = torch.tensor([end, end - 7, 0])[:, None]
    shown = (torch.arange(columns) >= begins) & (torch.arange(columns) <= end)
    mask = torch.zeros(rows, columns, dtype=torch.bfloat16).masked_fill(
        ~shown, torch.finfo(torch.bfloat16).min
    )

    def turned(x: torch.Tensor) -> torch.Tensor:
        some = x.float()
        low, high = some.chunk(2, -1)
        return (some * cos.float() + torch.cat([-high, low], -1) * sin.float()).bfloat16()

    q, k, v = (t.view(rows, -1, width) for t in qkv.split([heads * width, own * width, own * width], 1))
    q, k = turned(q), turned(k)
    wanted_keys, wanted_values = keys.clone(), values.clone()
    wanted_keys[:rows, :, end], wanted_values[:rows, :, end] = k, v
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, None].float(), wanted_keys[:rows, :, :columns].float(), wanted_values[:rows, :, :columns].float(),
        attn_mask=mask[:, None, None].float(), scale=0.2, enable_gqa=True,
    )[:, :, 0].flatten(1)  # fmt: skip

    device_kernels.turn(qkv, (cos, sin), (keys, values), torch.tensor([end]))
    torch.testing.assert_close(keys, wanted_keys)
    torch.testing.assert_close(values, wanted_values)
    for programs in (1, 10**6):  # all columns by one program, and in parts that are put together
        monkeypatch.setattr(device_kernels, "_PROGRAMS", programs)
        found = device_kernels.attend(qkv, (keys, values), mask, 0.2)
        torch.testing.assert_close(found.float(), wanted, atol=0.02, rtol=0.02)


def test_norms_and_gates_round_as_transformers_does() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(1)
    norm = LlamaRMSNorm(80, eps=1e-5).bfloat16()
    norm.weight.data.normal_()
    x = torch.randn(4, 80, dtype=torch.bfloat16)
    torch.testing.assert_close(
        device_kernels.norm(x, norm.weight.data, 1e-5), norm(x).detach(), atol=0, rtol=0.02
    )
    both = torch.randn(4, 2 * 1500, dtype=torch.bfloat16)
    first, second = both.chunk(2, 1)
    wanted = torch.nn.functional.silu(first) * second
    torch.testing.assert_close(device_kernels.gate(both), wanted, atol=1e-3, rtol=0.02)


def random_adapter(rank: int, *names: str, inputs: int, outputs: int, vectors: bool = False) -> Adapter:
    pairs = {name: (torch.randn(rank, inputs) / 8, torch.randn(outputs, rank) / 8) for name in names if rank}
    if not vectors:
        return Adapter(low_rank=pairs)
    return Adapter(
        low_rank=pairs,
        out_scale={name: torch.rand(outputs) for name in names},
        out_shift={name: torch.randn(outputs) for name in names[:1]},
        in_scale={} if rank else {name: torch.rand(inputs) for name in names},
    )


@torch.no_grad()
@pytest.mark.parametrize("names", [("a",), ("a", "b")], ids=len)
def test_each_row_goes_through_its_own_adapter(names: tuple[str, ...]) -> None:
    """As through `MixedLinear`, one layer after another; ranks of many kinds, vectors, and rows of the base."""
    torch.manual_seed(1)
    inputs, outputs = 40, 48
    layers = {name: torch.nn.Linear(inputs, outputs, dtype=torch.bfloat16) for name in names}
    base = torch.nn.ModuleDict(layers)
    base.dtype, base.device = torch.bfloat16, torch.device("cpu")  # type: ignore[assignment]
    mix = Mix(base)
    sizes = {"inputs": inputs, "outputs": outputs}
    some = [
        random_adapter(3, *names, **sizes),
        random_adapter(21, names[-1], **sizes, vectors=True),
        random_adapter(5, names[0], **sizes, vectors=True),
        *([random_adapter(0, "a", **sizes, vectors=True)] if len(names) == 1 else []),
    ]
    numbers = [mix.add(adapter) for adapter in some]
    rows = [*numbers, 0, numbers[0], *numbers[::-1]]
    mix.select(rows)
    x = torch.randn(len(rows), inputs, dtype=torch.bfloat16)
    residual = torch.randn(len(rows), outputs * len(names), dtype=torch.bfloat16)
    mixed = [base[name] for name in names]
    assert all(isinstance(layer, MixedLinear) for layer in mixed)
    wanted = torch.cat([layer(x[:, None])[:, 0] for layer in mixed], 1)

    parent = SimpleNamespace(**layers)
    prompts = torch.randn(len(rows), 37, inputs, dtype=torch.bfloat16)
    wanted_of_prompts = torch.cat([layer(prompts) for layer in mixed], 2)
    mix.by_kernels, mix.spans_apart = True, False
    mix._stacked.clear()
    mix.select([0])
    mix.select(rows)
    lines = device_layers._Lines(parent, names)
    assert lines.understood(mix)
    lines.lay_together()
    mix.together = {name: (names, (outputs,) * len(names), n) for n, name in enumerate(names)}
    for given, expected in ((prompts, wanted_of_prompts), (x[:, None], wanted[:, None])):
        found = torch.cat([layer(given) for layer in mixed], 2)
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
    torch.testing.assert_close(lines.output(x, mix), wanted, atol=0.02, rtol=0.02)
    torch.testing.assert_close(lines.output(x, mix, residual), wanted + residual, atol=0.04, rtol=0.02)
    mix.select([0] * len(rows))
    plain = torch.cat([layer(x) for layer in layers.values()], 1)
    torch.testing.assert_close(lines.output(x, mix, residual), plain + residual, atol=0.02, rtol=0.02)


def test_recorded_steps_of_all_kinds_go_through_the_kernels(
    base_folder: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is held against a plain one: the interpreter rounds bf16 downwards, which parts greedy answers."""
    monkeypatch.setattr(slots_module, "wanted", lambda _: True)
    monkeypatch.setattr(slots_engine, "pack", lambda _: None)  # as on a GPU
    monkeypatch.setattr(device_layers, "usable", lambda _: True)
    monkeypatch.setattr(graphs, "_STEPS_BEFORE", 0)
    for module in (slots_module, graphs):
        monkeypatch.setattr(module, "COLUMNS", 32)
    decoded: list[int] = []
    apart: list[float] = []
    read: list[tuple[int, ...]] = []
    decode, step, plain_read = (
        device_layers.DeviceLayer.decode,
        graphs.Graphs.step,
        device_layers.DeviceLayer.read,
    )

    def counted(self: device_layers.DeviceLayer, x: torch.Tensor, *given: object) -> torch.Tensor:
        decoded.append(len(x))
        return decode(self, x, *given)  # type: ignore[arg-type]

    def read_alike(
        self: device_layers.DeviceLayer, x: torch.Tensor, *given: Any, **more: Any
    ) -> torch.Tensor:
        read.append(x.shape[:2])
        return plain_read(self, x, *given, **more)

    def compared(self: graphs.Graphs, slots: Slots, tokens: list[int]) -> torch.Tensor | None:
        logits = step(self, slots, tokens)
        assert logits is not None
        plain = slots.step_plain(tokens)
        apart.append(float((logits - plain).abs().max() / plain.abs().max()))
        return logits

    monkeypatch.setattr(device_layers.DeviceLayer, "decode", counted)
    monkeypatch.setattr(device_layers.DeviceLayer, "read", read_alike)
    monkeypatch.setattr(graphs.Graphs, "step", compared)
    base = parse_method({"name": "zero_shot"}).load_base(base_folder, "bfloat16", "cpu")
    shared = SlotsBase(base, load_tokenizer(base_folder), EngineLimits(max_batch=4, max_queued=9))
    kinds = ("lora", "ia3", "prefix_tuning")
    engines = [SlotEngine(shared, Adapter())]
    engines += [SlotEngine(shared, read_adapter(adapters[kind], base)) for kind in kinds]

    async def answer(of: SlotEngine, number: int) -> list[object]:
        return [e async for e in of.submit(GenerationRequest(tuple(range(5 + number, 9 + 2 * number)), 3))]

    async def all_of_them() -> None:
        await asyncio.gather(*(answer(of, n) for n, of in enumerate(engines)))

    asyncio.run(all_of_them())
    shared.close()
    assert {rows for rows, _ in read} >= {3, 1}, "prompts, those with a prefix for themselves"
    assert 4 in decoded and apart and max(apart) < 0.05, (decoded, apart)
