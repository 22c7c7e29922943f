"""Layers that compiled loops decode whole, and products by matrix tiles: what torch says, on a CPU with AMX."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from regraft.evals.slots import Slots
from serving.engines.adapters import read_adapter
from serving.engines.mixed import Mix
from serving.engines.packed import PackedLinear, pack

pytest.importorskip("serving.engines.kernels", exc_type=ImportError)
if not torch.cpu.get_capabilities().get("amx_bf16"):
    pytest.skip("this processor has no matrix tiles", allow_module_level=True)

from serving.engines.layers import FusedLayer, fuse
from serving.engines.plain import replace_plain


@pytest.fixture(autouse=True)
def one_thread_with_loops(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("REGRAFT_KERNELS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 32])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_by_tiles_is_the_layers(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    parent = nn.Module()
    parent.layer = nn.Linear(96, 160, bias=bias, dtype=torch.bfloat16)
    x = torch.randn(rows, 1, 200, dtype=torch.bfloat16)[..., 40:136]
    more = torch.randn(rows, 1, 160, dtype=torch.bfloat16)
    with torch.inference_mode():
        wanted = parent.layer(x.contiguous())
        pack(parent_on_cpu(parent))
        assert isinstance(parent.layer, PackedLinear)
        product = parent.layer.product
        assert product.most == 32
        torch.testing.assert_close(parent.layer(x), wanted, rtol=1e-2, atol=1e-2)
        added = more.clone()
        product.write(x.data_ptr(), added.data_ptr(), (rows, 96, 160, 200), added.data_ptr())
        torch.testing.assert_close(added, more + wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("outputs", "inputs"), [(80, 64), (64, 72)])
def test_weights_of_no_whole_blocks_are_torchs(outputs: int, inputs: int) -> None:
    parent = nn.Module()
    parent.layer = nn.Linear(inputs, outputs, dtype=torch.bfloat16)
    x = torch.randn(3, 1, inputs, dtype=torch.bfloat16)
    with torch.inference_mode():
        wanted = parent.layer(x)
        pack(parent_on_cpu(parent))
        assert parent.layer.product.most == 0  # type: ignore[union-attr]
        torch.testing.assert_close(parent.layer(x), wanted, rtol=1e-2, atol=1e-2)


def test_rows_of_many_adapters_are_decoded_as_without_loops(
    wide: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that join and leave, of every kind of adapter and of none; every step through all layers."""
    monkeypatch.setenv("REGRAFT_KERNELS", "0")
    plain, plain_numbers = mixed(wide, adapters)
    monkeypatch.setenv("REGRAFT_KERNELS", "1")
    fused, numbers = mixed(wide, adapters)
    layers = [layer.forward for layer in fused.base.model.layers]
    assert all(isinstance(layer, FusedLayer) for layer in layers)
    assert numbers == plain_numbers
    decoded = []
    for layer in layers:
        inner = layer.decode
        monkeypatch.setattr(layer, "decode", lambda *given, inner=inner: decoded.append(1) or inner(*given))
    for which in ([0] * 5, [*numbers, 0], numbers[::-1], [numbers[0]] * 3):
        found, wanted = (decode(side, which) for side in (fused, plain))
        apart = (found - wanted).abs().max() / wanted.abs().max()
        assert apart < 0.06
    assert len(decoded) == 4 * 3 * len(layers)


def test_a_layer_that_adds_something_keeps_its_code(wide: Path) -> None:
    from regraft.methods import parse_method

    base: Any = parse_method({"name": "zero_shot"}).load_base(wide, "bfloat16", "cpu")
    first, second = base.model.layers
    first.post_attention_layernorm.register_forward_hook(lambda _, __, out: out * 1.5)

    class Other(type(second)):  # type: ignore[misc]
        def forward(self, *given: Any, **more: Any) -> Any:
            return super().forward(*given, **more) * 2

    second.__class__ = Other
    pack(base)
    replace_plain(base)
    assert fuse(base, Mix(base), 8) == 0


class Side:
    """A base with adapters, and what decodes it."""

    def __init__(self, base: Any) -> None:
        self.base, self.mix = base, Mix(base)
        fuse(base, self.mix, 16)


def mixed(folder: Path, adapters: dict[str, Path]) -> tuple[Side, list[int]]:
    from regraft.methods import parse_method

    base: Any = parse_method({"name": "zero_shot"}).load_base(folder, "bfloat16", "cpu")
    pack(base)
    replace_plain(base)
    side = Side(base)
    kinds = ("lora", "dora", "ia3")
    return side, [side.mix.add(read_adapter(adapters[kind], base)) for kind in kinds]


@torch.inference_mode()
def decode(side: Side, which: list[int]) -> torch.Tensor:
    """The logits of three steps after a prompt."""
    slots = Slots(side.base, 16, side.mix)
    side.mix.select(which)
    ids = torch.arange(4 * len(which)).view(len(which), 4) % 50 + 5
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    slots.read({"input_ids": ids, "attention_mask": mask})
    return torch.stack([slots.step([7 + n] * len(which)).clone() for n in range(3)]).float()


def parent_on_cpu(parent: Any) -> Any:
    """A module with what `pack` asks of a transformers model."""
    parent.device, parent.dtype = torch.device("cpu"), torch.bfloat16
    return parent


@pytest.fixture(scope="module")
def wide(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model if its layers are of whole blocks, as most are."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base_folder)
    assert config.hidden_size % 32 == config.intermediate_size % 32 == 0
    return base_folder
