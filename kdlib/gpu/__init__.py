"""Speed, and never results beyond rounding: where a network runs, in which precision, and with which operations.

Training calls :class:`Engine`, and ``fast=False`` there turns off what is not plain PyTorch in the student's step: half
precision, fused operations and the recorded step. On a CPU there is nothing to turn off. Several processes that train
one network together are in :mod:`kdlib.gpu.ranks`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from kdlib.data import Batch
from kdlib.gpu import ranks
from kdlib.records.identity import IdentityError


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """`device` if given; otherwise the GPU if there is one, otherwise the CPU.

    Others, such as ``mps`` and ``xpu``, are only used if given: they compute in float32, and were not tried. Under
    ``torchrun`` the process joins the others first (:mod:`kdlib.gpu.ranks`), since each has a GPU of its own.
    """
    ranks.start()
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def device_name(device: torch.device | str) -> str:
    """The device in words: the GPU's name, or ``CPU`` and its number of threads."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type  # such as mps and xpu: PyTorch has no name for them all
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def half_precision(device: torch.device) -> torch.dtype | None:
    """The half precision to compute in: bfloat16 if the GPU has it, otherwise float16; None (float32) on a CPU."""
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def mixed_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast to :func:`half_precision`; nothing if that is None."""
    dtype = half_precision(device)
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


@contextlib.contextmanager
def tuned_convolutions(device: torch.device) -> Iterator[None]:
    """Let cuDNN try its algorithms on a GPU and keep the fastest for each shape: for many batches of one size."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def place(model: nn.Module, device: torch.device, images: Tensor) -> torch.memory_format:
    """Move `model` to `device`, laid out channels last if it can run so; returns the layout that its input needs.

    A network that calls ``view`` on its feature maps needs them contiguous. One image is tried, in eval mode, with
    copies of the weights: those of a network that trains stay where they are, since a recorded step goes on with them.

    Args:
        images: (B, C, H, W), normalised, of the kind that the network is going to see.
    """
    model.to(device)
    if isinstance(model, torch.jit.ScriptModule):  # whose weights cannot be exchanged
        return torch.contiguous_format
    was_training, layout = model.training, torch.channels_last
    one = lay_out(images[:1].to(device), layout)
    kernels = {name: weight for name, weight in model.named_parameters() if weight.ndim == 4}
    laid_out = {name: weight.contiguous(memory_format=layout) for name, weight in kernels.items()}
    try:
        with torch.no_grad(), mixed_precision(device):
            torch.func.functional_call(model.eval(), laid_out, (one,))
    except RuntimeError as error:
        if "view" not in str(error):
            raise
        return torch.contiguous_format
    finally:
        model.train(was_training)
    if any(laid_out[name] is not weight for name, weight in kernels.items()):
        model.to(memory_format=layout)
    return layout


def lay_out(images: Tensor, layout: torch.memory_format) -> Tensor:
    """The images (B, C, H, W) in that layout. Of one channel, they have both at once until they are copied."""
    if layout == torch.channels_last:
        return images.contiguous(memory_format=layout)
    return images.clone(memory_format=layout)


def optimize_for_gpu(
    model: nn.Module,
    device: torch.device,
    layout: torch.memory_format = torch.channels_last,
    *,
    for_inference: bool = False,
) -> nn.Module:
    """`model` with fewer passes over memory (see :mod:`kdlib.gpu.fused`); off a GPU, or without Triton, as it is.

    Args:
        model: in the memory of `device`.
        layout: what :func:`place` returned. Fused operations are written for channels last: a network that needs its
            feature maps contiguous stays as it is.
        for_inference: whether only its outputs in eval mode are wanted; otherwise the result trains `model`'s weights.
    """
    if device.type != "cuda" or layout != torch.channels_last or importlib.util.find_spec("triton") is None:
        return model
    from kdlib.gpu import fused  # here, since it cannot be imported everywhere

    return fused.for_inference(model, half_precision(device)) if for_inference else fused.for_training(model)


class Engine:
    """How one network is trained on its device.

    Args:
        model: in train mode, not yet moved to `device`.
        images: (B, C, H, W), normalised: an example of what it is going to see.
        batch_size: images per step, of all processes together (see :mod:`kdlib.gpu.ranks`); None: one of each.
        fast: False for plain PyTorch in float32, every step started from Python.

    Raises:
        ValueError: a batch has fewer images than there are processes.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        images: Tensor,
        *,
        batch_size: int | None = None,
        fast: bool = True,
    ):
        self.batch_size = batch_size or ranks.world()
        if self.batch_size < ranks.world():
            raise ValueError(
                f"a batch of {batch_size} for {ranks.world()} processes: expected an image for each or more"
            )
        self.share = ranks.share_of(self.batch_size)
        # of this process's mean loss where those of all processes are averaged: 1 if all shares are of one size
        self.weight = (self.share.stop - self.share.start) * ranks.world() / self.batch_size
        self.device, self.fast = device, fast and device.type == "cuda"
        self.layout = place(model, device, images)
        self.network = optimize_for_gpu(model, device, self.layout) if self.fast else model
        self.model, self.network = model, ranks.parallel(self.network)
        # float16 holds no small gradients: they are scaled up, and the optimiser's step scales them down again
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.fast and half_precision(device) == torch.float16)

    def forward(self, images: Tensor) -> Tensor:
        """The network's logits (B, C) for images (B, C, H, W), in float32 whatever they were computed in."""
        with mixed_precision(self.device) if self.fast else contextlib.nullcontext():
            logits = self.network(lay_out(images, self.layout))
        return logits if logits.dtype == torch.float64 else logits.float()

    def sgd(self, model: nn.Module, learning_rate: float, **settings: float) -> torch.optim.SGD:
        """``torch.optim.SGD`` of the model's parameters, in one operation on a GPU."""
        fused = self.device.type == "cuda"
        return torch.optim.SGD(model.parameters(), lr=learning_rate, fused=fused, **settings)

    def backward(self, loss: Tensor) -> None:
        """The gradients of the whole batch's mean loss, from this process's mean over its share of the batch."""
        self.scaler.scale(loss if self.weight == 1 else self.weight * loss).backward()

    def end_epoch(self, losses: Tensor) -> Tensor:
        """The whole batches' mean losses (steps,), from this process's; the model's buffers become the same on all."""
        ranks.share_buffers(self.model)
        return ranks.mean(losses if self.weight == 1 else self.weight * losses)

    def record(
        self, step: Callable[[Batch], Tensor], optimizer: torch.optim.Optimizer, objective: Callable[[], object]
    ) -> Callable[[Batch], Tensor]:
        """The training step as one CUDA graph, if it can be; otherwise as it is, and so with several processes: while
        a step runs, they exchange gradients, and nobody has tried to record that.

        Args:
            step: from a batch to its loss.
            objective: tells the identity of what the step minimises. If it has none, or if it changes, the steps are
                not recorded: a recorded step would go on with what the objective was at the beginning.
        """
        if not self.fast or self.scaler.is_enabled() or ranks.world() > 1:
            return step
        try:
            recorded = CUDAGraphStep(step, objective)
        except IdentityError as error:
            warnings.warn(f"the steps are not recorded as a CUDA graph, and take longer: {error}", stacklevel=3)
            return step
        group = optimizer.param_groups[0]
        group["lr"] = torch.tensor(float(group["lr"]), device=self.device)  # where a replay reads it
        return recorded


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give the optimiser another learning rate, in place if a recorded step reads it."""
    group = optimizer.param_groups[0]
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(learning_rate)
    else:
        group["lr"] = learning_rate


class CUDAGraphStep:
    """A training step on a GPU, recorded as one CUDA graph at its fourth call and replayed from then on.

    A small network's step is hundreds of kernels of a few microseconds each, and starting one from Python takes longer
    than running it. A replay starts them all at once. The first calls are ordinary steps: they let cuDNN choose,
    Triton compile and the optimiser make its buffers, none of which can be recorded. What cannot be recorded at all
    (a loss that looks at a value, say) goes on as ordinary steps, with a warning.
    """

    def __init__(self, step: Callable[[Batch], Tensor], objective: Callable[[], object] = lambda: None):
        self.step, self.calls = step, 0
        self.objective, self.known = objective, objective()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream()  # recording is not allowed on the default one

    def __call__(self, batch: Batch) -> Tensor:
        self.calls += 1
        if self.calls == 4:
            self._record(batch)
        if self.graph is None:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                loss = self.step(batch)
            torch.cuda.current_stream().wait_stream(self.stream)
            return loss
        for recorded, value in zip(self.batch, batch, strict=True):
            if value is not None:
                recorded.copy_(value)
        self.graph.replay()
        return self.loss

    def _record(self, batch: Batch) -> None:
        try:
            constant = self.objective() == self.known
        except TypeError:  # it can no longer be identified
            constant = False
        if not constant:
            changed = "the objective changes during training: its steps are not recorded as a CUDA graph"
            warnings.warn(changed, stacklevel=3)
            return
        self.batch = Batch(*(value if value is None else value.clone() for value in batch))
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.loss = self.step(self.batch)
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            warnings.warn(
                f"this training step cannot be recorded as a CUDA graph ({reason}): its steps take longer; a loss_fn "
                "must not read values back to the CPU (.item(), print, if)",
                stacklevel=3,
            )
        else:
            self.graph = graph
