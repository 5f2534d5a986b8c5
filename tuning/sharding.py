"""FSDP2: every process holds its share of parameters, gradients and optimizer state, and gathers a block to use it.

`accelerate launch` with `accelerate_configs/fsdp2.yaml` asks for it. The model is split once, before the first stage;
stages then open and close the shares themselves. Checkpoints and ``model/`` hold whole tensors, so a run goes on with
any number of processes, sharded or not.

Accelerate's own FSDP2 needs the optimizer beside the model when it splits, and is silently off on a CPU. Here its
plugin only says what was asked for, `torch.distributed.fsdp.fully_shard` does it, and the accelerator sees plain
processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tuning.blocks import repeated_blocks
from tuning.errors import UserError
from tuning.recomputing import recompute_blocks
from tuning.stages import Stage

ASKED = "ACCELERATE_USE_FSDP"
OPTIMIZERS = (  # shown to train on shares as on whole tensors
    *("adam", "adamw", "nadam", "nadamw", "radam", "adan", "lion", "rmsprop", "rmsproptf"),
    *("sgd", "momentum", "lamb", "lars"),
)


def asked() -> bool:
    """Whether the launcher asks for a sharded model."""
    return os.environ.get(ASKED, "false").lower() in ("1", "true", "yes")


@contextmanager
def unseen_by_accelerate() -> Iterator[None]:
    """In the body an `Accelerator` can be made that knows nothing of FSDP."""
    before = os.environ.pop(ASKED, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[ASKED] = before


def recomputes() -> bool:
    """Whether the launcher asks a sharded model to compute its activations again."""
    return asked() and bool(_plugin().activation_checkpointing)


def backend() -> str | None:
    """What must exchange tensors: also those that are offloaded to the CPU's memory. None = the accelerator chooses."""
    return "cpu:gloo,cuda:nccl" if asked() and torch.cuda.is_available() and _offloads(_plugin()) else None


def check_asked(possible: bool, precision: str, processes: int, device: torch.device) -> None:
    """Refuse what can't work under sharding.

    Args:
        possible: whether the recipe can train a split model.

    Raises:
        UserError: names the setting, its value and the remedy.
    """
    if not asked():
        return
    plugin = _plugin()
    if not possible:
        raise UserError(
            "FSDP is asked for, but of the recipes only finetune.py and find_lr.py can split a model. Launch this one "
            "without it (accelerate_configs/ddp_bf16.yaml)."
        )
    if processes == 1:
        raise UserError("FSDP is asked for, but there is one process: nothing to share. Use --num_processes 2 or more.")
    if plugin.fsdp_version != 2:
        raise UserError(f"fsdp_version {plugin.fsdp_version} is not supported: set fsdp_version: 2.")
    if not plugin.reshard_after_forward:
        raise UserError(
            "fsdp_reshard_after_forward: false is not supported: after an evaluation a stage would open gathered "
            "copies. Set it to true."
        )
    if precision in ("bf16-master", "bf16-pure"):
        raise UserError(
            f"precision {precision} is not supported under FSDP, whose blocks are gathered in bf16 from float32 shares "
            "anyway: use --precision bf16."
        )
    if precision == "fp16":
        raise UserError("precision fp16 is not supported under FSDP: use --precision bf16 or fp32, or plain DDP.")
    if _offloads(plugin) and device.type == "cpu":
        raise UserError("fsdp_offload_params needs a GPU: here everything is in the CPU's memory already.")


def check_flags(stages: Sequence[Stage], head_init: str, clip_agc: float | None, rollback: bool = False) -> None:
    """Refuse what needs the whole model, or an optimizer that is not known to work on shares, if sharding is asked for.

    Raises:
        UserError: names the flag and the remedy.
    """
    if not asked():
        return
    apart = {
        "--head-init fitted": head_init == "fitted",
        "--cache-features": any(stage.cache_features for stage in stages),
        "--clip-agc": clip_agc is not None,
        "--rollback": rollback,
    }
    for flag, given in apart.items():
        if given:
            raise UserError(f"{flag} needs whole parameters, which no process has under FSDP. Leave it out.")
    for stage in stages:
        if stage.optimizer.lower() not in OPTIMIZERS:
            raise UserError(
                f"--optimizer {stage.optimizer} is not known to work under FSDP; choose one of {', '.join(OPTIMIZERS)}."
            )


def shard(accelerator: Accelerator, *models: nn.Module | None) -> None:
    """Split each of *models* over all processes, if that is asked for. All processes take part, once a model.

    A block of the network (`repeated_blocks`) is gathered when it is needed and given back after; so is what lies
    outside of blocks: whoever opens or saves a parameter between two passes then always meets the share.

    Raises:
        UserError: a model with parameters that can't be split.
    """
    if not asked():
        return
    plugin, mesh = _plugin(), init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for model in (model for model in models if model is not None):
        _refuse_scalars(model)
        if plugin.activation_checkpointing:
            recompute_blocks(model, "fsdp_activation_checkpointing", "set it to false")
        precision = _precision(accelerator, model)
        offload = CPUOffloadPolicy() if _offloads(plugin) else OffloadPolicy()
        for part in (*repeated_blocks(model), model):
            fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=precision, offload_policy=offload)


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters of *model* are shares."""
    return isinstance(model, FSDPModule)


def exchanging(
    accelerator: Accelerator, model: nn.Module, wrapped: nn.Module, last: bool
) -> AbstractContextManager[None]:
    """Around a backward pass: processes exchange gradients only in the *last* one of an optimizer step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        return nullcontext()
    return nullcontext() if last else accelerator.no_sync(wrapped)  # type: ignore[no-any-return]


def whole(tensor: Tensor) -> Tensor:
    """*tensor*, gathered from its shares where it is split; then all processes take part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """This process's share of *tensor*, in the same memory; the tensor itself where it is not split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def split_like(tensor: Tensor, target: Tensor) -> Tensor:
    """The whole *tensor*, the same on every process, split as *target* is. Nothing is sent."""
    if not isinstance(target, DTensor):
        return tensor
    here = tensor.to(own(target).device)
    return distribute_tensor(here, target.device_mesh, target.placements, src_data_rank=None)


def load_whole(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """`load_state_dict` of whole tensors, which every process has, into a model that may be split."""
    targets = model.state_dict()
    model.load_state_dict({n: split_like(t, targets[n]) if n in targets else t for n, t in tensors.items()})


def _plugin() -> FullyShardedDataParallelPlugin:
    """What the launcher's ``FSDP_...`` variables mean, as Accelerate reads them."""
    return FullyShardedDataParallelPlugin()


def _offloads(plugin: FullyShardedDataParallelPlugin) -> bool:
    return isinstance(plugin.cpu_offload, CPUOffloadPolicy)


def _precision(accelerator: Accelerator, model: nn.Module) -> MixedPrecisionPolicy:
    """Under bf16 blocks are gathered in bf16; gradients are summed in float32.

    Not where running statistics are kept: BatchNorm wants its weights in the type of these, float32.
    """
    keeps_statistics = any(name.endswith("running_mean") for name, _ in model.named_buffers())
    if accelerator.mixed_precision != "bf16" or keeps_statistics:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _refuse_scalars(model: nn.Module) -> None:
    scalars = [name for name, parameter in model.named_parameters() if parameter.dim() == 0]
    if scalars:
        raise UserError(
            f"{type(model).__name__} can't be sharded: {len(scalars)} of its parameters are single numbers, the first "
            f"is {scalars[0]}. Use plain data parallelism (accelerate_configs/ddp_bf16.yaml)."
        )
