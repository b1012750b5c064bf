"""Sharding by PyTorch's FSDP2: of every weight, gradient and moment a process holds only its part.

To learn, the processes gather one decoder layer at a time, compute with it and free it, so they all make the
same number of passes. What makes as many passes as it likes, as sampling does, gathers the model first:

    sharding.shard(policy)
    with sharding.gathered(policy):
        ...                         # sample, score: no process waits for another
    loss.backward()                 # the gradients are sums over the processes

Weights, gradients and moments are fp32; weights are gathered in the dtype of the device's computations, and
what does not learn is kept in it. A model that is frozen whole, as GRPO's reference, is sharded too.
"""

import contextlib
import os
import shutil

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from medgr2 import loading, processes, runs
from medgr2.errors import ModelError, RunError, in_one_line


def make_mesh(device):
    """All processes, (N,); of several nodes (nodes, processes of a node): each node holds the whole model."""
    if not dist.is_initialized():
        # One process, started without a launcher.
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    world = dist.get_world_size()
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if per_node == world:
        return init_device_mesh(device, (world,))
    return init_device_mesh(device, (world // per_node, per_node), mesh_dim_names=("node", "shard"))


def shard(loaded):
    """Shard a VLM, in place. Its Parameters are new ones: an optimiser is made afterwards.

    Raises ModelError if something that learns would not be sharded.
    """
    model, dtype = loaded.model, loading.best_dtype()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    for p in frozen:
        p.data = p.data.to(dtype)
    settings = {"mesh": make_mesh(loaded.device.type)}
    settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.get_decoder().layers:
        fully_shard(layer, **settings)
    # One unit, because the two may be tied. The head is read after the embedding was called, in each pass.
    fully_shard([model.get_input_embeddings(), loaded.head], reshard_after_forward=False, **settings)
    # The frozen tower may be called by itself (encoding.encode_images), so it stays whole.
    fully_shard(model.base_model, ignored_params=set(frozen), **settings)
    for unit in units(loaded):
        # Each process divides its loss by the whole batch's counts: the gradient is a sum, not a mean.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    for name, p in model.named_parameters():
        if p.requires_grad and not isinstance(p, DTensor):
            raise ModelError(f"{type(model).__name__}: --shard cannot shard {name}; train without it")


def load_frozen(name, device):
    """A sharded VLM that does not learn: GRPO's reference."""
    loaded = loading.load(name, device, loading.best_dtype())
    loaded.model.requires_grad_(False)
    shard(loaded)
    return loaded


def units(loaded):
    return [module for module in loaded.model.modules() if isinstance(module, FSDPModule)]


@contextlib.contextmanager
def gathered(loaded):
    """Within it each process holds the whole model, to compute without gradient. All processes enter it.

    Does nothing to a model that is not sharded.
    """
    if not units(loaded):
        yield
        return
    layers = loaded.model.get_decoder().layers
    for unit in units(loaded):
        unit.unshard()
    for layer in layers:
        layer.set_reshard_after_forward(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True)
        # FSDP noted these passes for a backward pass that does not come.
        loaded.model.base_model.reset_iter_state()
        for unit in units(loaded):
            unit.reshard()


def dummy_passes(loaded, passes):
    """By how many passes this process has fewer than the one that has the most; 0 without sharding."""
    return processes.largest(passes) - passes if units(loaded) else 0


def collect(loaded, main):
    """At the end of a run: leave the main process with a plain model on the CPU, which can be saved."""
    plain = {}
    for module in loaded.model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if isinstance(p, DTensor) and p not in plain:
                whole = p.detach().full_tensor()
                plain[p] = torch.nn.Parameter(whole.cpu(), p.requires_grad) if main else p
            if p in plain:
                # A tied weight stays tied.
                setattr(module, name, plain[p])


# ---------------------------------------------------------------------------------------------------------
# Commits: each process writes and reads its own part.


def tensors_to_commit(parameters, optimizer):
    """The weights that learn, {name: Parameter}, and the optimiser's state of each, by name."""
    found = dict(parameters)
    for name, p in parameters.items():
        found |= {f"{name}/{key}": x for key, x in optimizer.state.get(p, {}).items()}
    return found


def save(tensors, folder):
    """Write each process's part of the tensors into `folder` → {file: SHA-256}. All processes call it.

    They need not be on one machine, but `folder` must be one folder for all. Raises RunError if it cannot be
    written.
    """
    if dist.get_rank() == 0:
        # Of a commit that was not completed.
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    try:
        dcp.save(tensors, checkpoint_id=folder)
    except CheckpointException as error:
        # All processes get the errors of all, which torch may have covered with its own.
        first = next(iter(error.failures.values()))[0]
        cause = in_one_line(first if isinstance(first, OSError) else first.__context__ or first)
        advice = "make room, the same command resumes from the commit before"
        raise RunError(f"{folder}: a commit was not written ({cause}); {advice}") from None
    return hash_files(folder)


def hash_files(folder):
    """{file: SHA-256}, each file read by one process."""
    state = PartialState()
    names = sorted(os.listdir(folder))[state.process_index :: state.num_processes]
    found = gather_object([{name: runs.sha256(os.path.join(folder, name)) for name in names}])
    return {name: digest for part in found for name, digest in part.items()}


def is_intact(folder, hashes):
    """Does the folder hold what `save` wrote, {file: SHA-256}? For one process alone."""
    names = os.listdir(folder) if os.path.isdir(folder) else ()
    return {name: runs.sha256(os.path.join(folder, name)) for name in names} == hashes


def restore(folder, parameters, optimizer):
    """Read what `save` wrote, by any number of processes, into the weights and AdamW's moments."""
    for p in parameters.values():
        # All on the weight's device, because the fused kernels refuse a `step` elsewhere.
        state = {"step": torch.zeros((), device=p.device)}
        optimizer.state[p] = state | {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    # An optimiser that had skipped all of its steps has no state.
    planner = DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(tensors_to_commit(parameters, optimizer), checkpoint_id=folder, planner=planner)
