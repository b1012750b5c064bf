"""Several processes share batches that need no gradient."""

from itertools import islice

from accelerate.utils import gather_object


def take_turns(batches, work, accelerator):
    """Yield work(batch) of each batch, in order, on every process; each of N processes does every N-th batch.

    A batch is the same for any number of processes, and so are its padding and its results.
    """
    batches = iter(batches)
    while turn := list(islice(batches, accelerator.num_processes)):
        # Fewer batches than processes are left at the end.
        own = turn[accelerator.process_index : accelerator.process_index + 1]
        yield from gather_object([work(batch) for batch in own])
