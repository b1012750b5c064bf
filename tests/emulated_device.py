"""A second device on the CPU, `emulated`, that refuses to be mixed with the CPU where CUDA does.

Its tensors are tensors of PyTorch's PrivateUse1 backend: `x.device`, factory functions, `.to`, modules,
autograd and its thread take them as they take CUDA's. The numbers lie in the memory of the CPU, and every
operation runs on that memory, after `require_one_device`.

Import it before the first backward pass of a process: autograd makes its threads, one per device, once.
"""

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten


class Backend:
    """What PyTorch and the libraries ask torch.emulated."""

    is_initialized = is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])


_setup_privateuseone_for_python_backend("emulated", Backend)
DEVICE = torch.device("emulated", 0)
# Operations so far.
count = 0

# Operations whose purpose is to move numbers between devices.
MOVES = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default}
# Operations that move their indices, of any shape, to the indexed tensor's device.
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
# Operations that take a number on the CPU (a tensor of no dimension), beside the elementwise ones.
TAKE_NUMBERS = {aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor, *INDEXING}
# What a factory function makes is made on the CPU and wrapped.
FACTORIES = "empty.memory_format empty_strided arange arange.start arange.start_step linspace".split()


class EmulatedTensor(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __repr__(self):
        return f"emulated {self.cpu_tensor}"

    def untyped_storage(self):
        return self.cpu_tensor.untyped_storage()

    def tolist(self):
        return self.cpu_tensor.tolist()

    def __reduce_ex__(self, protocol):
        """torch.save writes the numbers; what is loaded is on the CPU, as with map_location="cpu"."""
        return self.cpu_tensor.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        copy = self.detach().clone().requires_grad_(self.requires_grad)
        copy._is_param = getattr(self, "_is_param", False)
        return memo.setdefault(id(self), copy)


def wrap(x):
    """A tensor of the emulated device over the memory of a CPU tensor, its attribute `cpu_tensor`."""
    like = {"dtype": x.dtype, "device": DEVICE, "storage_offset": x.storage_offset()}
    wrapped = torch.Tensor._make_wrapper_subclass(EmulatedTensor, x.shape, x.stride(), **like)
    wrapped.cpu_tensor = x
    return wrapped


def require_one_device(func, args, tensors):
    """Raise RuntimeError, as CUDA's kernels do, if `func` does not take tensors of both devices."""
    if func in INDEXING and isinstance(args[0], EmulatedTensor):
        tensors = [x for x in (args[0], *args[2:]) if isinstance(x, torch.Tensor)]
    strangers = [x for x in tensors if not isinstance(x, EmulatedTensor)]
    if not strangers or len(strangers) == len(tensors) or func in MOVES:
        return
    if torch.Tag.pointwise in func.tags or func in TAKE_NUMBERS:
        is_changed = func._schema.is_mutable and args[0] is strangers[0]
        if not is_changed and all(x.ndim == 0 for x in strangers):
            return
    raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {DEVICE} and cpu")


def convert(change, x):
    """The arguments or results of an operation, with `change` applied to each that is no list."""
    return type(x)(convert(change, y) for y in x) if isinstance(x, (list, tuple)) else change(x)


def run(func, args, kwargs):
    """An operation on the memory of its tensors. What it returns is on the device that was asked for."""
    global count
    count += 1
    originals, tensors = {}, []

    def to_cpu(x):
        if isinstance(x, torch.device):
            return torch.device("cpu")
        if isinstance(x, torch.Tensor):
            tensors.append(x)
        if not isinstance(x, EmulatedTensor):
            return x
        originals[id(x.cpu_tensor)] = x
        return x.cpu_tensor

    def to_emulated(x):
        # What is returned in place is the tensor that was given.
        return originals[id(x)] if id(x) in originals else wrap(x) if isinstance(x, torch.Tensor) else x

    on_cpu = convert(to_cpu, args), {name: convert(to_cpu, x) for name, x in kwargs.items()}
    require_one_device(func, args, tensors)
    result = func(*on_cpu[0], **on_cpu[1])
    for x in originals.values():
        assert x.shape == x.cpu_tensor.shape, f"{func} changes a tensor's shape, which is not emulated"
    moved = "device" in kwargs and torch.device(kwargs["device"]).type == "cpu"
    return result if moved else convert(to_emulated, result)


def make_factory(func):
    def make(*args, device=None, **kwargs):
        return wrap(func(*args, device="cpu", **kwargs))

    return make


library = torch.library.Library("aten", "IMPL")
for name in FACTORIES:
    packet, _, overload = name.partition(".")
    library.impl(name, make_factory(getattr(getattr(aten, packet), overload or "default")), "PrivateUse1")


def copy_from(source, target, non_blocking=False):
    """torch.tensor(..., device="emulated") ends here."""
    source, target_memory = (getattr(x, "cpu_tensor", x) for x in (source, target))
    target_memory.copy_(source)
    return target


library.impl("_copy_from", copy_from, "PrivateUse1")
library.impl("_local_scalar_dense", lambda x: x.cpu_tensor.item(), "PrivateUse1")
