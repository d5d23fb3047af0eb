"""The same networks with fewer journeys through a GPU's memory: what they compute does not change, how fast does.

Batch norm, a shortcut and ReLU do next to no arithmetic. Each reads and writes whole feature maps, and in a ResNet that
takes longer than the convolutions between them. Here they are one operation, which reads a map twice (once for batch
norm's statistics) and writes it once. Max-pooling over 2x2 pixels is here too: PyTorch's writes down which pixel won
and is bound by that; this one looks again.
"""

from __future__ import annotations

import copy
import operator
import warnings

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kdlib import artefacts

PARTS = 264  # programs that sum up a map side by side: two for each of an H100's 132 processors
TILE = 4096  # numbers that a program holds at a time
STAGES = tl.constexpr(3)  # tiles on their way to a program that sums up
COUNTS = ("tiles", "parts")  # arguments for whose values no kernels of their own are compiled
FEW = 16  # columns of which one program adds up the parts' sums


def for_training(model: nn.Module) -> nn.Module:
    """`model` with batch norm (Ioffe & Szegedy, arXiv 1502.03167), shortcut and ReLU as one operation; pooling too.

    Args:
        model: in train mode, from (B, C, H, W) images to (B, classes) logits, on a GPU. Hooks on its modules are not
            called by what comes back.

    Returns:
        A network with the model's own weights and statistics. The model itself, with a warning, where it cannot be
        traced: where its forward looks at the values of its tensors.
    """
    graph = _traced(model)
    if graph is None:
        return model
    for norm, relu, add in _endings(graph, nn.BatchNorm2d):
        _replace(graph, relu, Norm(graph.get_submodule(norm.target), relu=True), norm, add)
    for norm in _calls(graph, nn.BatchNorm2d):
        _replace(graph, norm, Norm(graph.get_submodule(norm.target), relu=False), norm, None)
    for norm in _calls(graph, Norm):
        if len(norm.users) == 2 and not any(_in_place(graph, user) for user in norm.users):
            _fork(graph, norm)
    for pool in _calls(graph, nn.MaxPool2d):
        _replace(graph, pool, MaxPool(graph.get_submodule(pool.target)), pool, None)
    graph.recompile()
    return graph


def for_answers(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the trained `model` in `dtype`, for answers only: batch norm is folded into the convolution before it.

    In eval mode batch norm multiplies by one constant and adds another, which a convolution's weights can do as well;
    cuDNN then adds the shortcut and takes the ReLU before it writes the map.

    Args:
        model: from (B, C, H, W) images to (B, classes) logits, on a GPU; it is left as it is.
        dtype: of the copy's weights, and of its logits.

    Returns:
        A network that takes images of any dtype. The model itself, with a warning, where it cannot be traced.
    """
    graph = _traced(copy.deepcopy(model).eval())
    if graph is None:
        return model
    convolutions = _calls(graph, nn.Conv2d)
    for norm in _calls(graph, nn.BatchNorm2d):
        conv = norm.args[0]
        once = [n.target for n in convolutions].count(conv.target) == 1
        if conv in convolutions and once and len(conv.users) == 1:
            folded = fuse_conv_bn_eval(graph.get_submodule(conv.target), graph.get_submodule(norm.target))
            graph.set_submodule(conv.target, folded)
            norm.replace_all_uses_with(conv)
            graph.graph.erase_node(norm)
    for conv, relu, add in _endings(graph, nn.Conv2d):
        if add is not None:
            other = next(value for value in add.args if value is not conv)
            _move_bias(graph, other, conv)
        _replace(graph, relu, ConvReLU(graph.get_submodule(conv.target)), conv, add)
    images = next(node for node in graph.graph.nodes if node.op == "placeholder")
    with graph.graph.inserting_after(images):
        cast = graph.graph.call_method("to", (images, dtype))
    images.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph.to(dtype=dtype, memory_format=torch.channels_last).requires_grad_(False)


# --- finding the places --------------------------------------------------------------------------------------------


def _traced(model: nn.Module) -> fx.GraphModule | None:
    try:
        return fx.symbolic_trace(model)
    except Exception as error:
        warnings.warn(
            f"{type(model).__name__} cannot be traced ({artefacts.short_reason(error)}): it runs as it is, more "
            "slowly; a forward must not look at the values of its tensors",
            stacklevel=3,
        )
        return None


def _calls(graph: fx.GraphModule, kind: type[nn.Module]) -> list[fx.Node]:
    """Where a module of that kind is called, in the order of the calls; unusual ones are passed over."""
    modules = dict(graph.named_modules())
    return [
        node
        for node in graph.graph.nodes
        if node.op == "call_module" and isinstance(modules[node.target], kind) and _usual(modules[node.target])
    ]


def _usual(module: nn.Module) -> bool:
    if isinstance(module, nn.BatchNorm2d):  # with weights of its own, and statistics that are kept
        return module.affine and module.track_running_stats and module.momentum is not None
    if isinstance(module, nn.Conv2d):
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if isinstance(module, nn.MaxPool2d):  # over 2x2 pixels, and nothing else
        how = (module.kernel_size, module.stride, module.padding, module.dilation)
        pairs = [value if isinstance(value, tuple) else (value, value) for value in how]
        return pairs == [(2, 2), (2, 2), (0, 0), (1, 1)] and not module.return_indices
    return True


def _in_place(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a call may write over its input."""
    if node.op == "call_module":
        return getattr(graph.get_submodule(node.target), "inplace", False)
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return node.target is operator.iadd or name.endswith("_") or bool(node.kwargs.get("inplace"))


def _endings(graph: fx.GraphModule, kind: type[nn.Module]) -> list[tuple[fx.Node, fx.Node, fx.Node | None]]:
    """Where a module of that kind is followed by a ReLU, straight or over an addition: (module, ReLU, addition)."""
    candidates = [node for node in _calls(graph, kind) if len(node.users) == 1]
    modules = _calls(graph, nn.ReLU)
    found = []
    for node in graph.graph.nodes:
        if node not in modules and node.target not in (F.relu, torch.relu):
            continue
        source = node.args[0]
        if source in candidates:
            found.append((source, node, None))
        elif source.target in (operator.add, operator.iadd) and len(source.users) == 1:
            maps = all(isinstance(value, fx.Node) and value.op != "get_attr" for value in source.args)
            found += [(value, node, source) for value in source.args if maps and value in candidates][:1]
    return found


def _replace(graph: fx.GraphModule, last: fx.Node, by: nn.Module, module: fx.Node, add: fx.Node | None) -> None:
    """Put `by` in the place of all from `module`, over `add` where there is an addition, to `last`."""
    name = f"fused_{module.name}"
    graph.add_submodule(name, by)
    shortcut = () if add is None else tuple(value for value in add.args if value is not module)
    with graph.graph.inserting_before(last):
        last.replace_all_uses_with(graph.graph.call_module(name, (module.args[0], *shortcut)))
    for node in dict.fromkeys((last, add, module)):
        if node is not None:
            graph.graph.erase_node(node)


def _fork(graph: fx.GraphModule, node: fx.Node) -> None:
    """Give each of the two users of a map its own copy of it (not of its memory).

    Backwards, their two gradients then arrive one by one, and are added where they are read anyway.
    """
    graph.get_submodule(node.target).fork = True
    users = list(node.users)
    for place, user in enumerate(users):
        with graph.graph.inserting_before(users[0]):
            user.replace_input_with(node, graph.graph.call_function(operator.getitem, (node, place)))


def _move_bias(graph: fx.GraphModule, source: object, target: fx.Node) -> None:
    """Add the bias of the convolution `source`, where it is one, to that of `target`: their outputs are to be added."""
    if not (isinstance(source, fx.Node) and source.op == "call_module" and len(source.users) == 1):
        return
    one, other = graph.get_submodule(source.target), graph.get_submodule(target.target)
    if isinstance(one, nn.Conv2d) and one.bias is not None:
        other.bias = nn.Parameter(other.bias + one.bias)
        one.bias = None  # which saves one more journey: without a ReLU, PyTorch adds a bias on its own


class ConvReLU(nn.Module):
    """ReLU of a convolution, and of a shortcut where there is one, by cuDNN."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        c = self.conv
        how = (c.bias, c.stride, c.padding, c.dilation, c.groups)
        if shortcut is None:
            return torch.cudnn_convolution_relu(x, c.weight, *how)
        size = zip(x.shape[2:], c.kernel_size, c.stride, c.padding, c.dilation, strict=True)
        size = [(n + 2 * edge - gap * (k - 1) - 1) // step + 1 for n, k, step, edge, gap in size]
        if shortcut.shape != (len(x), c.out_channels, *size):
            return F.relu(c(x) + shortcut)
        return torch.cudnn_convolution_add_relu(x, c.weight, shortcut, 1.0, *how)


class Norm(nn.Module):
    """A batch norm in train mode, with a shortcut added where one is given, and the ReLU of it all if `relu`."""

    def __init__(self, norm: nn.BatchNorm2d, *, relu: bool):
        super().__init__()
        self.norm, self.relu, self.fork = norm, relu, False

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        n = self.norm
        if not n.training or (shortcut is not None and shortcut.shape != x.shape):
            y = n(x) if shortcut is None else n(x) + shortcut
            y = F.relu(y) if self.relu else y
            return (y, y) if self.fork else y
        statistics = (n.weight, n.bias, n.running_mean, n.running_var, n.num_batches_tracked, n.momentum, n.eps)
        return _Norm.apply(x, shortcut, *statistics, self.relu, self.fork)


class MaxPool(nn.Module):
    """The largest of each 2x2 pixels."""

    def __init__(self, pool: nn.MaxPool2d):
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x) if x.shape[2] % 2 or x.shape[3] % 2 else _MaxPool.apply(x)


# --- the operations ------------------------------------------------------------------------------------------------
# A map (B, C, H, W), channels last, is a matrix of M = B*H*W rows and C columns. Sums over its rows are formed in two
# stages: PARTS programs sum up some rows each, then one program for each group of columns adds their sums. No atomic
# additions: the same input gives the same bits.


class _Norm(torch.autograd.Function):
    """relu(batch_norm(x) + shortcut) and its gradients. Forwards x is read twice, backwards it and the gradient are."""

    @staticmethod
    def forward(ctx, x, shortcut, weight, bias, running_mean, running_var, batches, momentum, eps, relu, fork):
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.add, ctx.relu, ctx.fork = shortcut is not None, relu, fork
        if ctx.add:
            shortcut = shortcut.contiguous(memory_format=torch.channels_last)
        y, plan = torch.empty_like(x), _Plan(x)
        sums, known = plan.empty(plan.parts, 2), plan.empty(4)
        _moments[plan.parts, plan.blocks](x, sums, plan.M, plan.C, plan.each, plan.BM, plan.BC)
        _known[plan.groups,](
            sums, weight, bias, running_mean, running_var, batches, known, plan.M, plan.C, plan.parts, momentum, eps,
            FEW,
        )  # fmt: skip
        _apply[plan.tiles, plan.blocks](x, shortcut, y, known, plan.M, plan.C, ctx.add, relu, plan.BM, plan.BC)
        ctx.save_for_backward(x, y if ctx.add else None, known)
        return (y, y.detach()) if fork else y

    @staticmethod
    def backward(ctx, gradient, other=None):
        x, y, known = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        if ctx.fork:
            other = other.contiguous(memory_format=torch.channels_last)
        plan, of_x = _Plan(x), torch.empty_like(x)
        keep = ctx.add or ctx.fork
        kept = torch.empty_like(x) if keep else None  # the gradient behind the ReLU, which is the shortcut's too
        sums, found = plan.empty(plan.parts, 2), plan.empty(5)
        _backward_sums[plan.parts, plan.blocks](
            gradient, other, x, y, kept, known, sums, plan.M, plan.C, plan.each, ctx.add, ctx.relu, ctx.fork,
            plan.BM, plan.BC,
        )  # fmt: skip
        _backward_known[plan.groups,](sums, known, found, plan.M, plan.C, plan.parts, FEW)
        _backward_apply[plan.tiles, plan.blocks](
            kept if keep else gradient, x, of_x, known, found, plan.M, plan.C, ctx.relu and not keep, plan.BM, plan.BC
        )
        return of_x, kept if ctx.add else None, found[0], found[1], *[None] * 7


class _MaxPool(torch.autograd.Function):
    """The largest of 2x2 pixels; where several are, the first of them gets the gradient, as PyTorch has it."""

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x)
        B, C, H, W = x.shape
        y = torch.empty((B, C, H // 2, W // 2), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        plan = _Plan(y)
        _max_pool[plan.tiles, plan.blocks](x, y, plan.M, plan.C, W // 2, plan.BM, plan.BC)
        return y

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        gradient, of_x = gradient.contiguous(memory_format=torch.channels_last), torch.empty_like(x)
        plan = _Plan(gradient)
        at = (plan.M, plan.C, gradient.shape[3], plan.BM, plan.BC)
        _max_pool_backward[plan.tiles, plan.blocks](gradient, x, of_x, *at)
        return of_x


class _Plan:
    """How a map is cut into tiles of BM rows and BC columns."""

    def __init__(self, x: Tensor):
        self.C, self.M, self.device = x.shape[1], x.numel() // x.shape[1], x.device
        self.BC = min(128, triton.next_power_of_2(self.C))
        self.BM = TILE // self.BC
        self.blocks, self.groups = triton.cdiv(self.C, self.BC), triton.cdiv(self.C, FEW)
        self.tiles = triton.cdiv(self.M, self.BM)
        self.each = triton.cdiv(self.tiles, max(1, PARTS // self.blocks))  # tiles for one program to sum up
        self.parts = triton.cdiv(self.tiles, self.each)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, self.C, device=self.device)


@triton.jit(do_not_specialize=COUNTS)
def _moments(x, sums, M, C, tiles, BM: tl.constexpr, BC: tl.constexpr):
    """The sums of x and of its squares over the rows of `tiles` tiles."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    first = tl.zeros((BM, BC), tl.float32)
    second = tl.zeros((BM, BC), tl.float32)
    for i in tl.range(tiles, num_stages=STAGES):
        r = (tl.program_id(0).to(tl.int64) * tiles + i) * BM + tl.arange(0, BM)
        v = tl.load(x + r[:, None] * C + c[None, :], (r < M)[:, None] & (c < C)[None, :], 0).to(tl.float32)
        first += v
        second += v * v
    at = sums + tl.program_id(0) * 2 * C + c
    tl.store(at, tl.sum(first, 0), c < C)
    tl.store(at + C, tl.sum(second, 0), c < C)


@triton.jit
def _total(sums, c, C, parts, BC: tl.constexpr):
    """What the parts have found, added up: two of BC."""
    first = tl.zeros((128, BC), tl.float32)
    second = tl.zeros((128, BC), tl.float32)
    for i in range(0, parts, 128):
        part = i + tl.arange(0, 128)
        at = sums + part[:, None] * 2 * C + c[None, :]
        there = (part < parts)[:, None] & (c < C)[None, :]
        first += tl.load(at, there, 0)
        second += tl.load(at + C, there, 0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit(do_not_specialize=COUNTS)
def _known(
    sums, weight, bias, running_mean, running_var, batches, known, M, C, parts, momentum, eps, BC: tl.constexpr
):  # fmt: skip
    """Mean, 1 / standard deviation, and the factor and the term that x is normalised by; the running statistics."""
    if tl.program_id(0) == 0:
        tl.store(batches, tl.load(batches) + 1)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    first, second = _total(sums, c, C, parts, BC)
    mean = first / M
    variance = tl.maximum(second / M - mean * mean, 0)
    inverse = 1 / tl.sqrt(variance + eps)
    factor = inverse * tl.load(weight + c, c < C, 0)
    tl.store(known + c, mean, c < C)
    tl.store(known + C + c, inverse, c < C)
    tl.store(known + 2 * C + c, factor, c < C)
    tl.store(known + 3 * C + c, tl.load(bias + c, c < C, 0) - mean * factor, c < C)
    old = tl.load(running_mean + c, c < C, 0)
    tl.store(running_mean + c, old + momentum * (mean - old), c < C)
    old = tl.load(running_var + c, c < C, 0)
    tl.store(running_var + c, old + momentum * (variance * M / (M - 1) - old), c < C)


@triton.jit
def _apply(x, shortcut, y, known, M, C, ADD: tl.constexpr, RELU: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    at = r[:, None] * C + c[None, :]
    there = (r < M)[:, None] & (c < C)[None, :]
    factor = tl.load(known + 2 * C + c, c < C, 0)
    term = tl.load(known + 3 * C + c, c < C, 0)
    v = tl.load(x + at, there, 0).to(tl.float32) * factor[None, :] + term[None, :]
    if ADD:
        v += tl.load(shortcut + at, there, 0).to(tl.float32)
    if RELU:
        v = tl.maximum(v, 0)
    tl.store(y + at, v, there)


@triton.jit(do_not_specialize=COUNTS)
def _backward_sums(
    gradient, other, x, y, kept, known, sums, M, C, tiles,
    ADD: tl.constexpr, RELU: tl.constexpr, FORK: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The sums of the gradient behind the ReLU, and of its product with the normalised x."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mean = tl.load(known + c, c < C, 0)
    inverse = tl.load(known + C + c, c < C, 0)
    factor = tl.load(known + 2 * C + c, c < C, 0)
    term = tl.load(known + 3 * C + c, c < C, 0)
    first = tl.zeros((BM, BC), tl.float32)
    second = tl.zeros((BM, BC), tl.float32)
    for i in tl.range(tiles, num_stages=STAGES):
        r = (tl.program_id(0).to(tl.int64) * tiles + i) * BM + tl.arange(0, BM)
        at = r[:, None] * C + c[None, :]
        there = (r < M)[:, None] & (c < C)[None, :]
        v = tl.load(x + at, there, 0).to(tl.float32)
        g = tl.load(gradient + at, there, 0).to(tl.float32)
        if FORK:
            g += tl.load(other + at, there, 0).to(tl.float32)
        if RELU and ADD:
            g = tl.where(tl.load(y + at, there, 0).to(tl.float32) > 0, g, 0)
        elif RELU:
            g = tl.where(v * factor[None, :] + term[None, :] > 0, g, 0)
        if ADD or FORK:
            tl.store(kept + at, g, there)
        first += g
        second += g * (v - mean[None, :]) * inverse[None, :]
    at = sums + tl.program_id(0) * 2 * C + c
    tl.store(at, tl.sum(first, 0), c < C)
    tl.store(at + C, tl.sum(second, 0), c < C)


@triton.jit(do_not_specialize=COUNTS)
def _backward_known(sums, known, found, M, C, parts, BC: tl.constexpr):
    """The gradients of weight and bias, and a, b, c of: gradient of x = a * gradient + b * x + c."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    first, second = _total(sums, c, C, parts, BC)
    mean = tl.load(known + c, c < C, 0)
    factor = tl.load(known + 2 * C + c, c < C, 0)
    slope = -factor * tl.load(known + C + c, c < C, 0) * second / M
    tl.store(found + c, second, c < C)
    tl.store(found + C + c, first, c < C)
    tl.store(found + 2 * C + c, factor, c < C)
    tl.store(found + 3 * C + c, slope, c < C)
    tl.store(found + 4 * C + c, -factor * first / M - slope * mean, c < C)


@triton.jit
def _backward_apply(gradient, x, of_x, known, found, M, C, RELU: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    at = r[:, None] * C + c[None, :]
    there = (r < M)[:, None] & (c < C)[None, :]
    factor = tl.load(found + 2 * C + c, c < C, 0)
    slope = tl.load(found + 3 * C + c, c < C, 0)
    term = tl.load(found + 4 * C + c, c < C, 0)
    v = tl.load(x + at, there, 0).to(tl.float32)
    g = tl.load(gradient + at, there, 0).to(tl.float32)
    if RELU:  # a gradient that was kept has the ReLU's zeros in it already
        g = tl.where(v * factor[None, :] + tl.load(known + 3 * C + c, c < C, 0)[None, :] > 0, g, 0)
    tl.store(of_x + at, factor[None, :] * g + slope[None, :] * v + term[None, :], there)


@triton.jit
def _squares(M, C, width, BM: tl.constexpr, BC: tl.constexpr):
    """For a tile of a pooled map: where it is, where the first of its four pixels are, and which of it there is."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    first = (r // width) * 4 * width + 2 * (r % width)  # two rows of 2 * width pixels for each row of the pooled map
    return r[:, None] * C + c[None, :], first[:, None] * C + c[None, :], (r < M)[:, None] & (c < C)[None, :]


@triton.jit
def _max_pool(x, y, M, C, width, BM: tl.constexpr, BC: tl.constexpr):
    at, first, there = _squares(M, C, width, BM, BC)
    below = first + 2 * width * C
    upper = tl.maximum(tl.load(x + first, there, 0), tl.load(x + first + C, there, 0))
    lower = tl.maximum(tl.load(x + below, there, 0), tl.load(x + below + C, there, 0))
    tl.store(y + at, tl.maximum(upper, lower), there)


@triton.jit
def _max_pool_backward(gradient, x, of_x, M, C, width, BM: tl.constexpr, BC: tl.constexpr):
    at, first, there = _squares(M, C, width, BM, BC)
    below = first + 2 * width * C
    g = tl.load(gradient + at, there, 0)
    a, b = tl.load(x + first, there, 0), tl.load(x + first + C, there, 0)
    c, d = tl.load(x + below, there, 0), tl.load(x + below + C, there, 0)
    largest = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
    nothing = tl.zeros_like(g)
    tl.store(of_x + first, tl.where(a == largest, g, nothing), there)
    g = tl.where(a == largest, nothing, g)  # what the pixels before have left
    tl.store(of_x + first + C, tl.where(b == largest, g, nothing), there)
    g = tl.where(b == largest, nothing, g)
    tl.store(of_x + below, tl.where(c == largest, g, nothing), there)
    g = tl.where(c == largest, nothing, g)
    tl.store(of_x + below + C, tl.where(d == largest, g, nothing), there)
