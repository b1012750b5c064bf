"""What training loops share: records, batches, gradients over processes, resuming."""

import functools
import itertools
import math
import random

from medgr2 import leakage, records
from medgr2.errors import RunError
from medgr2.images import find_unreadable
from medgr2.progress import tell
from medgr2.runs import seed_of

# This many steps in a row whose gradient is not finite stop a run.
MAX_SKIPPED = 5


def read_usable(path, fields, root=None, skip=False):
    """The records of a training file. With `skip`, bad lines and unreadable images are left out and named.

    Raises RecordError as records.read_records, for a missing image, unless `skip`, and if nothing is left.
    """
    rows = records.read_kept(path, fields, root, 1.0 if skip else 0)
    if not skip:
        records.require_images(path, rows)
    unreadable = find_unreadable(rows, 1.0) if skip else {}
    for row in rows:
        if row["image"] in unreadable:
            tell(f"left out: {path}: record {row['id']}: {unreadable[row['image']]}")
    return [row for row in rows if row["image"] not in unreadable]


def read_data(args, files, main):
    """[(file, its records)]. files: [(file, the fields that its records must have)].

    Raises RunError if --test leaks into one; `main` writes where.
    """
    skip = args.on_error == "skip"
    data = [(file, read_usable(file, fields, args.image_root, skip)) for file, fields in files]
    if args.test:
        train = [(file, row) for file, rows in data for row in rows]
        path = args.out.rstrip("/") + ".leaks.jsonl"
        leakage.refuse_leakage(train, args.test, args.allow_leakage, path, args.image_root, main)
    return data


def shuffle(groups, size, seed):
    """batch_of(step) → the step's `size` examples. Every epoch is a permutation of the groups of its own.

    groups: lists of examples, which stay together. A batch depends only on its step, so that a resumed run
    needs no history.
    """
    n = sum(map(len, groups))

    @functools.lru_cache(2)
    def order(epoch):
        permutation = random.Random(seed_of(seed, "epoch", epoch)).sample(groups, len(groups))
        return list(itertools.chain(*permutation))

    def batch_of(step):
        positions = range(step * size, (step + 1) * size)
        return [order(position // n)[position % n] for position in positions]

    return batch_of


def sum_gradients(parameters, accelerator):
    """Sum every parameter's gradient over the processes, in place.

    Each process divided its loss by the count of the whole batch, so the sum is the gradient of the batch.
    The gradient of a sharded weight is that sum already (sharding.py).
    """
    import torch

    for p in parameters:
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        is_partial = accelerator.num_processes > 1 and not is_sharded(p)
        p.grad = accelerator.reduce(grad, "sum") if is_partial else grad


def is_sharded(tensor):
    """Is it a DTensor, of which each process holds a part?"""
    return hasattr(tensor, "full_tensor")


def clip_gradient(parameters, limit):
    """Scale the gradient so that its norm is `limit` at most → the norm before. Of a sharded model too."""
    import torch

    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return (norm.full_tensor() if is_sharded(norm) else norm).item()


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over the first `warmup` share of the steps, then half a cosine down to zero."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def step(optimizer, lr, norm):
    """One step of the optimiser at this learning rate; then the gradients are cleared.

    norm: of the gradient. If it is not finite, there is no step.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()


class Skipped:
    """Counts the steps that `step` skipped. `total` is part of a commit; the count in a row is not."""

    def __init__(self, total=0):
        self.total, self.in_a_row = total, 0

    def count(self, step, loss, norm):
        """Raise RunError if the loss is not finite, or the gradient for the MAX_SKIPPEDth time in a row."""
        is_skipped = not math.isfinite(norm)
        self.total, self.in_a_row = self.total + is_skipped, (self.in_a_row + 1) * is_skipped
        problem = "the loss is not finite"
        if math.isfinite(loss):
            problem = f"the gradient is not finite in {self.in_a_row} steps in a row"
        if not math.isfinite(loss) or self.in_a_row == MAX_SKIPPED:
            raise RunError(
                f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}: {problem}; "
                "lower --lr, with another --out (the last commit is kept)"
            )


def find_not_finite(tensors):
    """The name of the first of these tensors, {name: tensor}, that holds an infinity or NaN, or None."""
    import torch

    for name, x in tensors.items():
        # A sum needs no copy and keeps any infinity or NaN. Single bytes are quantised weights.
        if x.itemsize > 1 and not x.sum(dtype=torch.float32).isfinite():
            return name
    return None


def state(parameters, optimizer):
    """What a commit keeps of a training run: the weights that learn, by name, and the optimiser's state.

    Of a sharded model they are `shards`, which all processes write. Raises RunError if a weight is not
    finite: the commit before is better.
    """
    weights = {name: p.detach() for name, p in parameters.items()}
    if name := find_not_finite(weights):
        raise RunError(f"{name} is not finite; lower --lr, with another --out (the last commit is kept)")
    if any(map(is_sharded, weights.values())):
        from medgr2 import sharding

        return {"shards": sharding.tensors_to_commit(parameters, optimizer)}
    return {"model": weights, "optimizer": optimizer.state_dict()}


def restore_state(committed, model, optimizer):
    """Put the last commit's weights and optimiser state back, if there is one, and free their copy."""
    if "shards" in committed:
        from medgr2 import sharding

        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        sharding.restore(committed["shards"], parameters, optimizer)
    if "optimizer" in committed:
        model.load_state_dict(committed.pop("model"), strict=False)
        optimizer.load_state_dict(committed.pop("optimizer"))
