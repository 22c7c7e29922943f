"""FSDP2: each worker holds a part of the weights, and a layer is whole only while it computes.

What is trained in full precision and in bulk (full fine-tuning) is sharded with its gradients and optimiser
state. Adapters are small: each worker keeps all of them, and their gradients are averaged by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from regraft.training.distributed import Workers


def shard(model: nn.Module, base: nn.Module, device: str, workers: Workers) -> None:
    """Split a model over the workers, in place, if they are to shard it; it computes what it did before.

    Layers travel in bf16 where they are trained, as autocast would multiply them in bf16 anyway; embeddings,
    head and the stream between the layers stay fp32, as in an unsharded run.

    Args:
        model: What is called: the hooks of the outermost module make embeddings and head whole.
        base: The transformers model inside.
        device: Where it shall compute; it may still be on the CPU, from where it is moved layer by layer.
        workers: Those that train together.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    where = torch.device(device)
    if workers.shards == 1:
        if workers.shard:  # the last one left; the model may still be on the CPU
            model.to(where)
        return
    _plain_weights(base)
    in_full = any(p.requires_grad for p in base.parameters()) and model is base
    # An adapter may share a parameter's dtype with nothing else in its layer, and is small: it stays whole.
    whole = set() if in_full else {p for p in model.parameters() if p.requires_grad or p.ndim == 0}
    for parameter in whole:
        parameter.data = parameter.data.to(where)
    in_bf16 = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(where.type, (workers.size,)),
        "ignored_params": whole,
    }
    names = set(getattr(base, "_no_split_modules", None) or ())
    for module in base.modules():
        if type(module).__name__ in names:
            fully_shard(module, mp_policy=in_bf16 if in_full else MixedPrecisionPolicy(), **settings)
    # In parts again after each pass, or a checkpoint would find some weights whole.
    fully_shard(model, reshard_after_forward=True, **settings)


def gather(model: nn.Module, *, keep: bool) -> None:
    """Put what was trained together again, in place and on the CPU; all workers must join.

    What is frozen stays in parts: it is on disk already. The model can be saved afterwards, and no more.

    Args:
        model: A model that went through `shard`.
        keep: Whether this worker wants the weights.
    """
    from torch import nn
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    together: dict[int, nn.Parameter] = {}  # tied weights are one parameter under two names
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if isinstance(parameter, DTensor) and parameter.requires_grad:
                if id(parameter) not in together:
                    full = parameter.detach().full_tensor()
                    together[id(parameter)] = nn.Parameter(full.cpu() if keep else full.new_empty(0))
                module._parameters[name] = together[id(parameter)]
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # fully_shard puts FSDPModule before the class; saving looks at the class's name.
            module.__class__ = type(module).__bases__[1]


def is_sharded(parameter: Any) -> bool:
    """Whether this process holds a part of a parameter alone."""
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def place(parameter: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """The part of a whole tensor that this process holds of `parameter`, laid out like it."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return full.to(parameter.device)
    mesh = parameter.device_mesh
    # FSDP splits the first dimension as torch.chunk does; the last workers may get nothing.
    parts = full.chunk(mesh.size(), dim=0)
    rank = mesh.get_local_rank()
    mine = parts[rank] if rank < len(parts) else full[:0]
    return DTensor.from_local(
        mine.contiguous().to(parameter.device), mesh, parameter.placements, shape=full.shape,
        stride=full.stride(),
    )  # fmt: skip


def save_part(
    folder: Path,
    parameters: dict[str, torch.nn.Parameter],
    optimiser: torch.optim.Optimizer,
    workers: Workers,
) -> None:
    """Write this worker's part of the trained weights and of the optimiser's state."""
    import torch
    from safetensors.torch import save_file

    found: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        if workers.rank > 0 and not is_sharded(parameter):
            continue  # the first worker writes what all have
        found[f"weight/{name}"] = local(parameter.detach()).contiguous()
        for kind, value in optimiser.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                found[f"{kind}/{name}"] = local(value).contiguous()
    save_file(found, folder / f"part-{workers.rank}-of-{workers.size}.safetensors")


def load_parts(
    folder: Path, parameters: dict[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer
) -> bool:
    """Load what `save_part` wrote, on as many workers as there are now; False if it is of another model.

    The parts are put together one tensor at a time. A folder that holds no parts is of another run too.
    """
    import torch
    from safetensors import safe_open

    def rank(file: Path) -> int:
        return int(file.name.split("-")[1])

    files: list[Any] = [
        safe_open(f, framework="pt") for f in sorted(folder.glob("part-*.safetensors"), key=rank)
    ]
    if not files:
        return False
    held = [set(f.keys()) for f in files]
    saved = held[0]
    if {k.removeprefix("weight/") for k in saved if k.startswith("weight/")} != parameters.keys():
        return False

    def whole(key: str) -> torch.Tensor:
        parts = [f.get_tensor(key) for f, keys in zip(files, held, strict=True) if key in keys]
        return parts[0] if parts[0].ndim == 0 else torch.cat(parts)

    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(place(parameter, whole(f"weight/{name}")))
            kinds = [
                k.split("/", 1)[0] for k in saved if k.endswith(f"/{name}") and k.split("/", 1)[1] == name
            ]
            for kind in kinds:
                if kind != "weight":
                    value = whole(f"{kind}/{name}")
                    # The count of steps is a number, the moments are laid out like the weights.
                    optimiser.state[parameter][kind] = value if value.ndim == 0 else place(parameter, value)
    return True


def _plain_weights(base: nn.Module) -> None:
    """Give quantised layers plain tensors: bitsandbytes' own cannot be split, and it takes plain ones back.

    A layer keeps what is needed to read its weights; bitsandbytes wraps them anew at each forward pass.
    """
    import torch
    from torch import nn

    for module in base.modules():
        if getattr(module, "quant_state", None) is not None and isinstance(module, nn.Linear):
            packed = module.weight.detach().as_subclass(torch.Tensor)
            module.weight = nn.Parameter(packed, requires_grad=False)
