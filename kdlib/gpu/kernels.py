"""Batch norm with shortcut and ReLU as one operation, and max-pooling: Triton kernels and their gradients.

A feature map (B, C, H, W), channels last in memory, is a matrix of M = B*H*W rows and C columns. It is processed in
tiles of BM rows and BC columns. Sums over its rows are formed in two stages: up to PARTS programs add up some tiles
each, then one program for every GROUP columns adds up the partial sums. There are no atomic additions, so the same
input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTS = 264  # programs that form partial sums of a map: two for each of an H100's 132 multiprocessors
TILE = 4096  # elements of a tile
STAGES = tl.constexpr(3)  # tiles that are loaded ahead while partial sums are formed
COUNTS = ("tiles", "parts")  # arguments whose values get no specialised kernels
GROUP = 16  # columns whose partial sums one program adds up


class BatchNorm(torch.autograd.Function):
    """relu(batch_norm(x) + shortcut) and its gradients; batch norm in train mode (Ioffe & Szegedy, arXiv 1502.03167).

    Forward reads x (B, C, H, W) twice; backward reads x and the gradient twice. Statistics are float32, whatever the
    dtype of x. With `fork` the result is returned twice (sharing memory), so that backward receives the gradients of
    its two users one by one and adds them while reading them.
    """

    @staticmethod
    def forward(ctx, x, shortcut, weight, bias, running_mean, running_var, batches, momentum, eps, relu, fork):
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.add, ctx.relu, ctx.fork = shortcut is not None, relu, fork
        if ctx.add:
            shortcut = shortcut.contiguous(memory_format=torch.channels_last)
        y, t = torch.empty_like(x), Tiling(x)
        sums, statistics = t.empty(t.parts, 2), t.empty(4)
        _sum_moments[t.parts, t.blocks](x, sums, t.M, t.C, t.tiles_per_part, t.BM, t.BC)
        _finish_statistics[t.groups,](
            sums, weight, bias, running_mean, running_var, batches, statistics, t.M, t.C, t.parts, momentum, eps, GROUP
        )
        _normalize[t.tiles, t.blocks](x, shortcut, y, statistics, t.M, t.C, ctx.add, relu, t.BM, t.BC)
        ctx.save_for_backward(x, y if ctx.add else None, statistics)
        return (y, y.detach()) if fork else y

    @staticmethod
    def backward(ctx, grad, grad_fork=None):
        x, y, statistics = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        if ctx.fork:
            grad_fork = grad_fork.contiguous(memory_format=torch.channels_last)
        t, grad_x = Tiling(x), torch.empty_like(x)
        store = ctx.add or ctx.fork
        grad_sum = torch.empty_like(x) if store else None  # at the ReLU's input, which is the shortcut's gradient too
        sums, coefficients = t.empty(t.parts, 2), t.empty(5)
        _sum_gradients[t.parts, t.blocks](
            grad, grad_fork, x, y, grad_sum, statistics, sums, t.M, t.C, t.tiles_per_part, ctx.add, ctx.relu, ctx.fork,
            t.BM, t.BC,
        )  # fmt: skip
        _finish_gradients[t.groups,](sums, statistics, coefficients, t.M, t.C, t.parts, GROUP)
        _input_gradient[t.tiles, t.blocks](
            grad_sum if store else grad, x, grad_x, statistics, coefficients, t.M, t.C, ctx.relu and not store,
            t.BM, t.BC,
        )  # fmt: skip
        return grad_x, grad_sum if ctx.add else None, coefficients[0], coefficients[1], *[None] * 7


class MaxPool(torch.autograd.Function):
    """The largest of each 2x2 pixels: (B, C, H, W) with even H and W -> (B, C, H/2, W/2).

    If several are the largest, the first of them gets the gradient, as in PyTorch.
    """

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x)
        B, C, H, W = x.shape
        y = torch.empty((B, C, H // 2, W // 2), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        t = Tiling(y)
        _max_pool[t.tiles, t.blocks](x, y, t.M, t.C, W // 2, t.BM, t.BC)
        return y

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        grad, grad_x = grad.contiguous(memory_format=torch.channels_last), torch.empty_like(x)
        t = Tiling(grad)
        _max_pool_gradient[t.tiles, t.blocks](grad, x, grad_x, t.M, t.C, grad.shape[3], t.BM, t.BC)
        return grad_x


class Tiling:
    """How a map (B, C, H, W) is cut into tiles of BM rows and BC columns."""

    def __init__(self, x: Tensor):
        self.C, self.M, self.device = x.shape[1], x.numel() // x.shape[1], x.device
        self.BC = min(128, triton.next_power_of_2(self.C))
        self.BM = TILE // self.BC
        self.blocks, self.groups = triton.cdiv(self.C, self.BC), triton.cdiv(self.C, GROUP)
        self.tiles = triton.cdiv(self.M, self.BM)
        self.tiles_per_part = triton.cdiv(self.tiles, max(1, PARTS // self.blocks))
        self.parts = triton.cdiv(self.tiles, self.tiles_per_part)

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised float32 tensor (*shape, C)."""
        return torch.empty(*shape, self.C, device=self.device)


# --- kernels -------------------------------------------------------------------------------------------------------
# `statistics` is (4, C): mean, 1 / standard deviation, and the factor and the term that x is normalised by.
# `coefficients` is (5, C): the gradients of weight and bias, and a, b, c of: gradient of x = a * gradient + b * x + c.


@triton.jit
def _tile(number, M, C, BM: tl.constexpr, BC: tl.constexpr):
    """The offsets (BM, BC) of a tile in memory, and which of them are inside the map."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    r = number * BM + tl.arange(0, BM)
    return r[:, None] * C + c[None, :], (r < M)[:, None] & (c < C)[None, :]


@triton.jit(do_not_specialize=COUNTS)
def _sum_moments(x, sums, M, C, tiles, BM: tl.constexpr, BC: tl.constexpr):
    """The sums of x and of its squares over the rows of `tiles` tiles."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    first = tl.zeros((BM, BC), tl.float32)
    second = tl.zeros((BM, BC), tl.float32)
    for i in tl.range(tiles, num_stages=STAGES):
        offsets, inside = _tile(tl.program_id(0).to(tl.int64) * tiles + i, M, C, BM, BC)
        v = tl.load(x + offsets, inside, 0).to(tl.float32)
        first += v
        second += v * v
    part = sums + tl.program_id(0) * 2 * C + c
    tl.store(part, tl.sum(first, 0), c < C)
    tl.store(part + C, tl.sum(second, 0), c < C)


@triton.jit
def _add_parts(sums, c, C, parts, BC: tl.constexpr):
    """The two sums of each column `c` (BC,), from the partial sums (parts, 2, C)."""
    first = tl.zeros((128, BC), tl.float32)
    second = tl.zeros((128, BC), tl.float32)
    for i in range(0, parts, 128):
        part = i + tl.arange(0, 128)
        offsets = sums + part[:, None] * 2 * C + c[None, :]
        inside = (part < parts)[:, None] & (c < C)[None, :]
        first += tl.load(offsets, inside, 0)
        second += tl.load(offsets + C, inside, 0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit(do_not_specialize=COUNTS)
def _finish_statistics(
    sums, weight, bias, running_mean, running_var, batches, statistics, M, C, parts, momentum, eps, BC: tl.constexpr
):  # fmt: skip
    """The statistics of a batch, and the update of the running ones."""
    if tl.program_id(0) == 0:
        tl.store(batches, tl.load(batches) + 1)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    first, second = _add_parts(sums, c, C, parts, BC)
    mean = first / M
    variance = tl.maximum(second / M - mean * mean, 0)
    inverse = 1 / tl.sqrt(variance + eps)
    factor = inverse * tl.load(weight + c, c < C, 0)
    tl.store(statistics + c, mean, c < C)
    tl.store(statistics + C + c, inverse, c < C)
    tl.store(statistics + 2 * C + c, factor, c < C)
    tl.store(statistics + 3 * C + c, tl.load(bias + c, c < C, 0) - mean * factor, c < C)
    old = tl.load(running_mean + c, c < C, 0)
    tl.store(running_mean + c, old + momentum * (mean - old), c < C)
    old = tl.load(running_var + c, c < C, 0)
    tl.store(running_var + c, old + momentum * (variance * M / (M - 1) - old), c < C)


@triton.jit
def _normalize(
    x, shortcut, y, statistics, M, C, ADD: tl.constexpr, RELU: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr
):
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    offsets, inside = _tile(tl.program_id(0).to(tl.int64), M, C, BM, BC)
    factor = tl.load(statistics + 2 * C + c, c < C, 0)
    term = tl.load(statistics + 3 * C + c, c < C, 0)
    v = tl.load(x + offsets, inside, 0).to(tl.float32) * factor[None, :] + term[None, :]
    if ADD:
        v += tl.load(shortcut + offsets, inside, 0).to(tl.float32)
    if RELU:
        v = tl.maximum(v, 0)
    tl.store(y + offsets, v, inside)


@triton.jit(do_not_specialize=COUNTS)
def _sum_gradients(
    grad, grad_fork, x, y, grad_sum, statistics, sums, M, C, tiles,
    ADD: tl.constexpr, RELU: tl.constexpr, FORK: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The sums of the gradient at the ReLU's input, and of its product with the normalised x."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mean = tl.load(statistics + c, c < C, 0)
    inverse = tl.load(statistics + C + c, c < C, 0)
    factor = tl.load(statistics + 2 * C + c, c < C, 0)
    term = tl.load(statistics + 3 * C + c, c < C, 0)
    first = tl.zeros((BM, BC), tl.float32)
    second = tl.zeros((BM, BC), tl.float32)
    for i in tl.range(tiles, num_stages=STAGES):
        offsets, inside = _tile(tl.program_id(0).to(tl.int64) * tiles + i, M, C, BM, BC)
        v = tl.load(x + offsets, inside, 0).to(tl.float32)
        g = tl.load(grad + offsets, inside, 0).to(tl.float32)
        if FORK:
            g += tl.load(grad_fork + offsets, inside, 0).to(tl.float32)
        if RELU and ADD:
            g = tl.where(tl.load(y + offsets, inside, 0).to(tl.float32) > 0, g, 0)
        elif RELU:
            g = tl.where(v * factor[None, :] + term[None, :] > 0, g, 0)
        if ADD or FORK:
            tl.store(grad_sum + offsets, g, inside)
        first += g
        second += g * (v - mean[None, :]) * inverse[None, :]
    part = sums + tl.program_id(0) * 2 * C + c
    tl.store(part, tl.sum(first, 0), c < C)
    tl.store(part + C, tl.sum(second, 0), c < C)


@triton.jit(do_not_specialize=COUNTS)
def _finish_gradients(sums, statistics, coefficients, M, C, parts, BC: tl.constexpr):
    """The coefficients of the gradients, from the partial sums."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    first, second = _add_parts(sums, c, C, parts, BC)
    mean = tl.load(statistics + c, c < C, 0)
    factor = tl.load(statistics + 2 * C + c, c < C, 0)
    slope = -factor * tl.load(statistics + C + c, c < C, 0) * second / M
    tl.store(coefficients + c, second, c < C)
    tl.store(coefficients + C + c, first, c < C)
    tl.store(coefficients + 2 * C + c, factor, c < C)
    tl.store(coefficients + 3 * C + c, slope, c < C)
    tl.store(coefficients + 4 * C + c, -factor * first / M - slope * mean, c < C)


@triton.jit
def _input_gradient(
    grad, x, grad_x, statistics, coefficients, M, C, RELU: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr
):
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    offsets, inside = _tile(tl.program_id(0).to(tl.int64), M, C, BM, BC)
    factor = tl.load(coefficients + 2 * C + c, c < C, 0)
    slope = tl.load(coefficients + 3 * C + c, c < C, 0)
    term = tl.load(coefficients + 4 * C + c, c < C, 0)
    v = tl.load(x + offsets, inside, 0).to(tl.float32)
    g = tl.load(grad + offsets, inside, 0).to(tl.float32)
    if RELU:  # a gradient that was stored has been through the ReLU already
        g = tl.where(v * factor[None, :] + tl.load(statistics + 3 * C + c, c < C, 0)[None, :] > 0, g, 0)
    tl.store(grad_x + offsets, factor[None, :] * g + slope[None, :] * v + term[None, :], inside)


@triton.jit
def _pooled_tile(M, C, width, BM: tl.constexpr, BC: tl.constexpr):
    """The same for a pooled map, and the offsets of the first of the four pixels that each element comes from."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    first = (r // width) * 4 * width + 2 * (r % width)  # two rows of 2 * width pixels for each row of the pooled map
    return r[:, None] * C + c[None, :], first[:, None] * C + c[None, :], (r < M)[:, None] & (c < C)[None, :]


@triton.jit
def _max_pool(x, y, M, C, width, BM: tl.constexpr, BC: tl.constexpr):
    offsets, first, inside = _pooled_tile(M, C, width, BM, BC)
    below = first + 2 * width * C
    upper = tl.maximum(tl.load(x + first, inside, 0), tl.load(x + first + C, inside, 0))
    lower = tl.maximum(tl.load(x + below, inside, 0), tl.load(x + below + C, inside, 0))
    tl.store(y + offsets, tl.maximum(upper, lower), inside)


@triton.jit
def _max_pool_gradient(grad, x, grad_x, M, C, width, BM: tl.constexpr, BC: tl.constexpr):
    offsets, first, inside = _pooled_tile(M, C, width, BM, BC)
    below = first + 2 * width * C
    g = tl.load(grad + offsets, inside, 0)
    a, b = tl.load(x + first, inside, 0), tl.load(x + first + C, inside, 0)
    c, d = tl.load(x + below, inside, 0), tl.load(x + below + C, inside, 0)
    largest = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
    nothing = tl.zeros_like(g)
    tl.store(grad_x + first, tl.where(a == largest, g, nothing), inside)
    g = tl.where(a == largest, nothing, g)  # zero where the gradient has been given away
    tl.store(grad_x + first + C, tl.where(b == largest, g, nothing), inside)
    g = tl.where(b == largest, nothing, g)
    tl.store(grad_x + below, tl.where(c == largest, g, nothing), inside)
    g = tl.where(c == largest, nothing, g)
    tl.store(grad_x + below + C, tl.where(d == largest, g, nothing), inside)
