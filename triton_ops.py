"""Log-probability and entropy of target tokens straight from hidden states: the (N, V) logits never exist.

    z = hidden @ weight.T / temperature          only ever a chunk of its N rows at a time
    logps_i   = z_i[y_i] - log sum_j exp z_ij            d logps_i   / d z_ij = 1[j = y_i] - p_ij
    entropy_i = - sum_j p_ij log p_ij                    d entropy_i / d z_ij = - p_ij (log p_ij + entropy_i)

Why in chunks: 8k tokens of a 152k-word vocabulary are 5 GB of fp32 logits, and plain autograd holds more than one such
tensor until the backward pass. Here a GEMM fills a buffer of a few hundred rows, a row operation reduces it to four
numbers a row, and the buffer serves the next chunk. The backward pass computes the chunk's logits again (one GEMM more
than plain autograd), overwrites them with their gradient and multiplies that on to hidden and weight.

The row operations exist twice: in plain PyTorch, the reference and the CPU's path, and as Triton kernels.

    logps, entropy = linear_logprob(hidden, model.lm_head.weight, tokens)  # (N, D), (V, D), (N,) -> (N,), (N,)
    (-advantages * logps - 0.01 * entropy).mean().backward()  # policy gradient
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for macOS or Windows: the torch backend needs none
    triton = None

# Without Triton the kernels stay plain, unused functions. Decorating them only at first use would gain nothing:
# TRITON_INTERPRET counts when Triton itself is first imported, for its own tl.sum is such a kernel too.
_jit = triton.jit if triton else lambda kernel: kernel

# Bytes of the logits buffer. At V = 152k it holds 441 fp32 rows. A GEMM of n rows does n FLOPs per byte of bf16 weight
# that it reads, so this keeps tensor cores busy, and it is still small beside the weights of a 3B model.
CHUNK_BYTES = 256 * 2**20
MAX_BLOCK = 4096  # logits that a Triton program holds at a time: 16 a thread at 8 warps


# ---- row operations in plain PyTorch; like the Triton ones they may overwrite `logits`, the caller's scratch buffer


def _forward_rows_torch(logits, temperature, targets):
    """(n, V) logits, (n,) targets -> logps, entropy; for the backward pass row_max, log_sum = log sum exp(z - max)."""
    z = logits.div_(temperature)  # (n, V)
    row_max = z.amax(-1)  # (n,)
    z.sub_(row_max[:, None])
    log_sum = z.exp().sum(-1).log()  # (n,)
    log_p = z.sub_(log_sum[:, None])  # (n, V)
    logps = log_p.gather(-1, targets[:, None])[:, 0]  # (n,)
    entropy = torch.special.entr(log_p.exp()).sum(-1)  # (n,); entr(0) = 0, where p * log p would be 0 * -inf
    return logps, entropy, row_max, log_sum


def _backward_rows_torch(logits, temperature, targets, row_max, log_sum, entropy, grad_logps, grad_entropy):
    """Overwrite (n, V) logits with d loss / d logits."""
    # row_max and log_sum are two numbers because in their sum a large row_max would swallow log_sum's digits
    p = logits.div_(temperature).sub_(row_max[:, None]).sub_(log_sum[:, None]).exp()  # (n, V)
    d_entropy = torch.special.entr(p) - p * entropy[:, None]  # -p (log p + H)
    d_logp = p.neg_().scatter_add_(-1, targets[:, None], torch.ones_like(row_max)[:, None])  # 1[j = y] - p
    torch.mul(d_logp, grad_logps[:, None], out=logits).addcmul_(d_entropy, grad_entropy[:, None]).div_(temperature)


# ---- row operations in Triton: one program a row, all in fp32; no atomics, so two runs agree bit for bit


@_jit
def _forward_kernel(logits_ptr, targets_ptr, logps_ptr, entropy_ptr, row_max_ptr, log_sum_ptr,
                    temperature, V, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # int64, because row * V may pass 2**31
    logits_ptr += row * V
    # Online softmax: m is the maximum so far, s = sum e^(z-m), t = sum e^(z-m) (z-m). In the end
    # log sum e^z = m + log s and entropy = log s - t / s, which never subtracts two large numbers.
    m = -3.4e38  # about the lowest float32, and not -inf: exp(-inf - -inf) is NaN
    s = 0.0
    t = 0.0
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + cols, mask=cols < V, other=float("-inf")) / temperature  # 4 V bytes read a row, once
        new_m = tl.maximum(m, tl.max(z, 0))
        shrink = tl.exp(m - new_m)
        e = tl.exp(z - new_m)
        # each `where` turns 0 * -inf, a NaN, into 0 * 0
        t = shrink * (t + s * tl.where(shrink > 0, m - new_m, 0.0)) + tl.sum(e * tl.where(e > 0, z - new_m, 0.0), 0)
        s = shrink * s + tl.sum(e, 0)
        m = new_m
    target = tl.load(targets_ptr + row)
    inside = (target >= 0) & (target < V)  # a target outside the vocabulary reads nothing and gives NaN
    z_target = tl.load(logits_ptr + target, mask=inside, other=float("nan")) / temperature
    tl.store(logps_ptr + row, (z_target - m) - tl.log(s))  # 16 bytes written a row, in these four
    tl.store(entropy_ptr + row, tl.log(s) - t / s)
    tl.store(row_max_ptr + row, m)
    tl.store(log_sum_ptr + row, tl.log(s))


@_jit
def _backward_kernel(logits_ptr, targets_ptr, row_max_ptr, log_sum_ptr, entropy_ptr, grad_logps_ptr, grad_entropy_ptr,
                     temperature, V, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    target = tl.load(targets_ptr + row)
    row_max = tl.load(row_max_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    entropy = tl.load(entropy_ptr + row)
    grad_logp = tl.load(grad_logps_ptr + row)
    grad_entropy = tl.load(grad_entropy_ptr + row)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + cols, mask=cols < V, other=float("-inf")) / temperature  # 4 V bytes read a row
        log_p = (z - row_max) - log_sum
        p = tl.exp(log_p)
        d_logp = tl.where(cols == target, 1.0, 0.0) - p  # in fp32: a p of 0.999 rounded to bf16 first would leave 0
        d_entropy = -p * tl.where(p > 0, log_p + entropy, 0.0)  # 0 * -inf again
        grad = (grad_logp * d_logp + grad_entropy * d_entropy) / temperature
        tl.store(logits_ptr + cols, grad, mask=cols < V)  # 4 V bytes written a row


def _launch(kernel, logits, *args):
    n, V = logits.shape
    with torch.cuda.device_of(logits):  # Triton launches on the current device, which need not be that of logits
        kernel[(n,)](logits, *args, V, BLOCK=min(MAX_BLOCK, triton.next_power_of_2(V)), num_warps=8)


def _forward_rows_triton(logits, temperature, targets):
    stats = logits.new_empty(4, len(logits)).unbind()  # logps, entropy, row_max, log_sum, each (n,)
    _launch(_forward_kernel, logits, targets, *stats, temperature)
    return stats


def _backward_rows_triton(logits, temperature, *row_values):
    _launch(_backward_kernel, logits, *row_values, temperature)


# ---- the chunks

_FORWARD_ROWS = {"torch": _forward_rows_torch, "triton": _forward_rows_triton}
_BACKWARD_ROWS = {"torch": _backward_rows_torch, "triton": _backward_rows_triton}


def _stats_dtype(hidden):
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _matmul_into(out, a, b, beta=0):
    """out = beta * out + a @ b, in place and in out's dtype (autocast does not reach `out=`: dtypes stay as given)."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif a.is_cuda:  # tensor cores sum bf16 products in fp32 anyway: keep that sum instead of rounding it
        torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)
    else:  # the CPU has no such GEMM: the product is rounded to bf16 first
        out.copy_(a @ b) if beta == 0 else out.add_(a @ b)


def _chunks_of_logits(hidden, weight, chunk):
    """Yield (rows, their (n, V) logits before temperature). One buffer serves all chunks."""
    buffer = hidden.new_empty(min(chunk, len(hidden)), len(weight), dtype=_stats_dtype(hidden))
    for start in range(0, len(hidden), chunk):
        rows = slice(start, min(start + chunk, len(hidden)))
        logits = buffer[: rows.stop - start]
        _matmul_into(logits, hidden[rows], weight.T)  # 2 n V D FLOPs; reads all of weight, writes 4 n V bytes
        yield rows, logits


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk, backend):
        stats = [hidden.new_empty(len(hidden), dtype=_stats_dtype(hidden)) for _ in range(4)]  # (N,) each
        for rows, logits in _chunks_of_logits(hidden, weight, chunk):
            for whole, part in zip(stats, _FORWARD_ROWS[backend](logits, temperature, targets[rows])):
                whole[rows] = part
        logps, entropy, row_max, log_sum = stats
        ctx.save_for_backward(hidden, weight, targets, row_max, log_sum, entropy)
        ctx.options = temperature, chunk, backend
        return logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, grad_entropy):
        hidden, weight, *saved = ctx.saved_tensors
        temperature, chunk, backend = ctx.options
        row_values = *saved, grad_logps.contiguous(), grad_entropy.contiguous()  # a sum's gradient has stride 0
        grad_hidden = hidden.new_empty(hidden.shape) if ctx.needs_input_grad[0] else None
        # fp32 for bf16 weights too: a bf16 sum over chunks would lose what each chunk adds
        grad_weight = weight.new_zeros(weight.shape, dtype=_stats_dtype(hidden)) if ctx.needs_input_grad[1] else None
        for rows, logits in _chunks_of_logits(hidden, weight, chunk):
            _BACKWARD_ROWS[backend](logits, temperature, *(values[rows] for values in row_values))
            grad_logits = logits.to(hidden.dtype)  # (n, V); bf16: reads 4 n V and writes 2 n V bytes; fp32: free
            if grad_hidden is not None:
                _matmul_into(grad_hidden[rows], grad_logits, weight)  # 2 n V D FLOPs
            if grad_weight is not None:
                _matmul_into(grad_weight, grad_logits.T, hidden[rows], beta=1)  # 2 n V D FLOPs; 8 V D bytes to add up
        return grad_hidden, grad_weight, None, None, None, None  # autograd rounds grad_weight to weight's dtype


def _check(hidden, weight, targets, temperature, chunk, backend):
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or len(weight) == 0:
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"hidden and weight are {shapes}: they must be (N, D) and (V, D) with V > 0")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden is {hidden.dtype}, weight {weight.dtype}: they must have one floating-point dtype")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype} {tuple(targets.shape)}: they must be int64 ({len(hidden)},)")
    if not targets.is_cuda and ((targets < 0) | (targets >= len(weight))).any():  # on CUDA this would wait for the GPU
        raise ValueError(f"targets span {targets.min()} to {targets.max()}: they must be in [0, {len(weight)})")
    if not temperature > 0 or (chunk is not None and chunk < 1):
        raise ValueError(f"temperature is {temperature}, chunk {chunk}: they must be above 0 and at least 1")
    if backend not in (None, "torch", "triton"):
        raise ValueError(f"backend is {backend!r}: it must be 'torch', 'triton' or None")
    if backend == "triton" and triton is None:
        raise ImportError("backend='triton' needs the triton package, which is not installed: use backend='torch'")
    if backend == "triton" and hidden.dtype == torch.float64:
        raise ValueError("backend='triton' computes in float32: use backend='torch' for float64")
    if backend == "triton" and not hidden.is_cuda and isinstance(tl.sum, triton.JITFunction):
        raise ValueError("backend='triton' runs on the CPU only if TRITON_INTERPRET=1 is set before triton is imported")


def linear_logprob(hidden, weight, targets, temperature=1.0, *, chunk=None, backend=None):
    """Log-probability (nats) of each target under softmax(hidden @ weight.T / temperature), and that softmax's entropy.

    hidden (N, D), weight (V, D), targets (N,) int64 -> logps (N,), entropy (N,): float32, or float64 of float64 inputs.
    Both are differentiable, once, with respect to hidden and weight. Statistics are float32 whatever the inputs are;
    so are the logits of bf16 inputs on CUDA, while on the CPU these are rounded to bf16.

    `chunk`: rows of logits in memory at a time, by default as many as CHUNK_BYTES hold. It changes rounding, no more.
    `backend`: "torch" or "triton"; by default triton on CUDA where it is installed (float64 excepted), else torch.

    Raises ValueError for shapes, dtypes and targets that do not fit, ImportError for a missing Triton. Targets are
    checked on the CPU only: on CUDA one outside [0, V) gives NaN (triton) or a device-side assert (torch).
    """
    _check(hidden, weight, targets, temperature, chunk, backend)
    if chunk is None:
        chunk = max(1, CHUNK_BYTES // (len(weight) * _stats_dtype(hidden).itemsize))
    if backend is None:
        backend = "triton" if hidden.is_cuda and triton and hidden.dtype != torch.float64 else "torch"
    return _LinearLogprob.apply(hidden, weight, targets.contiguous(), float(temperature), chunk, backend)
