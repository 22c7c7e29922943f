"""What a trial will need, from configuration alone: the model is built without weights, on the meta device.

Memory is what this project's loop holds on the way: see `docs/preflight.md` for the terms and for how far the
predictions were from what was measured.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from regraft.config import EvaluateSection, SweepSection
from regraft.methods import LoRA, Method
from regraft.methods.base import DTypeName, empty_causal_lm
from regraft.methods.lora_init import FromWeights
from regraft.methods.tuner import TunerMethod
from regraft.training.kernels.blocks import KEPT_LENGTH
from regraft.training.kernels.cross_entropy import LOGITS, SHARES

GIB = 2**30
#: A process with torch, transformers, PEFT and MLflow's client loaded, before any model. Measured (RSS).
_PROCESS = int(0.62 * GIB)
#: What bitsandbytes adds to it on a CPU: its library, and layers before they are quantised. Measured.
_QUANTISING = int(0.3 * GIB)
#: What the CUDA context and its libraries take beside torch's own allocations, per device.
_CUDA_CONTEXT = int(0.6 * GIB)
#: Memory of the cards people ask about, in bytes.
CARDS = {"24 GB": 24e9, "48 GB": 48e9, "80 GB": 80e9}
#: Share of the matrix rate that the loop reaches on a CPU: the median of `benchmarks/preflight.py`. That of
#: a GPU is assumed; nobody has measured it yet.
UTILISATION = {"cpu": 0.62, "cuda": 0.4}
#: AdamW reads four fp32 values a parameter and writes three, at the rate of this memory (bytes a second).
_OPTIMISER_BYTES, _MEMORY_RATE = 28, {"cpu": 2e10, "cuda": 1e12}
#: What glibc's heap holds beside the tensors where layers are computed again, in inner values a token and
#: layer: blocks of many sizes come and go between those that stay. Measured; CUDA's allocator holds far
#: less.
_HEAP_AGAIN = 1
#: What padding adds to a batch, where examples do not share a row.
_PADDING = 1.1


class Shape(NamedTuple):
    """Sizes of a decoder, in parameters and in values a token."""

    linear: int
    embedding: int
    head: int
    other: int
    layers: int
    hidden: int
    heads: int
    queries: int
    keys: int
    inner: int
    vocabulary: int
    widest: int

    @property
    def parameters(self) -> int:
        """All of the model's; a tied head counts once."""
        return self.linear + self.embedding + self.head + self.other


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


@lru_cache(maxsize=8)
def shape_of(folder: Path) -> Shape:
    """Read a model's sizes from its `config.json`; no weights are needed.

    Raises:
        regraft.errors.ModelError: If transformers cannot build the model.
    """
    base: Any = empty_causal_lm(folder)
    head = base.get_output_embeddings()
    embedding = base.get_input_embeddings()
    linear, widest = 0, 0
    for module in base.modules():
        if type(module).__name__ == "Linear" and module is not head:
            linear += module.weight.numel()
            widest = max(widest, module.weight.numel())
    tied = head is None or head.weight is embedding.weight
    total = sum(p.numel() for p in base.parameters())
    config = base.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    apart = 0 if tied else head.weight.numel()
    return Shape(
        linear=linear,
        embedding=embedding.weight.numel(),
        head=apart,
        other=total - linear - embedding.weight.numel() - apart,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        queries=heads * width,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * width,
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocabulary=config.vocab_size,
        widest=widest,
    )


@lru_cache(maxsize=256)
def trained_by(method: Method, folder: Path) -> int:
    """How many parameters a method trains, by applying it to a model without values."""
    import torch

    if method.kind == "control":
        return 0
    if isinstance(method, FromWeights):  # same shapes as LoRA's, but the start needs the weights' values
        same = set(LoRA.model_fields) - {"name"}
        method = LoRA(**{field: getattr(method, field) for field in same})
    if "initial_text" in type(method).model_fields:  # needs the tokenizer and values
        method = method.model_copy(update={"initial_text": None})
    base = empty_causal_lm(folder)
    with torch.device("meta"):
        model = method.apply(base)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


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


def flops_per_token(method: Method, folder: Path, batching: Batching, supervised: float = 0.3) -> float:
    """Floating-point operations of training on one token.

    Two a weight forward and two for the gradient that passes on; two more where the weights train, and two
    where the forward pass is run again. The head counts at supervised positions only. Attention over half the
    length limit: four forward, ten backward with the scores taken again.
    """
    shape = shape_of(folder)
    trained = trained_by(method, folder)
    forward = 2.0 * shape.linear
    total = forward * (2 + batching.gradient_checkpointing + (method.kind == "full"))
    total += 0 if method.kind == "full" else 6 * trained
    total += supervised * shape.vocabulary * shape.hidden * (6 if method.kind == "full" else 4)
    return total + 14 * shape.layers * shape.queries * batching.max_length / 4


def micro_tokens(
    method: Method, folder: Path, dtype: DTypeName, device: str, batching: Batching, limit_gib: float
) -> int:
    """The largest micro-batch that training fits with: the batch, or half of it, or half of that.

    No smaller than the longest row; whether that fits is for the caller to see.
    """
    tokens = batching.tokens_per_batch
    while tokens // 2 >= batching.max_length:
        tried = batching._replace(tokens_per_batch=tokens)
        if predict(method, folder, dtype, device, tried).training_gib <= limit_gib:
            break
        tokens //= 2
    return tokens


def mend(
    method: Method, folder: Path, dtype: DTypeName, device: str, batching: Batching, limit_gib: float
) -> str:
    """How a trial gets under a limit: in micro-batches, which is done anyway; by other settings; or not."""
    for again in (batching.gradient_checkpointing, True):
        smaller = batching._replace(gradient_checkpointing=again)
        tokens = micro_tokens(method, folder, dtype, device, smaller, limit_gib)
        words = ["gradient_checkpointing"] if again != batching.gradient_checkpointing else []
        rows = batching.answer_rows
        while True:
            fitted = smaller._replace(tokens_per_batch=tokens, answer_rows=rows)
            found = predict(method, folder, dtype, device, fitted)
            if found.gib <= limit_gib or found.training_gib > limit_gib or rows == 1:
                break
            rows //= 2
        if found.gib <= limit_gib:
            words += [f"evaluate.batch_size {rows}"] if rows < batching.answer_rows else []
            words += [f"micro-batches of {tokens} tokens"] if tokens < batching.tokens_per_batch else []
            return "with " + " and ".join(words) if words else "fits"
    return "does not fit with smaller batches either"


def on_card(method: Method, folder: Path, batching: Batching, bytes_of_card: float) -> str:
    """How a trial fits on cards of a size: as it is, mended, or shared among how many of them."""
    limit = bytes_of_card / GIB
    if not (mended := mend(method, folder, "bfloat16", "cuda", batching, limit)).startswith("does not"):
        return mended
    again = batching._replace(
        tokens_per_batch=batching.max_length, gradient_checkpointing=True, answer_rows=1
    )
    for cards in (2, 4, 8, 16, 32, 64):
        if predict(method, folder, "bfloat16", "cuda", again._replace(shards=cards)).gib <= limit:
            return f"sharded over {cards}"
    return "no"


def seconds(
    method: Method, folder: Path, batching: Batching, tokens: float, rate: float, device: str = "cpu"
) -> float:
    """How long training on a number of tokens takes.

    Args:
        method: With all its settings.
        folder: With the base's `config.json`.
        batching: What passes at once.
        tokens: Of the whole run, on one worker.
        rate: What `matmul_rate` gave for the device.
        device: Where it trains.
    """
    where = device.partition(":")[0]
    work = tokens * flops_per_token(method, folder, batching) * method.slowness
    steps = tokens / batching.tokens_per_batch
    optimiser = steps * trained_by(method, folder) * _OPTIMISER_BYTES / _MEMORY_RATE[where]
    return work / (rate * UTILISATION[where]) + optimiser


def matmul_rate(threads: int | None = None, device: str = "cpu") -> float:
    """Operations a second of a device's bf16 matrix product, from a tenth of a second of them."""
    import time

    import torch

    if device.startswith("cuda"):
        left, right = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
        left @ right
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(16):
            left @ right
        torch.cuda.synchronize(device)
        return 16 * 2 * 8192**3 / (time.perf_counter() - began)
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        left, right = torch.randn(512, 1024).bfloat16(), torch.randn(1024, 1024).bfloat16()
        left @ right
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < 0.1:
            left @ right
            count += 1
        return 2 * 512 * 1024 * 1024 * count / (time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
