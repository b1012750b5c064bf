"""Errors in one line: what is wrong, where, and what to do. The user's mistakes, and errors of the system."""

import errno
import os
import re
import textwrap

MAKE_ROOM = "make room or choose another --out"
MOUNT = "mount the disk again or choose another --out"
ADVICE = {
    errno.ENOSPC: MAKE_ROOM,
    errno.EDQUOT: MAKE_ROOM,
    errno.EFBIG: "raise the limit (ulimit -f), or choose another --out on a disk that takes larger files",
    errno.ENAMETOOLONG: "choose a shorter --out",
    errno.EIO: MOUNT,
    errno.ESTALE: MOUNT,
    errno.ENOTCONN: MOUNT,
    errno.ENOENT: MOUNT,
    errno.ENOMEM: "close other programs",
    errno.EMFILE: "raise the limit (ulimit -n)",
    errno.EPIPE: "let something read the output, or write it to a file",
}
# What a stage needs less memory with, those that save most first: switches for the weights and what is kept
# of each layer; sizes of what is computed at a time; the last ones change the result.
SWITCHES = ("shard", "lora", "gradient_checkpointing")
SIZES = ("micro_batch", "micro_group", "rollout_batch", "batch", "max_pixels", "max_new_tokens")


class UserError(ValueError):
    """A mistake in what the user gave. `cli.run_main` prints only the message and exits with this status."""

    exit_status = 2


class RecordError(UserError):
    """A record, or a file of records, that cannot be used."""


class RunError(UserError):
    """An output folder, or an argument, that cannot be used."""


class ModelError(UserError):
    """A model that cannot be used."""


def require(holds, message):
    """Raise RecordError(message) unless `holds`. A message is `what is wrong: what to do`."""
    if not holds:
        raise RecordError(message)


def explain_system_error(error, args):
    """What the machine lacks and what to do, in one line; None if `error` is not such an error.

    `args`: the values of the script's flags, by name.
    """
    text, out = " ".join(str(error).split()), args.get("out") or ""
    short = textwrap.shorten(text, 160, placeholder=" ...")
    if re.search("/dev/shm|</torch_", text) and os.strerror(errno.ENOSPC) in text:
        return f"{short}: /dev/shm is full; give it more room (docker run --shm-size=8g)"
    if text.startswith("DataLoader worker"):
        return f"{short.rstrip('.')}: lower --workers, or give the machine more memory"
    if is_out_of_memory(error):
        return f"{short or 'out of memory'}; {advise_memory(args)}"
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object.strip()[:160]!r}: not UTF-8; rename the file or folder"
    # safetensors turns an OSError into an error of its own.
    found = re.search(r"\(os error (\d+)\)", text)
    code = int(found[1]) if found else getattr(error, "errno", None)
    path = str(getattr(error, "filename", None) or out)
    is_network = isinstance(error, ConnectionError) and code != errno.EPIPE
    if code in (None, errno.EBADF) or is_network or code == errno.ENOENT and not is_lost(path, out):
        return None
    resumes = args.get("resume") and code != errno.ENAMETOOLONG
    advice = ADVICE.get(code, "choose another --out") + ", the same command resumes from here" * bool(resumes)
    return f"{'stdout' if code == errno.EPIPE else path}: {os.strerror(code)}; {advice}"


def advise_memory(args):
    """Which of a stage's flags can still lower what it needs, those that save most first."""
    # A step's examples come in micro-batches where there are any; one process has nothing to share out.
    useless = {"batch"} if "micro_batch" in args else set()
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        useless.add("shard")
    add = [name for name in SWITCHES if name in args and not args[name] and name not in useless]
    lower = [name for name in SIZES if name in args and args[name] != 1 and name not in useless]
    advice = []
    for verb, names in (("add", add), ("lower", lower)):
        flags = [f"--{name.replace('_', '-')}" for name in names]
        advice += [f"{verb} {' or '.join(flags)}"] * bool(flags)
    return ", or ".join(advice) or "lower the size of the input"


def is_out_of_memory(error):
    """Has the GPU or the machine run out of memory? torch has several errors for it."""
    says = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    is_told = isinstance(error, RuntimeError) and any(words in str(error) for words in says)
    return isinstance(error, MemoryError) or is_told


def is_lost(path, out):
    """Is the path in a folder of the output that no longer exists?"""
    return bool(out) and path.startswith(out) and not os.path.exists(os.path.dirname(path))


def in_one_line(error):
    """The message of a library's exception, for one of ours."""
    return " ".join(str(error).split())[:250] or type(error).__name__
