"""Time and memory of the losses of triton_ops.py against other ways to compute the same.

Two tasks, each forward only and forward + backward: `ce`, the mean cross-entropy of N tokens; `grpo`, the
GRPO loss of N / C sequences on policy (with entropies, a reference and a KL term) by grpo.py's `grpo_loss`.
Ways:

    ours       linear_cross_entropy, linear_grpo_loss
    replay     linear_logprob, whose backward pass computes the logits again
    plain      all logits, log_softmax, autograd
    compile    the same under torch.compile; its compilation is not timed
    torch      torch.nn.functional.linear_cross_entropy with its chunking options (without: the plain way)
    gemms      only the matrix products, 3 with backward and 1 without: a lower bound
    liger, trl, cce    only on CUDA, if benchmarks/requirements.txt is installed: Liger-Kernel's fused linear
               cross-entropy, TRL's ChunkedLogProbFunction, Apple's cut-cross-entropy

Each measurement is a process of its own, and the ways take turns for several rounds: the median over rounds
and how far they spread. On a CPU seconds are those of the processor (other load does not count), on one
thread. Memory is the peak above what the process held before the first call: resident on a CPU, allocated
on a GPU. Inputs are `random` (near-uniform softmax) or `peaked` (each target has about half of the
probability, as under a trained model).

    python benchmarks/logprob.py                 writes benchmarks/results/logprob_DEVICE.json, prints tables
    python benchmarks/logprob.py --sizes toy --rounds 1 --out /tmp/quick.json
    python benchmarks/logprob.py --readme        writes the table from the committed result file
"""

import argparse
import ctypes
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import readme

from medgr2 import cli, runs
from medgr2.errors import RunError

# N tokens, V vocabulary, D hidden size, dtype.
SIZES = {
    "cpu": {"toy": (4096, 735, 128, "float32"), "medium": (4096, 32000, 512, "float32")},
    "cuda": {"8k": (8192, 151936, 4096, "bfloat16"), "16k": (16384, 151936, 4096, "bfloat16")},
}
WAYS = {
    "ce": ("gemms", "ours", "plain", "compile", "torch", "liger", "trl", "cce"),
    "grpo": ("gemms", "ours", "replay", "plain", "compile", "trl"),
}
CASES = [("forward", "random"), ("both", "random"), ("both", "peaked")]
PEERS = {"liger": "liger_kernel", "trl": "trl", "cce": "cut_cross_entropy"}
# Tokens per sequence; weight of the KL term.
LENGTH, KL = 64, 0.02


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("--rounds", type=cli.number(int, 1), default=3, help="processes of each kind")
    p.add_argument("--sizes", nargs="+", help="sizes to measure (all of the device)")
    p.add_argument("--tasks", nargs="+", choices=tuple(WAYS), default=list(WAYS), help="tasks to measure")
    p.add_argument(
        "--seconds", type=float, default=3, help="a process repeats a call this long, at least twice"
    )
    p.add_argument("--out", help="result file (benchmarks/results/logprob_DEVICE.json)")
    cli.add_switch(p, "--readme", "only write the table, from the result file")
    # device,size,task,way,inputs,mode: measure it in this process.
    p.add_argument("--one", help=argparse.SUPPRESS)
    return p.parse_args()


# ---------------------------------------------------------------------------------------------------------
# In a process of its own.


def make(device, N, V, D, dtype, inputs):
    """hidden (N, D), weight (V, D), targets (N,).

    peaked: a hidden state points at its target's row, so far that the target's probability is about 1/2.
    """
    import torch

    torch.manual_seed(0)
    weight, targets = torch.randn(V, D, device=device), torch.randint(V, (N,), device=device)
    # So that logits have variance 1.
    hidden = torch.randn(N, D, device=device) / D**0.5
    if inputs == "peaked":
        rows = weight[targets]
        hidden += rows * (torch.tensor(float(V)).log() + 0.5) / (rows * rows).sum(1, keepdim=True)
    hidden, weight = (x.to(getattr(torch, dtype)).requires_grad_() for x in (hidden, weight))
    return hidden, weight, targets


def plain_logprob(hidden, weight, targets):
    log_p = (hidden @ weight.T).float().log_softmax(-1)  # (N, V)
    # A metric, without gradient as in linear_grpo_loss.
    entropy = -(log_p.detach().exp() * log_p.detach()).sum(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], entropy


def cross_entropy(way, hidden, weight, targets):
    """One forward pass → the loss, and no metric."""
    import torch.nn.functional as F
    from torch import nn

    import triton_ops

    if way == "liger":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss()(weight, hidden, targets), None
    if way == "cce":
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(hidden, weight, targets), None
    loss_of = {
        "ours": lambda: triton_ops.linear_cross_entropy(hidden, weight, targets),
        "plain": lambda: F.cross_entropy((hidden @ weight.T).float(), targets),
        "trl": lambda: -trl_logprob(hidden, weight, targets)[0].mean(),
        "torch": lambda: F.linear_cross_entropy(
            hidden, weight, targets, options=nn.LinearCrossEntropyOptions()
        ),
    }
    return loss_of[way](), None


def trl_logprob(hidden, weight, targets):
    # We have not run this: no GPU was available.
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, targets)[:2]


def grpo(way, hidden, weight, targets):
    """One forward pass → the loss and the mean entropy, a metric; on policy, every token counted."""
    import torch

    import triton_ops
    from grpo import Counts, grpo_loss

    S = len(targets) // LENGTH
    generator = torch.Generator().manual_seed(1)
    advantages = torch.randn(S, generator=generator).to(hidden.device)
    ref_logps = (-6 - torch.rand(S, LENGTH, generator=generator)).to(hidden.device)
    counts = Counts(S, S * LENGTH, LENGTH)
    inputs = triton_ops.LossInputs(advantages, torch.ones_like(ref_logps), ref_logps=ref_logps)
    if way == "ours":
        states, ids = hidden.view(S, LENGTH, -1), targets.view(S, LENGTH)
        loss, metrics, _ = triton_ops.linear_grpo_loss(
            grpo_loss, states, weight, ids, inputs, counts=counts, kl=KL
        )
        return loss, metrics["entropy"] / len(targets)
    logprob = {"replay": triton_ops.linear_logprob, "plain": plain_logprob, "trl": trl_logprob}[way]
    logps, entropy = logprob(hidden, weight, targets)
    logps = logps.view(S, LENGTH)
    inputs = inputs._replace(old_logps=logps.detach())
    return grpo_loss(logps, inputs, counts, kl=KL)[0], entropy.mean()


def gemms(hidden, weight, mode):
    """The matrix products that every way needs, 256 rows (on a GPU 2048) at a time."""
    import torch

    with torch.no_grad():
        n = 2048 if hidden.is_cuda else 256
        grad_weight = torch.zeros_like(weight)
        for rows in hidden.split(n):
            logits = rows @ weight.T
            if mode == "both":
                logits @ weight
                grad_weight.addmm_(logits.T, rows)


def call(task, way, mode, tensors):
    """A function of no arguments that does the work once and returns the loss, or None for `gemms`."""
    import torch

    hidden, weight, _ = tensors
    if way == "gemms":
        return lambda: gemms(hidden, weight, mode)
    loss_of = {"ce": cross_entropy, "grpo": grpo}[task]

    def step():
        return loss_of("plain" if way == "compile" else way, *tensors)

    if way == "compile":
        step = torch.compile(step)

    def forward():
        with torch.no_grad():
            return step()[0]

    def both():
        hidden.grad = weight.grad = None
        loss, _ = step()
        loss.backward()
        return loss.detach()

    return forward if mode == "forward" else both


def reset_peak():
    """Linux: give freed memory back, and start the peak of the resident memory again from what is left."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")


def memory(device, field):
    """Bytes held: `VmRSS` now, `VmHWM` at the peak."""
    import torch

    if device == "cuda":
        return torch.cuda.memory_allocated() if field == "VmRSS" else torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as f:
        return next(1024 * int(line.split()[1]) for line in f if line.startswith(field))


def measure(device, size, task, way, inputs, mode, seconds):
    """Median seconds of a call, peak extra bytes, loss and gradient norms, of this process."""
    import torch

    small = make(device, 2 * LENGTH, 300, 32, SIZES[device][size][3], inputs)
    # So that imports and the BLAS's own buffers are not counted.
    call(task, "plain" if way == "compile" else way, mode, small)()
    tensors = make(device, *SIZES[device][size], inputs)
    work = call(task, way, mode, tensors)
    if way == "compile":
        # So that the compiler's memory is not counted.
        work()
        tensors[0].grad = tensors[1].grad = None
    gc.collect()
    torch.cuda.reset_peak_memory_stats() if device == "cuda" else reset_peak()
    base = memory(device, "VmRSS")
    loss = work()
    norms = [x.grad.float().norm().item() for x in tensors[:2] if x.grad is not None]
    peak, times, begun = memory(device, "VmHWM") - base, [], time.perf_counter()
    while len(times) < 2 or time.perf_counter() - begun < seconds:
        clock = time.perf_counter if device == "cuda" else time.process_time
        start = clock()
        work()
        device == "cuda" and torch.cuda.synchronize()
        times.append(clock() - start)
    return {
        "seconds": statistics.median(times),
        "repeats": len(times),
        "bytes": peak,
        "loss": loss if loss is None else loss.item(),
        "grad_norms": norms,
    }


# ---------------------------------------------------------------------------------------------------------
# All of them.


def available(way, device):
    """None, or why this way is not measured here."""
    if way in PEERS and device != "cuda":
        return "needs a GPU"
    if way in PEERS:
        try:
            importlib.import_module(PEERS[way])
        except ImportError:
            return "not installed (benchmarks/requirements.txt)"


def run_one(seconds, *case):
    """Measure in a new process. A failure is a result too: its last line."""
    done = subprocess.run(
        [sys.executable, os.path.abspath(__file__), "--one", ",".join(case), "--seconds", str(seconds)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def summarize(rounds):
    """One row of the result: medians over the rounds, and their lowest and highest."""
    wrong = [r["error"] for r in rounds if "error" in r]
    if wrong:
        return {"error": wrong[0]}
    seconds = [r["seconds"] for r in rounds]
    return {
        "seconds": statistics.median(seconds),
        "lowest": min(seconds),
        "highest": max(seconds),
        "megabytes": statistics.median(r["bytes"] for r in rounds) / 1e6,
        "loss": rounds[0]["loss"],
        "grad_norms": rounds[0]["grad_norms"],
        "rounds": rounds,
    }


def compare(task, size, inputs, mode, device, rounds, seconds):
    """Rows of one table; in every round each way has its turn."""
    reasons = {way: available(way, device) for way in WAYS[task]}
    ways = [way for way in WAYS[task] if not reasons[way]]
    found = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            found[way].append(run_one(seconds, device, size, task, way, inputs, mode))
    where = {"task": task, "size": size, "inputs": inputs, "mode": mode}
    return [where | {"way": way} | summarize(found[way]) for way in ways]


def print_table(rows):
    """Seconds and memory, and both as multiples of the plain way's."""
    unknown = {"seconds": float("nan"), "megabytes": float("nan")}
    plain = next((row for row in rows if row["way"] == "plain" and "seconds" in row), unknown)
    cells = []
    for row in rows:
        if "error" in row:
            cells.append([row["way"], row["error"], *[None] * 5])
            continue
        rounds = f"{row['lowest']:.4f} to {row['highest']:.4f}"
        times, extra = row["seconds"] / plain["seconds"], None
        if plain["megabytes"]:
            extra = row["megabytes"] / plain["megabytes"]
        cells.append(
            [row["way"], f"{row['seconds']:.4f}", rounds, times, row["megabytes"], extra, row["loss"]]
        )
    first = rows[0]
    print(f"\n{first['task']}, {first['size']}, {first['inputs']}, {first['mode']}")
    headers = ["way", "seconds", "of the rounds", "× plain", "extra MB", "× plain", "loss"]
    print(cli.format_table(cells, headers), flush=True)


def compare_ways(found, ways):
    """The plain way's seconds, then multiples of its: our seconds, our memory, the other ways' seconds."""

    def multiple(way, key="seconds"):
        return f"{found[way][key] / found['plain'][key]:.2f}" if key in found.get(way, ()) else ""

    seconds = f"{found['plain']['seconds']:.3f}"
    return [seconds, multiple("ours"), multiple("ours", "megabytes"), *(multiple(way) for way in ways)]


def format_tables(result):
    """One row per comparison: multiples of the plain way's seconds, and of its extra memory."""
    rows_of, names = {}, {}
    for row in result["rows"]:
        comparison = tuple(row[key] for key in ("size", "task", "mode", "inputs"))
        rows_of.setdefault(comparison, {})[row["way"]] = row
        names[row["way"]] = None
    ways, lines = [way for way in names if way not in ("plain", "ours")], []
    for (size, task, mode, inputs), found in rows_of.items():
        passes = "forward + backward" if mode == "both" else mode
        lines.append([size, task, passes, inputs, *compare_ways(found, ways)])
    headers = ["size", "loss", "pass", "inputs", "plain s", "ours", "ours, memory", *ways]
    sizes = []
    for name, size in result["sizes"].items():
        sizes.append(f"{name}: N = {size['N']:,}, V = {size['V']:,}, D = {size['D']}, {size['dtype']}")
    hardware = result["hardware"]
    machine = (
        ", ".join(hardware["gpus"]) or f"one thread of {hardware['cpus']} CPU cores ({hardware['machine']})"
    )
    return (
        f"{cli.format_table(lines, headers, markdown=True)}\n\n{'; '.join(sizes)}. "
        f"Command `{result['command']}`; commit `{(result['git']['commit'] or '?')[:10]}`; {machine}, "
        f"torch {result['versions']['torch']}."
    )


def write_tables(path):
    with open(path, encoding="utf-8") as f:
        readme.write_block("logprob", format_tables(json.load(f)))


def main(args):
    results = os.path.join(ROOT, "benchmarks", "results")
    if args.readme:
        return write_tables(args.out or os.path.join(results, "logprob_cpu.json"))
    import torch

    if args.one:
        print(json.dumps(measure(*args.one.split(","), args.seconds)))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for way, reason in ((way, available(way, device)) for way in PEERS):
        print(f"{way}: {f'left out, {reason}' if reason else 'measured'}")
    if device == "cpu":
        print("no GPU: its sizes are not measured")
    sizes = args.sizes or list(SIZES[device])
    if set(sizes) - set(SIZES[device]):
        raise RunError(f"--sizes {' '.join(sizes)}: on {device} there are {', '.join(SIZES[device])}")
    result = {
        "command": "python " + " ".join([os.path.relpath(__file__, ROOT), *sys.argv[1:]]),
        **runs.environment(),
        "device": device,
        "threads": 1 if device == "cpu" else None,
        "sizes": {s: dict(zip("NVD", SIZES[device][s])) | {"dtype": SIZES[device][s][3]} for s in sizes},
        "sequence": LENGTH,
        "kl": KL,
        "rows": [],
    }
    for task, size, inputs, mode in ((t, s, i, m) for s in sizes for t in args.tasks for m, i in CASES):
        rows = compare(task, size, inputs, mode, device, args.rounds, args.seconds)
        print_table(rows)
        result["rows"] += rows
        runs.write_json(args.out or os.path.join(results, f"logprob_{device}.json"), result)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
