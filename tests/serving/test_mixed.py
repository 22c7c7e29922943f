"""Rows of one batch that have different adapters: each layer answers every row as its own adapter says."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import nn

from regraft.methods import parse_method
from serving.engines.adapters import Adapter, read_adapter
from serving.engines.mixed import Mix, alike
from serving.engines.packed import pack

INPUTS, OUTPUTS = 24, 40


class Base(nn.Module):
    """One layer, as a transformers model has it."""

    device = torch.device("cpu")

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.layer: nn.Module = nn.Linear(INPUTS, OUTPUTS, dtype=dtype)


def some_adapters() -> list[Adapter]:
    def pair(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(rank, INPUTS), torch.randn(OUTPUTS, rank)

    scale, shift, of_inputs = (torch.rand(n) + 0.5 for n in (OUTPUTS, OUTPUTS, INPUTS))
    return [
        Adapter(low_rank={"layer": pair(2)}),
        Adapter(low_rank={"layer": pair(5)}),
        Adapter(low_rank={"layer": pair(3)}, out_scale={"layer": scale}, out_shift={"layer": shift}),
        Adapter(in_scale={"layer": of_inputs}),
        Adapter(out_scale={"layer": scale.flip(0)}),
        Adapter(embeddings=torch.randn(3, INPUTS)),
    ]


def alone(layer: nn.Linear, adapter: Adapter, x: torch.Tensor) -> torch.Tensor:
    """What the row's adapter means, written down without any batch."""
    read = x * adapter.in_scale["layer"] if adapter.in_scale else x
    y: torch.Tensor = layer(read.to(x.dtype)).float()
    if adapter.low_rank:
        down, up = adapter.low_rank["layer"]
        y = y + x.float() @ down.T @ up.T
    if adapter.out_scale:
        y = y * adapter.out_scale["layer"]
    if adapter.out_shift:
        y = y + adapter.out_shift["layer"]
    return y.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("loops", ["0", "1"])
def test_each_row_is_its_own_adapters(
    loops: str, tokens: int, apart: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whichever way, and when rows come and go: all adapters at once, two of them, one, none."""
    monkeypatch.setenv("REGRAFT_KERNELS", loops)
    torch.manual_seed(0)
    base = Base(dtype)
    inner = base.layer
    assert isinstance(inner, nn.Linear)
    mix = Mix(base)
    numbers = [0, *(mix.add(adapter) for adapter in some_adapters())]
    draws, close = random.Random(0), 1e-4 if dtype == torch.float32 else 2e-2
    with torch.inference_mode():
        for some in (numbers, numbers[:3], numbers[3:5], numbers[2:3], numbers[:1], numbers[1:2]):
            rows = [draws.choice(some) for _ in range(9)]
            x = torch.randn(9, tokens, INPUTS, dtype=dtype)
            kept = x.clone()
            mix.select(rows)
            mix.spans_apart = apart
            found = base.layer(x)
            assert found.dtype == dtype
            assert torch.equal(x, kept)
            for row, number in enumerate(rows):
                wanted = alone(inner, mix.adapter(number), x[row])
                torch.testing.assert_close(found[row], wanted, rtol=close, atol=close)


def test_an_adapter_that_goes_is_in_no_later_batch() -> None:
    torch.manual_seed(0)
    base = Base(torch.float32)
    mix = Mix(base)
    first, second = (mix.add(adapter) for adapter in some_adapters()[:2])
    x = torch.randn(2, 1, INPUTS)
    with torch.inference_mode():
        mix.select([first, second])
        before = base.layer(x)
        mix.select([second, second])
        mix.remove(first)
        third = mix.add(Adapter())
        mix.select([third, second])
        after = base.layer(x)
    assert torch.allclose(after[1], before[1], atol=1e-5)
    assert not torch.allclose(after[0], before[0], atol=1e-2)


def test_prompts_of_like_lengths_go_together() -> None:
    assert alike([], 10) == []
    assert alike([5, 5, 6, 5], 10) == [[0, 1, 3, 2]]
    assert alike([5, 300, 6, 295], 10) == [[0, 2], [3, 1]]
    draws = random.Random(1)
    lengths = [draws.randrange(1, 400) for _ in range(32)]
    for cost in (0, 50, 10**6):
        batches = alike(lengths, cost)
        assert sorted(i for batch in batches for i in batch) == list(range(32))
    assert len(alike(lengths, 10**6)) == 1


def test_an_adapter_is_read_the_same_for_a_base_that_is_packed(
    base_folder: Path, adapters: dict[str, Path]
) -> None:
    """DoRA's norms need the base's weights, which a packed layer has to give back."""
    plain, packed = (
        parse_method({"name": "zero_shot"}).load_base(base_folder, "bfloat16", "cpu") for _ in "ab"
    )
    pack(packed)
    for kind in ("dora", "ia3"):
        wanted, found = read_adapter(adapters[kind], plain), read_adapter(adapters[kind], packed)
        assert wanted.out_scale
        assert found.out_scale.keys() == wanted.out_scale.keys()
        assert all(torch.equal(found.out_scale[n], scale) for n, scale in wanted.out_scale.items())


def test_layers_that_read_the_same_are_one_product(base_folder: Path) -> None:
    """Whatever they are asked in which order, and when one of them reads something else."""
    plain, packed = (
        parse_method({"name": "zero_shot"}).load_base(base_folder, "bfloat16", "cpu") for _ in "ab"
    )
    pack(packed)
    torch.manual_seed(0)
    some, other = (torch.randn(3, 1, plain.config.hidden_size, dtype=torch.bfloat16) for _ in "ab")
    wanted, found = (base.model.layers[0].self_attn for base in (plain, packed))
    asked = [("q_proj", some), ("k_proj", some), ("v_proj", some), ("v_proj", some), ("q_proj", some)]
    asked += [("k_proj", other), ("q_proj", other), ("k_proj", some), ("v_proj", other)]
    with torch.inference_mode():
        for name, x in asked:
            out = getattr(found, name)(x)
            torch.testing.assert_close(out, getattr(wanted, name)(x), rtol=1e-2, atol=1e-2)
            out.zero_()  # what was given belongs to who asked
    for name in ("q_proj", "k_proj", "v_proj"):
        assert torch.equal(getattr(found, name).weight, getattr(wanted, name).weight)
