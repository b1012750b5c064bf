"""A run: one stage's output folder, and all that a stage need not think about.

A stage writes into `OUT.part`; when it finishes, the folder is renamed to `OUT`. So `OUT` is final once it exists, and the
same command again either finds it complete, or goes on where the last `commit` left off.

    args.json       arguments, seeds, versions, git commit, hardware, SHA-256 of inputs, start and end
    metrics.jsonl   one line a step
    metrics.json    the result
    lock, state/    while unfinished: who is writing; the last two commits (position, optimiser, sizes of the files so far)

    run = runs.start(args, inputs=[args.data])
    for step in run.progress(range(run.state.get("step", 0), steps), "training"):
        run.append("rollouts.jsonl", rows)
        run.log(step=step, loss=loss)
        if run.due(step + 1, every=100):
            run.commit(step=step + 1)
    run.finish({"loss": loss})

SIGTERM (a scheduler's grace period) ends a run of one process after its next commit; SIGKILL, and SIGTERM where there are several,
at once. The same command goes on from the last commit.
"""

import datetime
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from medgr2.errors import RunError


def seed_of(*parts):
    """A seed from numbers and names, the same on every machine: int in [0, 2^63)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def batch_indices(step, size, n, seed):
    """Indices of the examples of one step; every epoch is a permutation of its own, so a step needs no history."""
    orders = {}
    picked = range(step * size, (step + 1) * size)
    for epoch in {i // n for i in picked}:
        orders[epoch] = random.Random(seed_of(seed, "epoch", epoch)).sample(range(n), n)
    return [orders[i // n][i % n] for i in picked]


def prefetch(items):
    """The items of an endless iterator, each made in a thread while the caller works on the one before."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items)
        while True:
            item, coming = coming.result(), thread.submit(next, items)
            yield item


def training_state(parameters, optimizer):
    """What `commit` keeps of a training run: the weights that learn, by name, and the optimiser's state."""
    weights = {name: p.detach() for name, p in parameters.items()}
    return {"model": weights, "optimizer": optimizer.state_dict()}


def restore_training_state(state, model, optimizer):
    """Put the last commit's weights and optimiser state back, if there is one, and free their copy."""
    if "optimizer" in state:
        model.load_state_dict(state.pop("model"), strict=False)
        optimizer.load_state_dict(state.pop("optimizer"))


def sum_gradients(parameters, accelerator):
    """Add up every process's gradients, in place: each divided its loss by the whole batch's count, so the sum is the gradient."""
    import torch

    for p in parameters:
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        p.grad = accelerator.reduce(grad, "sum") if accelerator.num_processes > 1 else grad


def sha256(path):
    """SHA-256 of a file, or of a folder's files by name; None for what is not on this disk (a hub name)."""
    if not os.path.exists(path):
        return None
    files = (
        [path]
        if os.path.isfile(path)
        else sorted(os.path.join(d, f) for d, _, fs in os.walk(path) for f in fs)
    )
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def environment():
    """Versions, git commit and hardware, for args.json and for benchmarks."""
    from importlib.metadata import PackageNotFoundError, version

    def git(*command):
        here = os.path.dirname(os.path.abspath(__file__))
        try:
            done = subprocess.run(["git", "-C", here, *command], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "pillow", "numpy", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    torch = sys.modules.get("torch")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else []
    return {
        "versions": versions,
        "git": {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))},
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "gpus": gpus},
    }


def write_json(path, value):
    """Write beside, then rename: never half a file."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, ensure_ascii=False)
        f.write("\n")
    os.replace(path + ".tmp", path)


class Hashed:
    """A file that is hashed and measured while it is written."""

    def __init__(self, file):
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, data):
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


class Run:
    """An output folder in the making. Only the main process writes; the others' calls do nothing."""

    def __init__(self, folder, part, main, meta, state, lock=None):
        self.folder, self.part, self.main, self.meta, self.state, self.lock = (
            folder,
            part,
            main,
            meta,
            state,
            lock,
        )
        self.files, self.commits, self.stopping = {}, state.get("commits", 0), False
        self.handler = signal.signal(signal.SIGTERM, self.stop) if main else None

    def stop(self, *_):
        self.stopping = True

    def path(self, name):
        """Where a file of this run is written (inside `OUT.part`)."""
        return os.path.join(self.part, name)

    def append(self, name, rows):
        """Add rows to a JSONL file of the run. They count once `commit` has been called."""
        if not self.main:
            return
        if name not in self.files:
            self.files[name] = open(self.path(name), "a", encoding="utf-8", newline="\n")
        for row in rows:
            self.files[name].write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")

    def log(self, **metrics):
        """One line of metrics.jsonl; floats are rounded to six significant digits."""
        self.append(
            "metrics.jsonl",
            [{k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in metrics.items()}],
        )

    def due(self, step, every):
        """Is it time to commit? Every so many steps, and when SIGTERM has asked to stop."""
        return step % every == 0 or self.stopping

    def commit(self, **state):
        """All that was appended so far is safe; `state` (numbers, strings, tensors, dicts of them) is where to go on.

        After SIGTERM the run ends here, with status 143. Raises RunError where the disk has no room; the commits before it stay.
        """
        if not self.main:
            return
        sizes = dict(self.state.get("sizes", {}))
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            sizes[name] = file.tell()
        self.commits += 1
        self.state = {**state, "sizes": sizes, "commits": self.commits}
        os.makedirs(self.path("state"), exist_ok=True)
        checksum = self.save_state(self.path("state/new"))
        # the checksum is in the name: a file is whole and has it, or is not there
        os.replace(self.path("state/new"), self.path(f"state/{self.commits:08}-{checksum[:16]}.pt"))
        for old in sorted(os.listdir(self.path("state")))[:-2]:
            os.remove(self.path(f"state/{old}"))
        self.leave_if_stopping()

    def save_state(self, path):
        """Write the state and return its SHA-256. Raises RunError where the disk has no room for it."""
        import torch

        try:
            with open(path, "wb") as file:
                hashed = Hashed(file)
                torch.save(self.state, hashed)
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            # torch may put its own over the disk's
            if os.path.exists(path):
                os.remove(path)
            free = shutil.disk_usage(self.part).free
            with open(os.devnull, "wb") as nowhere:
                torch.save(self.state, whole := Hashed(nowhere))
            # a quota, say
            if whole.size <= free:
                raise error if isinstance(error, OSError) else error.__context__ or error
            raise RunError(
                f"{self.part}: a commit needs {whole.size / 2**20:.3f} MiB and {free / 2**20:.3f} MiB are free; "
                "make room, the same command goes on from the commit before"
            ) from None
        return hashed.digest.hexdigest()

    def leave_if_stopping(self):
        if self.stopping:
            print(
                f"{self.part}: stopped by SIGTERM at step {self.state.get('step', 0)}; the same command goes on from here",
                flush=True,
            )
            sys.exit(128 + signal.SIGTERM)

    def progress(self, items, what):
        """A progress bar on a terminal, nothing elsewhere."""
        from tqdm import tqdm

        for item in tqdm(items, desc=what, disable=None if self.main else True, leave=False):
            yield item
            # a loop that commits nothing
            self.leave_if_stopping()

    def finish(self, metrics, line=""):
        """Write metrics.json and args.json, rename `OUT.part` to `OUT`, print one line."""
        if not self.main:
            return
        for file in self.files.values():
            file.close()
        self.meta["ended"] = now()
        write_json(self.path("metrics.json"), metrics)
        write_json(self.path("args.json"), self.meta)
        shutil.rmtree(self.path("state"), ignore_errors=True)
        os.replace(self.part, self.folder)
        os.remove(os.path.join(self.folder, "lock"))
        self.lock.close()
        signal.signal(signal.SIGTERM, self.handler)
        print(f"{self.folder}: {line}" if line else f"{self.folder}: done", flush=True)


def now():
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def start(args, inputs=(), main=True, free=()):
    """Open the run of these arguments: new, or resumed; leaves with status 0 if it is complete already.

    `inputs`: files, folders or hub names that the run reads; their hashes are kept and must not change before a resume.
    `free`: arguments that may, because nothing in the output depends on them.
    Raises RunError where `args.out` holds another run.
    """
    import torch

    random.seed(args.seed)
    torch.manual_seed(args.seed)
    folder = args.out.rstrip("/")
    part = folder + ".part"
    given = {k: v for k, v in vars(args).items() if k != "resume"}
    meta = {
        "script": os.path.basename(sys.argv[0]),
        "args": json.loads(json.dumps(given)),
        "inputs": {p: sha256(p) for p in inputs if p},
        "started": now(),
        "ended": None,
        **environment(),
    }
    lock = take_lock(part) if main and not os.path.exists(folder) else None
    if os.path.exists(folder):
        # it was finished this very moment
        if lock:
            shutil.rmtree(part)
        same_run(folder, meta, free)
        if main:
            print(f"{folder}: complete already")
        sys.exit(0)
    state = {}
    if args.resume and os.path.isdir(os.path.join(part, "state")):
        same_run(part, meta, free)
        state = restore(part, main)
    # nothing was committed: nothing is lost
    if main and not state:
        empty(part)
        write_json(os.path.join(part, "args.json"), meta)
    return Run(folder, part, main, meta, state, lock)


def take_lock(part):
    """Make the folder and lock it for this process; the lock goes when the process does. Raises RunError where it is taken."""
    import fcntl

    os.makedirs(part, exist_ok=True)
    lock = open(os.path.join(part, "lock"), "a+")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        raise RunError(
            f"{part}: {lock.read().strip() or 'another process'} is writing there; wait for it, or choose another --out"
        ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {platform.node()}")
    lock.flush()
    return lock


def empty(part):
    """Remove all but the lock."""
    for name in os.listdir(part):
        remove = shutil.rmtree if os.path.isdir(os.path.join(part, name)) else os.remove
        name == "lock" or remove(os.path.join(part, name))


def same_run(folder, meta, free=()):
    """Raise RunError unless the run in `folder` had the same script, arguments (but for those in `free`) and inputs."""
    try:
        with open(os.path.join(folder, "args.json"), encoding="utf-8") as f:
            old = json.load(f)
        old["script"], old["args"].items(), old["inputs"].items()
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        raise RunError(
            f"{folder}: holds something else than a run (no args.json); choose another --out"
        ) from None
    where = f"{folder}: holds another run"
    if old["script"] != meta["script"]:
        raise RunError(f"{where} (of {old['script']}); choose another --out or remove it")
    # it says what may be read, not what is
    keys = sorted({*old["args"], *meta["args"]} - {*free, "image_root"})
    other = [k for k in keys if old["args"].get(k) != meta["args"].get(k)]
    if other:
        flags = ", ".join(
            f"--{k.replace('_', '-')} {old['args'].get(k)} there, {meta['args'].get(k)} here"
            for k in other[:3]
        )
        raise RunError(f"{where} ({flags}); choose another --out or remove it")
    changed = [p for p, digest in meta["inputs"].items() if old["inputs"].get(p) != digest]
    if changed:
        raise RunError(
            f"{folder}: {changed[0]} has changed since this run read it; choose another --out or remove the folder"
        )


def restore(part, main):
    """The newest commit whose checksum holds; what was written after it is cut off and said. {} if there is none."""
    import torch

    state = {}
    for name in sorted(os.listdir(os.path.join(part, "state")), reverse=True):
        path = os.path.join(part, "state", name)
        if not state and sha256(path).startswith(name.partition("-")[2].removesuffix(".pt") or "none"):
            # every process reads it: not all onto GPU 0
            state = torch.load(path, map_location="cpu", weights_only=True)
        elif not state and main and name.endswith(".pt"):
            print(f"{path}: damaged, set aside; taking the commit before it")
            os.replace(path, os.path.join(part, name + ".damaged"))
    sizes = state.get("sizes", {})
    for name in sorted(os.listdir(part)) if main and state else []:
        extra = (
            os.path.getsize(os.path.join(part, name)) - sizes.get(name, 0) if name.endswith(".jsonl") else 0
        )
        if extra:
            os.truncate(os.path.join(part, name), sizes.get(name, 0))
            print(f"{os.path.join(part, name)}: dropped {extra} bytes written after the last commit")
    if main and state:
        print(f"{part}: going on from step {state.get('step', 0)}")
    return state
