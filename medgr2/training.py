"""What the training loops share: the batches of a step, prefetching, gradients over processes, resuming."""

import math
import random
from concurrent.futures import ThreadPoolExecutor

from medgr2.runs import seed_of


def batch_indices(step, size, n, seed):
    """Indices of one step's `size` examples out of n. Every epoch is a permutation of its own.

    Depends only on the arguments, so that a resumed run needs no history.
    """
    permutations, indices = {}, []
    for position in range(step * size, (step + 1) * size):
        epoch, i = divmod(position, n)
        if epoch not in permutations:
            permutations[epoch] = random.Random(seed_of(seed, "epoch", epoch)).sample(range(n), n)
        indices.append(permutations[epoch][i])
    return indices


def prefetch(items):
    """Yield the items of an endless iterator; a thread makes the next one while the caller uses this one."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items)
        while True:
            item, coming = coming.result(), thread.submit(next, items)
            yield item


def sum_gradients(parameters, accelerator):
    """Sum every parameter's gradient over the processes, in place.

    Each process divided its loss by the count of the whole batch, so the sum is the gradient of the batch.
    """
    import torch

    for p in parameters:
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        p.grad = accelerator.reduce(grad, "sum") if accelerator.num_processes > 1 else grad


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over the first `warmup` share of the steps, then half a cosine down to zero."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def step(optimizer, lr):
    """One step of the optimiser at this learning rate; then the gradients are cleared."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


def state(parameters, optimizer):
    """What a commit keeps of a training run: the weights that learn, by name, and the optimiser's state."""
    weights = {name: p.detach() for name, p in parameters.items()}
    return {"model": weights, "optimizer": optimizer.state_dict()}


def restore_state(committed, model, optimizer):
    """Put the last commit's weights and optimiser state back, if there is one, and free their copy."""
    if "optimizer" in committed:
        model.load_state_dict(committed.pop("model"), strict=False)
        optimizer.load_state_dict(committed.pop("optimizer"))
