"""The floor of a computation: its matrix products and attention by themselves, on the same machine.

A Recorder notes the shapes of all matrix products and attention calls of a step, forward and backward, and
`measure` computes them on random tensors, with nothing else. No step of the same shapes can be faster on this
machine with this library, but another order of computing may need fewer of them.
"""

import statistics
import time
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Matrix products, and attention in each of the ways that the library computes it.
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
ATTENTION = "_scaled_dot_product"


class Recorder(TorchDispatchMode):
    """Counts the calls of PRODUCTS and ATTENTION by their arguments: of a tensor shape, strides and dtype."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in PRODUCTS or name.startswith(ATTENTION):
            self.calls[function, freeze(args), freeze(kwargs or {})] += 1
        return function(*args, **(kwargs or {}))


def freeze(x):
    """An argument as something that can be counted."""
    if torch.is_tensor(x):
        return ("tensor", tuple(x.shape), x.stride(), x.dtype, x.device)
    if isinstance(x, dict):
        return ("dict", *((key, freeze(value)) for key, value in x.items()))
    if isinstance(x, (list, tuple)):
        return ("list", *map(freeze, x))
    return ("value", x)


def thaw(x):
    """What `freeze` made of an argument, as an argument again; a tensor holds small random numbers."""
    kind, *parts = x
    if kind == "tensor":
        shape, stride, dtype, device = parts
        # Of an expanded tensor many elements are one.
        length = 1 + sum((n - 1) * step for n, step in zip(shape, stride))
        flat = torch.ones(length, dtype=dtype, device=device)
        return (flat.normal_(std=0.02) if dtype.is_floating_point else flat).as_strided(shape, stride)
    if kind == "dict":
        return {key: thaw(value) for key, value in parts}
    return list(map(thaw, parts)) if kind == "list" else parts[0]


@torch.no_grad()
def measure(calls, repeats=5):
    """Seconds of all recorded calls: of each kind the median of `repeats`, times its number."""
    total = 0.0
    for (function, args, kwargs), count in calls.items():
        args, kwargs, seconds = thaw(args), thaw(kwargs), []
        for _ in range(1 + repeats):
            synchronise()
            start = time.perf_counter()
            function(*args, **kwargs)
            synchronise()
            seconds.append(time.perf_counter() - start)
        # The first one warms up.
        total += statistics.median(seconds[1:]) * count
    return total


@torch.no_grad()
def measure_reading(tensors, repeats=5):
    """Seconds that it takes to read these tensors once: the median of `repeats` times their sums."""
    seconds = []
    for _ in range(1 + repeats):
        synchronise()
        start = time.perf_counter()
        for tensor in tensors:
            tensor.sum()
        synchronise()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def synchronise():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
