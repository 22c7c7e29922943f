"""The peak memory of a trial, term by term: what this project's loop holds on the way.

See `docs/preflight.md` for the terms and for how far predictions were from what was measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from regraft.config import EvaluateSection, SweepSection
from regraft.methods import Method
from regraft.methods.base import DTypeName
from regraft.methods.tuner import TunerMethod
from regraft.training.kernels.blocks import KEPT_LENGTH
from regraft.training.kernels.cross_entropy import LOGITS, SHARES
from regraft.training.preflight.shapes import Shape, shape_of, trained_by

GIB = 2**30
#: A process with torch, transformers, PEFT and MLflow's client loaded, before any model. Measured (RSS).
_PROCESS = int(0.62 * GIB)
#: What bitsandbytes adds to it on a CPU: its library, and layers before they are quantised. Measured.
_QUANTISING = int(0.3 * GIB)
#: What the CUDA context and its libraries take beside torch's own allocations, per device. Measured on an
#: H100 (torch 2.11): 0.68 to 0.74 GiB.
_CUDA_CONTEXT = int(0.75 * GIB)
#: What glibc's heap holds beside the tensors where layers are computed again, in inner values a token and
#: layer: blocks of many sizes come and go between those that stay. Measured; CUDA's allocator holds far
#: less.
_HEAP_AGAIN = 1
#: What padding adds to a batch, where examples do not share a row.
_PADDING = 1.1


class Batching(NamedTuple):
    """What passes through the model at once. Lengths are in tokens."""

    tokens_per_batch: int = 1024
    max_length: int = 512
    gradient_checkpointing: bool = False
    answer_rows: int = 32
    answer_tokens: int = 64
    shards: int = 1
    packed: bool = True

    @classmethod
    def of(cls, sweep: SweepSection, evaluate: EvaluateSection, *, sharded: bool = False) -> Batching:
        """What a sweep's trials let through at once."""
        return cls(
            sweep.tokens_per_batch,
            sweep.max_length,
            sweep.gradient_checkpointing,
            evaluate.batch_size,
            evaluate.max_new_tokens,
            sweep.workers_per_trial if sharded else 1,
            sweep.packing is not False,
        )


class Memory(NamedTuple):
    """Predicted peak of one device (or process), in bytes, by what takes it."""

    weights: float
    adapter: float
    gradients: float
    optimiser: float
    activations: float
    loss: float
    answering: float
    overhead: float

    @property
    def training_gib(self) -> float:
        """The peak of training, in GiB."""
        return (sum(self) - self.answering) / GIB

    @property
    def gib(self) -> float:
        """The peak in GiB. Training and answering follow one another: the larger counts."""
        held = self.weights + self.adapter + self.overhead
        return max(self.training_gib, (held + self.answering) / GIB)

    @property
    def parts(self) -> str:
        """The three largest parts, for people."""
        named = self._asdict()
        if self.gib == self.training_gib:
            del named["answering"]
        largest = sorted(named.items(), key=lambda part: -part[1])[:3]
        return ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest)


def predict(
    method: Method, folder: Path, dtype: DTypeName, device: str, batching: Batching | None = None
) -> Memory:
    """Predict the peak memory of a trial on each of its devices.

    Args:
        method: With all its settings.
        folder: With the base's `config.json`.
        dtype: Type of a frozen base.
        device: `cpu` counts the process, `cuda` what torch allocates and the CUDA context.
        batching: What passes at once; the defaults of a sweep if not given.
    """
    batching = batching or Batching()
    shape = shape_of(folder)
    trained = trained_by(method, folder)
    value = 2 if dtype == "bfloat16" else 4
    full = method.kind == "full"
    share = batching.shards
    weights = _weights(method, shape, value) / share
    if share > 1:  # one layer at a time is gathered whole, in the type it is computed in
        weights += shape.linear / shape.layers * 2
    state = trained / (share if full else 1)
    tokens = _tokens(method, batching)
    width = 2 if full else value  # full fine-tuning computes in bf16 whatever it is held in
    layer = _layer_values(method, shape, batching, device) * width
    kept = tokens * shape.hidden * (4 if full else width) * shape.layers
    activations = kept + tokens * layer if batching.gradient_checkpointing else tokens * layer * shape.layers
    # Gradients on their way through one layer: the inner values of the feed-forward net, four times over.
    passing = 4 + (_HEAP_AGAIN * shape.layers if batching.gradient_checkpointing and device == "cpu" else 0)
    activations += tokens * passing * shape.inner * width
    activations += shape.linear * getattr(method, "kept_weights", 0.0)
    if method.quantised:  # a layer's weights are unpacked for each product
        activations += shape.widest * value
    return Memory(
        weights=weights,
        adapter=0 if full else trained * 4,
        gradients=state * 4 if method.trains else 0,
        optimiser=state * 8 if method.trains else 0,
        activations=activations if method.trains else tokens * 6 * shape.inner * value,
        loss=_loss(method, shape, tokens, width, device),
        answering=_answering(shape, batching, 2 if full else value),
        overhead=_CUDA_CONTEXT if device.startswith("cuda") else _PROCESS + method.quantised * _QUANTISING,
    )


def _weights(method: Method, shape: Shape, value: int) -> float:
    if method.kind == "full":
        # fp32, and the bf16 copies that autocast keeps from the forward to the backward pass.
        return shape.parameters * 4 + shape.linear * 2
    if not method.quantised:
        return shape.parameters * value
    # NF4: four bits, and a constant for every 64 values in fp32, or quantised again: in 8 bits, with an fp32
    # one for 256 of them (QLoRA, section 3).
    bits = 4 + (8 / 64 + 32 / 64 / 256 if getattr(method, "quantise", None) == "nf4_double" else 32 / 64)
    return shape.linear * bits / 8 + (shape.parameters - shape.linear) * value


def _tokens(method: Method, batching: Batching) -> float:
    """Positions of the largest batch, with padding where rows are not shared.

    Virtual tokens come on top of each row, of a quarter of the limit.
    """
    tokens: float = max(batching.tokens_per_batch, batching.max_length)
    if not (batching.packed and method.support.packs):
        tokens = max(_PADDING * batching.tokens_per_batch, batching.max_length)
    return tokens * (1 + 4 * method.row_tokens / batching.max_length)


def _layer_values(method: Method, shape: Shape, batching: Batching, device: str) -> float:
    """Values a token that one decoder layer keeps for its backward pass, with frozen or trained weights.

    The input of a linear layer is kept only if the layer trains or an adapter reads it. A norm keeps its
    input: once in the type of the computation on a CPU (`kernels/norm.py`), in fp32 elsewhere and in full
    fine-tuning, whose residual stream is fp32.
    """
    attention: float = shape.queries + 2 * shape.keys  # queries, keys, values
    if device == "cpu":  # the softmax of short rows, over half of them (`kernels/blocks.py`)
        attention += shape.heads * min(batching.max_length, KEPT_LENGTH) / 2
    net = 3 * shape.inner  # gate, its activation, up
    plain = device == "cpu" and method.kind != "full"
    norms = 2 * shape.hidden * (1 if plain else 2)
    if method.kind == "full":
        # Both norms keep their input and its normalised form in fp32; every linear layer its own bf16 input.
        return 8 * shape.hidden + 5 * shape.hidden + attention + 2 * shape.queries + net + shape.inner
    if not isinstance(method, TunerMethod):
        return attention + net + norms + shape.queries  # the attention's own output
    read = 2 * shape.hidden + shape.queries + shape.inner
    written = 2 * shape.hidden + shape.queries + 2 * shape.keys + 2 * shape.inner
    inputs = method.kept_inputs
    if getattr(method, "dropout", 0.0):  # not fused: PEFT keeps the casts to fp32
        inputs = max(inputs, TunerMethod.kept_inputs)
    return attention + net + norms + inputs * read + method.kept_outputs * written


def _loss(method: Method, shape: Shape, tokens: float, width: int, device: str) -> float:
    where, every = device.partition(":")[0], tokens * shape.vocabulary
    shares = min(every, SHARES[where]) * 4 + tokens * shape.hidden * width
    if method.kind == "full":
        return min(every, 4 * LOGITS[where]) * 2 + shares + shape.embedding * (2 + 4 + 4)
    return min(every, LOGITS[where]) * width + shares


def _answering(shape: Shape, batching: Batching, value: int) -> float:
    length = batching.max_length + batching.answer_tokens
    cache = 2 * shape.layers * shape.keys * length * value
    passing = batching.max_length * (4 * shape.inner + 4 * shape.hidden) * value
    return batching.answer_rows * (cache + passing + shape.vocabulary * 8)
