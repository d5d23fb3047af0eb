"""Several processes that train one network together: which of them this one is, and what they tell one another.

``torchrun --nproc-per-node 2 …`` starts them. They are called ranks and numbered from 0, and rank 0 alone writes files.
Each rank runs the same program and takes its share of the work; what is shared out here comes together here as well,
so every rank has to make the same calls in the same order. With a single process nothing here does anything.
"""

from __future__ import annotations

import copy
import os
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Value = TypeVar("Value")
# a rank may wait for what another reads, trains or writes; if one dies, torchrun ends them all without waiting so long
PATIENCE = timedelta(days=1)
STARTED_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # in the environment


def start() -> None:
    """Join the processes that ``torchrun`` started together with this one, and take the GPU that is this one's.

    Nothing happens in a process that is alone, or that belongs to a process group already.
    """
    if not dist.is_available() or dist.is_initialized() or any(name not in os.environ for name in STARTED_BY_TORCHRUN):
        return
    if int(os.environ["WORLD_SIZE"]) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)


def stop() -> None:
    """Leave the other processes, at the end of a program."""
    if world() > 1:
        dist.destroy_process_group()


def refuse_several(what: str) -> None:
    """RuntimeError if ``torchrun`` started other processes together with this one, whether it has joined them or not.

    Args:
        what: what one process makes.
    """
    started = int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in STARTED_BY_TORCHRUN) else 1
    if (count := max(world(), started)) > 1:
        raise RuntimeError(f"{what} by one process, and there are {count}: start it without torchrun")


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share_of(count: int) -> slice:
    """Which of `count` things are this rank's: a contiguous part; the parts differ by one thing at most.

    Of fewer things than ranks, every rank has all.
    """
    if count < world():
        return slice(count)
    return slice(count * rank() // world(), count * (rank() + 1) // world())


def broadcast(value: Value) -> Value:
    """Rank 0's value, on every rank; those of the others are not looked at. Anything that can be pickled."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(rows: Tensor, *, of: int) -> Tensor:
    """The rows (n, ...) of all ranks in the order of the ranks, on every rank: each made those of its share of `of`."""
    if world() == 1 or of < world():
        return rows
    counts = [0] * world()
    dist.all_gather_object(counts, len(rows))
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def mean(values: Tensor) -> Tensor:
    """The ranks' tensors of one shape, averaged element by element."""
    if world() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / world()


def barrier() -> None:
    """Wait until all ranks are here."""
    if world() > 1:
        dist.barrier()


def parallel(network: nn.Module) -> nn.Module:
    """The network with gradients averaged over the ranks; it starts from rank 0's weights.

    Each of its parameters has to take part in the loss, or PyTorch ends the training with an error.
    """
    return nn.parallel.DistributedDataParallel(network) if world() > 1 else network


def share_buffers(model: nn.Module) -> None:
    """Give every rank the buffers of rank 0: running statistics of batch norm, which each has changed since a step."""
    for buffer in model.buffers() if world() > 1 else ():
        dist.broadcast(buffer, src=0)


def depends_on_processes(model: nn.Module, images: Tensor) -> bool:
    """Whether `model` may learn something else with several processes than with one, beyond rounding.

    Batch norm takes the statistics of a rank's own images, and dropout draws for them alone. Other networks are tried
    in train mode, on a copy: whether they draw random numbers, change buffers, or see one image beside another.

    Args:
        images: (B, C, H, W), of the shape that the network is going to see.
    """
    kinds = nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd
    return any(isinstance(module, kinds) for module in model.modules()) or _looks_beyond_an_image(model, images)


def _looks_beyond_an_image(model: nn.Module, images: Tensor) -> bool:
    """What :func:`depends_on_processes` tries; True if it cannot be tried.

    It runs on the CPU in double precision, where what is left of rounding is far from what a network depends on.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, *images.shape[1:], generator=generator, dtype=torch.float64)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            tried = copy.deepcopy(model).to("cpu", torch.float64).train()
            before = {name: buffer.clone() for name, buffer in tried.named_buffers()}
            random = torch.get_rng_state()
            whole = tried(images)
            if not torch.equal(random, torch.get_rng_state()):
                return True
            if any(not torch.equal(buffer, before[name]) for name, buffer in tried.named_buffers()):
                return True
            halves = torch.cat([tried(half) for half in images.chunk(2)])
            return not torch.allclose(whole, halves, rtol=0, atol=1e-9 * whole.abs().max().item())
        except Exception:  # a network of the reader's own may raise anything, such as where it needs single precision
            return True
