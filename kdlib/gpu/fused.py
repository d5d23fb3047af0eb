"""The same networks with fewer passes over a GPU's memory: what they compute does not change, how fast does.

Batch norm, a shortcut and ReLU do almost no arithmetic, but each reads and writes whole feature maps, and in a ResNet
that takes longer than the convolutions between them. Here the three are one operation, which reads a map twice (once
for batch norm's statistics) and writes it once. Max-pooling over 2x2 pixels is here too: PyTorch's stores the index of
each largest pixel and is slowed down by that; this one compares the pixels again.
"""

from __future__ import annotations

import copy
import operator
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kdlib.gpu import kernels
from kdlib.records import artefacts


def for_training(model: nn.Module) -> nn.Module:
    """`model` with batch norm, shortcut and ReLU as one operation, and faster max-pooling.

    Args:
        model: in train mode, from (B, C, H, W) images to (B, classes) logits, on a GPU. Hooks on its modules are not
            called by the returned network.

    Returns:
        A network that shares the model's weights and statistics. If the model cannot be traced, because its forward
        depends on the values of its tensors: the model itself, with a warning.
    """
    graph = _trace(model)
    if graph is None:
        return model
    for norm, relu, add in _before_relu(graph, nn.BatchNorm2d):
        _replace(graph, norm, add, relu, Norm(graph.get_submodule(norm.target), relu=True))
    for norm in _calls(graph, nn.BatchNorm2d):
        _replace(graph, norm, None, norm, Norm(graph.get_submodule(norm.target), relu=False))
    for norm in _calls(graph, Norm):
        if len(norm.users) == 2 and not any(_in_place(graph, user) for user in norm.users):
            _fork(graph, norm)
    for pool in _calls(graph, nn.MaxPool2d):
        _replace(graph, pool, None, pool, MaxPool(graph.get_submodule(pool.target)))
    graph.recompile()
    return graph


def for_inference(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the trained `model` in `dtype`, for inference only: batch norm is folded into the convolutions.

    In eval mode batch norm multiplies by one constant and adds another, which a convolution's weights can do as well;
    cuDNN then adds the shortcut and applies the ReLU before it writes the map.

    Args:
        model: from (B, C, H, W) images to (B, classes) logits, on a GPU; it is not changed.
        dtype: of the copy's weights, and of its logits.

    Returns:
        A network that takes images of any dtype. If the model cannot be traced: the model itself, with a warning.
    """
    graph = _trace(copy.deepcopy(model).eval())
    if graph is None:
        return model
    convolutions = _calls(graph, nn.Conv2d)
    for norm in _calls(graph, nn.BatchNorm2d):
        conv = norm.args[0]
        called_once = [n.target for n in convolutions].count(conv.target) == 1
        if conv in convolutions and called_once and len(conv.users) == 1:
            folded = fuse_conv_bn_eval(graph.get_submodule(conv.target), graph.get_submodule(norm.target))
            graph.set_submodule(conv.target, folded)
            norm.replace_all_uses_with(conv)
            graph.graph.erase_node(norm)
    for conv, relu, add in _before_relu(graph, nn.Conv2d):
        if add is not None:
            shortcut = next(value for value in add.args if value is not conv)
            _move_bias(graph, shortcut, conv)
        _replace(graph, conv, add, relu, ConvReLU(graph.get_submodule(conv.target)))
    images = next(node for node in graph.graph.nodes if node.op == "placeholder")
    with graph.graph.inserting_after(images):
        cast = graph.graph.call_method("to", (images, dtype))
    images.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph.to(dtype=dtype, memory_format=torch.channels_last).requires_grad_(False)


# --- rewriting the graph -------------------------------------------------------------------------------------------


def _trace(model: nn.Module) -> fx.GraphModule | None:
    try:
        return fx.symbolic_trace(model)
    except Exception as error:
        warnings.warn(
            f"{type(model).__name__} cannot be traced ({artefacts.short_reason(error)}): it runs as it is, more "
            "slowly; a forward must not depend on the values of its tensors",
            stacklevel=3,
        )
        return None


def _calls(graph: fx.GraphModule, kind: type[nn.Module]) -> list[fx.Node]:
    """The calls of supported modules of that kind, in order."""
    modules = dict(graph.named_modules())
    return [
        node
        for node in graph.graph.nodes
        if node.op == "call_module" and isinstance(modules[node.target], kind) and _supported(modules[node.target])
    ]


def _supported(module: nn.Module) -> bool:
    """Whether the operations here can replace the module; one with unusual settings is left as it is."""
    if isinstance(module, nn.BatchNorm2d):  # with weights, and with running statistics
        return module.affine and module.track_running_stats and module.momentum is not None
    if isinstance(module, nn.Conv2d):
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if isinstance(module, nn.MaxPool2d):  # over 2x2 pixels, and nothing else
        settings = (module.kernel_size, module.stride, module.padding, module.dilation)
        pairs = [value if isinstance(value, tuple) else (value, value) for value in settings]
        return pairs == [(2, 2), (2, 2), (0, 0), (1, 1)] and not module.return_indices
    return True


def _in_place(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a call may overwrite its input."""
    if node.op == "call_module":
        return getattr(graph.get_submodule(node.target), "inplace", False)
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return node.target is operator.iadd or name.endswith("_") or bool(node.kwargs.get("inplace"))


def _before_relu(graph: fx.GraphModule, kind: type[nn.Module]) -> list[tuple[fx.Node, fx.Node, fx.Node | None]]:
    """Each module of that kind before a ReLU, directly or through an addition: (module, ReLU, addition or None)."""
    candidates = [node for node in _calls(graph, kind) if len(node.users) == 1]
    relu_modules = _calls(graph, nn.ReLU)
    matches = []
    for node in graph.graph.nodes:
        if node not in relu_modules and node.target not in (F.relu, torch.relu):
            continue
        source = node.args[0]
        if source in candidates:
            matches.append((source, node, None))
        elif source.target in (operator.add, operator.iadd) and len(source.users) == 1:
            maps = all(isinstance(value, fx.Node) and value.op != "get_attr" for value in source.args)
            matches += [(value, node, source) for value in source.args if maps and value in candidates][:1]
    return matches


def _replace(
    graph: fx.GraphModule, module: fx.Node, add: fx.Node | None, last: fx.Node, replacement: nn.Module
) -> None:
    """Put `replacement` in the place of the calls from `module`, through the addition if there is one, to `last`."""
    name = f"fused_{module.name}"
    graph.add_submodule(name, replacement)
    shortcut = () if add is None else tuple(value for value in add.args if value is not module)
    with graph.graph.inserting_before(last):
        last.replace_all_uses_with(graph.graph.call_module(name, (module.args[0], *shortcut)))
    for node in dict.fromkeys((last, add, module)):
        if node is not None:
            graph.graph.erase_node(node)


def _fork(graph: fx.GraphModule, node: fx.Node) -> None:
    """Give each of the two users of a map a tensor of its own, in the same memory.

    In the backward pass their two gradients then arrive one by one, and are added by the kernel that reads them.
    """
    graph.get_submodule(node.target).fork = True
    users = list(node.users)
    for number, user in enumerate(users):
        with graph.graph.inserting_before(users[0]):
            user.replace_input_with(node, graph.graph.call_function(operator.getitem, (node, number)))


def _move_bias(graph: fx.GraphModule, source: object, target: fx.Node) -> None:
    """Move the bias of `source`, if that is a convolution, to the one at `target`: their outputs are to be added."""
    if not (isinstance(source, fx.Node) and source.op == "call_module" and len(source.users) == 1):
        return
    source_conv, target_conv = graph.get_submodule(source.target), graph.get_submodule(target.target)
    if isinstance(source_conv, nn.Conv2d) and source_conv.bias is not None:
        target_conv.bias = nn.Parameter(target_conv.bias + source_conv.bias)
        source_conv.bias = None  # saves another pass: without a ReLU, PyTorch adds a bias in an operation of its own


# --- modules of the rewritten graph --------------------------------------------------------------------------------


class ConvReLU(nn.Module):
    """relu(convolution + shortcut) by cuDNN: (B, C, H, W), and optionally a shortcut of the output's shape."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        c = self.conv
        settings = (c.bias, c.stride, c.padding, c.dilation, c.groups)
        if shortcut is None:
            return torch.cudnn_convolution_relu(x, c.weight, *settings)
        sizes = zip(x.shape[2:], c.kernel_size, c.stride, c.padding, c.dilation, strict=True)
        size = [(n + 2 * edge - gap * (k - 1) - 1) // step + 1 for n, k, step, edge, gap in sizes]
        if shortcut.shape != (len(x), c.out_channels, *size):
            return F.relu(c(x) + shortcut)
        return torch.cudnn_convolution_add_relu(x, c.weight, shortcut, 1.0, *settings)


class Norm(nn.Module):
    """Batch norm of (B, C, H, W), plus a shortcut of that shape if one is given, then ReLU if `relu`.

    With `fork` set, the result is returned twice, once for each of its users. In eval mode, and with a shortcut of
    another shape, PyTorch's operations do the work.
    """

    def __init__(self, norm: nn.BatchNorm2d, *, relu: bool):
        super().__init__()
        self.norm, self.relu, self.fork = norm, relu, False

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        n = self.norm
        if not n.training or (shortcut is not None and shortcut.shape != x.shape):
            y = n(x) if shortcut is None else n(x) + shortcut
            y = F.relu(y) if self.relu else y
            return (y, y) if self.fork else y
        state = (n.weight, n.bias, n.running_mean, n.running_var, n.num_batches_tracked, n.momentum, n.eps)
        return kernels.BatchNorm.apply(x, shortcut, *state, self.relu, self.fork)


class MaxPool(nn.Module):
    """The largest of each 2x2 pixels: (B, C, H, W) -> (B, C, H//2, W//2); PyTorch's if H or W is odd."""

    def __init__(self, pool: nn.MaxPool2d):
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x) if x.shape[2] % 2 or x.shape[3] % 2 else kernels.MaxPool.apply(x)
