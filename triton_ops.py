"""Losses of target tokens straight from hidden states: the (N, V) logits never exist.

    x = hidden @ weight.T + bias                         only ever a chunk of its N rows at a time
    z = softcap · tanh(x / softcap) / temperature
    logps_i   = z_i[y_i] - log sum_j exp z_ij            d logps_i   / d z_ij = 1[j = y_i] - p_ij
    entropy_i = - sum_j p_ij log p_ij                    d entropy_i / d z_ij = - p_ij (log p_ij + entropy_i)

A bias of -inf excludes a token: there z is -inf, with a softcap too, and p and d loss / d x are 0.

Each function replaces the lines beside it:

    linear_logprob(hidden, weight, targets)              logps = log_softmax(hidden @ weight.T, -1)
                                                         logps.gather(-1, targets[:, None])[:, 0]
    linear_cross_entropy(hidden, weight, targets)        cross_entropy(hidden @ weight.T, targets)
    linear_grpo_loss(grpo_loss, hidden, weight, targets, inputs)
                                                         logps = log_softmax(hidden @ weight.T, -1)
                                                         logps = logps.gather(-1, targets[..., None])[..., 0]
                                                         grpo_loss(logps, inputs)

Why in chunks: 8k tokens of a 152k-word vocabulary are 5 GB of fp32 logits, and plain autograd holds several
such tensors. Here a GEMM fills a buffer of some rows. One row operation reduces it to a few numbers per row,
from which the loss and its gradient with respect to each log-prob follow. A second one turns it into
d loss / d logits, in place or, on CUDA, into a bf16 copy. Two more GEMMs take that on to hidden and weight,
and the buffer serves the next chunk.

    linear_logprob        differentiable log-probs and entropies. The backward pass computes the logits again,
                          because only then is their gradient known (4 GEMMs, 1 without gradient).
    linear_cross_entropy  a loss is a scalar, so its gradient is formed in the forward pass (3 GEMMs).
    linear_grpo_loss      the same for a policy-gradient loss of whole sequences (3 GEMMs).

The row operations exist twice: in plain PyTorch, the reference and the CPU's path, and as Triton kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:
    # There is no wheel for macOS or Windows; the torch backend needs none.
    triton = None

# Without Triton the kernels stay plain, unused functions. Decorating them at first use would gain nothing:
# TRITON_INTERPRET counts when Triton itself is first imported, because its own tl.sum is such a kernel too.
_jit = triton.jit if triton else lambda kernel: kernel

# The most bytes and rows that the logits buffer holds. CUDA: 1766 fp32 rows at V = 152k; adding a chunk to
# d weight moves 8 V D bytes while its GEMM does 2 n V D FLOPs, so thousands of rows keep tensor cores busy
# (not measured: no GPU at hand). CPU, measured: 262 rows at V = 32,000 and at most 1024 of a small
# vocabulary, so that rows stay in the cache.
CHUNK_BYTES = {"cuda": 2**30, "cpu": 2**25}
CHUNK_ROWS = {"cuda": 2**15, "cpu": 2**10}
# The logits that a Triton program holds at a time: 16 per thread at 8 warps.
MAX_BLOCK = 4096
# exp of this is 0 in any precision, and 0 times it is 0, where 0 * -inf would be NaN.
LOWEST = -1e4


# ---- row operations in plain PyTorch; like those in Triton they may overwrite `x`, the caller's buffer


def _statistics_torch(x, targets, temperature, softcap, with_entropy=True):
    """x (n, V), targets (n,) -> (logps, entropy), (n,) each, and what the gradient needs. No entropy: NaN."""
    slope = None
    if softcap:
        excluded = x == -torch.inf  # (n, V)
        x.div_(softcap).tanh_()
        slope = 1 - x * x  # (n, V)
        x.mul_(softcap).masked_fill_(excluded, -torch.inf)
    z = x if temperature == 1 else x.div_(temperature)  # (n, V)
    z.sub_(z.amax(-1, keepdim=True))
    z_target = z.gather(-1, targets[:, None])[:, 0]  # (n,)
    if not with_entropy:
        # Saves two passes over (n, V).
        e = z.exp_()  # (n, V)
        s = e.sum(-1)  # (n,)
        return (z_target - s.log(), torch.full_like(s, torch.nan)), (e, None, s, slope)
    e = z.clamp_(min=LOWEST).exp()  # (n, V)
    s = e.sum(-1)  # (n,)
    ez = z.mul_(e)  # (n, V)
    # Never the difference of two large numbers.
    entropy = s.log() - ez.sum(-1) / s  # (n,)
    return (z_target - s.log(), entropy), (e, ez, s, slope)


def _gradient_torch(x, saved, targets, entropy, grad_logps, grad_entropy, temperature, softcap, dtype):
    """d loss / d x, (n, V) in `dtype`, from d loss / d logps and d loss / d entropy, (n,) each or None."""
    e, ez, s, slope = saved

    def per_s(coefficient):
        return (coefficient / (s * temperature))[:, None]  # (n, 1)

    # p = e / s and log p = z - log s, so that p log p = ez / s - p log s.
    if grad_entropy is None:
        grad = e.mul_(per_s(-grad_logps))
    else:
        grad = e.mul_(per_s(grad_entropy * (s.log() - entropy) - grad_logps))
        grad.addcmul_(ez, per_s(-grad_entropy))
    grad.scatter_add_(-1, targets[:, None], (grad_logps / temperature)[:, None])
    return (grad if slope is None else grad.mul_(slope)).to(dtype)


# ---- row operations in Triton: one program per row, in fp32, without atomics: two runs agree bit for bit


@_jit
def _capped(x, softcap):
    """softcap · tanh(x / softcap), or x if softcap is 0 or x is -inf."""
    if softcap > 0:
        x = tl.where(x > float("-inf"), softcap * (2 * tl.sigmoid(2 * x / softcap) - 1), x)
    return x


@_jit
def _statistics_kernel(x_ptr, targets_ptr, logps_ptr, entropy_ptr, row_max_ptr, log_sum_ptr,
                       temperature, softcap, V, BLOCK: tl.constexpr):  # fmt: skip
    # int64, because row * V may pass 2**31.
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * V
    # Online softmax: m is the maximum so far, s = sum e^(z-m), t = sum e^(z-m) (z-m). In the end
    # log sum e^z = m + log s and entropy = log s - t / s, which never subtracts two large numbers.
    # m starts at about the lowest float32 and not at -inf: exp(-inf - -inf) is NaN.
    m = -3.4e38
    s = 0.0
    t = 0.0
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        # 4 V bytes read per row, once
        x = tl.load(x_ptr + cols, mask=cols < V, other=0.0)
        z = tl.where(cols < V, _capped(x, softcap) / temperature, float("-inf"))
        new_m = tl.maximum(m, tl.max(z, 0))
        shrink = tl.exp(m - new_m)
        e = tl.exp(z - new_m)
        # Each `where` turns 0 * -inf, a NaN, into 0 * 0.
        t = shrink * (t + s * tl.where(shrink > 0, m - new_m, 0.0))
        t += tl.sum(e * tl.where(e > 0, z - new_m, 0.0), 0)
        s = shrink * s + tl.sum(e, 0)
        m = new_m
    target = tl.load(targets_ptr + row)
    # A target outside the vocabulary reads nothing and gives NaN.
    inside = (target >= 0) & (target < V)
    z_target = _capped(tl.load(x_ptr + target, mask=inside, other=float("nan")), softcap) / temperature
    # 16 bytes written per row, by these four
    tl.store(logps_ptr + row, (z_target - m) - tl.log(s))
    tl.store(entropy_ptr + row, tl.log(s) - t / s)
    # Two numbers, because in their sum a large m would swallow log s's digits.
    tl.store(row_max_ptr + row, m)
    tl.store(log_sum_ptr + row, tl.log(s))


@_jit
def _gradient_kernel(x_ptr, grad_ptr, targets_ptr, row_max_ptr, log_sum_ptr, entropy_ptr, grad_logps_ptr,
                     grad_entropy_ptr, temperature, softcap, V, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * V
    # grad is x itself if its dtype is the GEMMs'.
    grad_ptr += row * V
    target = tl.load(targets_ptr + row)
    row_max = tl.load(row_max_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    entropy = tl.load(entropy_ptr + row)
    grad_logp = tl.load(grad_logps_ptr + row)
    grad_entropy = tl.load(grad_entropy_ptr + row)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        # 4 V bytes read per row
        capped = _capped(tl.load(x_ptr + cols, mask=cols < V, other=0.0), softcap)
        log_p = (capped / temperature - row_max) - log_sum
        p = tl.exp(log_p)
        # In fp32: a p of 0.999 rounded to bf16 first would leave 0.
        d_logp = tl.where(cols == target, 1.0, 0.0) - p
        # The `where` avoids 0 * -inf again.
        d_entropy = -p * tl.where(p > 0, log_p + entropy, 0.0)
        grad = (grad_logp * d_logp + grad_entropy * d_entropy) / temperature
        if softcap > 0:
            slope = 1 - (capped / softcap) * (capped / softcap)
            # This one too: an excluded token's slope would be -inf.
            grad *= tl.where(capped > float("-inf"), slope, 0.0)
        # 4 V bytes written per row, 2 V in bf16
        tl.store(grad_ptr + cols, grad, mask=cols < V)


def _launch(kernel, x, *args):
    n, V = x.shape
    # Triton launches on the current device, which need not be that of x.
    with torch.cuda.device_of(x):
        # A grid of no programs is an error.
        if n:
            kernel[(n,)](x, *args, V, BLOCK=min(MAX_BLOCK, triton.next_power_of_2(V)), num_warps=8)


def _statistics_triton(x, targets, temperature, softcap, with_entropy=True):
    """As _statistics_torch. The entropy is always computed: the kernel waits for memory anyway."""
    logps, entropy, row_max, log_sum = x.new_empty(4, len(x)).unbind()  # (n,) each
    saved = row_max, log_sum
    _launch(_statistics_kernel, x, targets, logps, entropy, *saved, temperature, softcap)
    return (logps, entropy), saved


def _gradient_triton(x, saved, targets, entropy, grad_logps, grad_entropy, temperature, softcap, dtype):
    # The kernel rounds to bf16 as it writes. The interpreter would truncate: there it is a pass of its own.
    grad = torch.empty_like(x, dtype=dtype) if x.is_cuda and x.dtype != dtype else x
    grad_entropy = torch.zeros_like(entropy) if grad_entropy is None else grad_entropy
    upstream = entropy, grad_logps, grad_entropy
    _launch(_gradient_kernel, x, grad, targets, *saved, *upstream, temperature, softcap)
    return grad.to(dtype)


# ---- the chunks

_STATISTICS = {"torch": _statistics_torch, "triton": _statistics_triton}
_GRADIENT = {"torch": _gradient_torch, "triton": _gradient_triton}


def _stats_dtype(hidden):
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _matmul_into(out, a, b, beta=0):
    """out = beta * out + a @ b, in place and in out's dtype (autocast does not reach `out=`: dtypes stay)."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif a.is_cuda:
        # Tensor cores sum bf16 products in fp32 anyway: keep that sum instead of rounding it.
        torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)
    elif beta == 0:
        # The CPU has no such GEMM: the product is rounded to bf16 first.
        out.copy_(a @ b)
    else:
        out.add_(a @ b)


class _Linear(NamedTuple):
    """What is computed: hidden (N, D), weight (V, D), bias (V,) or None, targets (N,)."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor


class _Options(NamedTuple):
    """How: softcap 0 means none; `chunk_rows` rows of logits at a time."""

    temperature: float
    softcap: float
    backend: str
    chunk_rows: int


class _Gradients:
    """d loss / d hidden, weight and bias, added up chunk by chunk; None for those not needed."""

    def __init__(self, linear, needed):
        self.linear = linear
        exact = _stats_dtype(linear.hidden)
        # d weight in fp32 for bf16 weights too: a bf16 sum over chunks would lose what each chunk adds.
        dtypes = (linear.hidden.dtype, exact, exact)
        self.hidden, self.weight, self.bias = (
            x.new_zeros(x.shape, dtype=dtype) if need else None
            for x, dtype, need in zip((linear.hidden, linear.weight, linear.bias), dtypes, needed)
        )
        # d bias is summed before rounding.
        self.dtype = exact if self.bias is not None else linear.hidden.dtype
        self.needed = any(needed)

    def add(self, rows, grad_logits):
        """Add what a chunk's d loss / d logits (n, V) gives."""
        hidden, weight = self.linear.hidden, self.linear.weight
        if self.bias is not None:
            self.bias += grad_logits.sum(0)
        grad_logits = grad_logits.to(hidden.dtype)
        if self.hidden is not None:
            # 2 n V D FLOPs
            _matmul_into(self.hidden[rows], grad_logits, weight)
        if self.weight is not None:
            # 2 n V D FLOPs; 8 V D bytes to add up
            _matmul_into(self.weight, grad_logits.T, hidden[rows], beta=1)

    def all(self):
        return self.hidden, self.weight, self.bias


def _over_chunks(linear, chunks, options, upstream=None, needed=(False, False, False), with_entropy=True):
    """All chunks (slices of rows) in turn -> logps (N,), entropy (N,), gradients of hidden, weight, bias.

    upstream(k, rows, logps, entropy) -> d loss / d logps and d loss / d entropy (or None) of the rows of
    chunk k, (n,) each. Without it there is no gradient. Without `with_entropy` the entropy is undefined.
    """
    hidden, weight, bias, targets = linear
    exact = _stats_dtype(hidden)
    logps, entropy = (hidden.new_empty(len(hidden), dtype=exact) for _ in range(2))
    gradients = _Gradients(linear, needed)
    scale = options.temperature, options.softcap
    longest = max((rows.stop - rows.start for rows in chunks), default=0)
    buffer = hidden.new_empty(longest, len(weight), dtype=exact)
    for k, rows in enumerate(chunks):
        x = buffer[: rows.stop - rows.start]
        # 2 n V D FLOPs; reads all of weight, writes 4 n V bytes
        _matmul_into(x, hidden[rows], weight.T)
        if bias is not None:
            x.add_(bias)
        found, saved = _STATISTICS[options.backend](x, targets[rows], *scale, with_entropy)
        logps[rows], entropy[rows] = found
        grads = upstream(k, rows, logps[rows], entropy[rows]) if upstream else None
        if gradients.needed:
            gradient = _GRADIENT[options.backend]
            gradients.add(
                rows, gradient(x, saved, targets[rows], entropy[rows], *grads, *scale, gradients.dtype)
            )
    return logps, entropy, gradients.all()


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, options):
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.options = options
        # An unused output costs nothing.
        ctx.set_materialize_grads(False)
        linear = _Linear(hidden, weight, bias, targets)
        return _over_chunks(linear, _chunks_of_rows(len(hidden), options.chunk_rows), options)[:2]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, grad_entropy):
        linear = _Linear(*ctx.saved_tensors)
        if grad_logps is None:
            # Only the entropy is used.
            grad_logps = linear.hidden.new_zeros(len(linear.hidden), dtype=_stats_dtype(linear.hidden))

        def upstream(k, rows, *_):
            # Contiguous, because the gradient of a sum has stride 0.
            d_entropy = None if grad_entropy is None else grad_entropy[rows].contiguous()
            return grad_logps[rows].contiguous(), d_entropy

        chunks = _chunks_of_rows(len(linear.hidden), ctx.options.chunk_rows)
        grads = _over_chunks(linear, chunks, ctx.options, upstream, ctx.needs_input_grad[:3])[2]
        return *grads, None, None


class _LinearLoss(torch.autograd.Function):
    """A loss of log-probs as a sum over chunks, its gradient formed in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunks, options, chunk_loss, needed, with_entropy):
        """Σ_k chunk_loss(k, logps, entropy); all logps and entropies (undefined if unwanted), no gradient."""
        losses = []

        def upstream(k, rows, logps, entropy):
            # Autograd over a few numbers per row.
            with torch.enable_grad():
                logps = logps.clone().requires_grad_()
                loss = chunk_loss(k, logps, entropy)
                losses.append(loss.detach())
                return torch.autograd.grad(loss, logps)[0].contiguous(), None

        linear = _Linear(hidden, weight, bias, targets)
        logps, entropy, ctx.grads = _over_chunks(linear, chunks, options, upstream, needed, with_entropy)
        ctx.mark_non_differentiable(logps, entropy)
        return torch.stack(losses).sum() if losses else logps.new_zeros(()), logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        if ctx.grads is None:
            raise RuntimeError("the gradient of this loss has been used already: compute the loss again")
        # Scaled in place, so a second time would scale twice.
        grads, ctx.grads = ctx.grads, None
        return *(g if g is None else g.mul_(grad_loss) for g in grads), None, None, None, None, None, None


def _check(hidden, weight, targets, bias, temperature, softcap, chunk, backend):
    """Raise ValueError or ImportError, in one line, for arguments that do not fit."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or len(weight) == 0:
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"hidden and weight are {shapes}: they must be (N, D) and (V, D) with V > 0")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        dtypes = f"hidden is {hidden.dtype}, weight {weight.dtype}"
        raise ValueError(f"{dtypes}: they must have one floating-point dtype")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        wrong = f"{bias.dtype} {tuple(bias.shape)}"
        raise ValueError(f"bias is {wrong}: it must be {weight.dtype} ({len(weight)},)")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        wrong = f"{targets.dtype} {tuple(targets.shape)}"
        raise ValueError(f"targets are {wrong}: they must be int64 ({len(hidden)},)")
    # On CUDA this would wait for the GPU.
    if not targets.is_cuda and ((targets < 0) | (targets >= len(weight))).any():
        span = f"{targets.min()} to {targets.max()}"
        raise ValueError(f"targets span {span}: they must be in [0, {len(weight)})")
    if not temperature > 0 or (softcap is not None and not softcap > 0) or (chunk is not None and chunk < 1):
        given = f"temperature is {temperature}, softcap {softcap}, chunk {chunk}"
        raise ValueError(f"{given}: they must be above 0")
    if backend not in (None, "torch", "triton"):
        raise ValueError(f"backend is {backend!r}: it must be 'torch', 'triton' or None")
    if backend != "triton":
        return
    if triton is None:
        raise ImportError(
            "backend='triton' needs the triton package, not installed here: use backend='torch'"
        )
    if hidden.dtype == torch.float64:
        raise ValueError("backend='triton' computes in float32: use backend='torch' for float64")
    if not hidden.is_cuda and isinstance(tl.sum, triton.JITFunction):
        needs = "TRITON_INTERPRET=1 is set before triton is imported"
        raise ValueError(f"backend='triton' runs on the CPU only if {needs}")


def _checked_options(hidden, weight, targets, bias, temperature, softcap, chunk, backend):
    """The arguments checked, and the defaults filled in -> _Options."""
    _check(hidden, weight, targets, bias, temperature, softcap, chunk, backend)
    if chunk is None:
        device, row_bytes = "cuda" if hidden.is_cuda else "cpu", len(weight) * _stats_dtype(hidden).itemsize
        chunk = max(1, min(CHUNK_ROWS[device], CHUNK_BYTES[device] // row_bytes))
    if backend is None:
        backend = "triton" if hidden.is_cuda and triton and hidden.dtype != torch.float64 else "torch"
    return _Options(float(temperature), float(softcap or 0), backend, chunk)


def _needs_grad(*tensors):
    """Whether each needs a gradient now. A Function's ctx.needs_input_grad would not know of no_grad."""
    return tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors)


def _chunks_of_rows(N, size):
    return [slice(start, min(start + size, N)) for start in range(0, N, size)]


def _chunks_of_sequences(lengths, size):
    """Whole sequences, at most `size` rows per chunk -> [(slice of sequences, slice of rows)].

    A sequence of more than `size` rows is a chunk of its own. Sequences of no rows belong to some chunk, or
    to none if no rows follow.
    """
    chunks, first, start, stop = [], 0, 0, 0
    for i, n in enumerate(lengths):
        if stop > start and stop + n - start > size:
            chunks.append((slice(first, i), slice(start, stop)))
            first, start = i, stop
        stop += n
    if stop > start:
        chunks.append((slice(first, len(lengths)), slice(start, stop)))
    return chunks


# ---- the public functions


def linear_logprob(
    hidden, weight, targets, temperature=1.0, bias=None, softcap=None, *, chunk=None, backend=None
):
    """Log-probability (nats) of each target under softmax(z), z as above, and that softmax's entropy.

    hidden (N, D), weight (V, D), targets (N,) int64, bias (V,) -> logps (N,), entropy (N,): float32, or
    float64 for float64 inputs. Both are differentiable, once, with respect to hidden, weight and bias.
    The logits of bf16 inputs are float32 on CUDA; on the CPU they are rounded to bf16.

    `chunk`: rows of logits in memory at a time, by default as CHUNK_BYTES and CHUNK_ROWS allow. It changes
    rounding only. `backend`: "torch" or "triton". By default triton on CUDA if it is installed (float64
    excepted), else torch.

    Raises ValueError for shapes, dtypes and targets that do not fit, ImportError for a missing Triton.
    Targets are checked on the CPU only: on CUDA one outside [0, V) gives NaN (triton) or a device-side assert
    (torch).
    """
    options = _checked_options(hidden, weight, targets, bias, temperature, softcap, chunk, backend)
    return _LinearLogprob.apply(hidden, weight, bias, targets.contiguous(), options)


def linear_cross_entropy(
    hidden, weight, targets, ignore_index=-100, *, reduction="mean", temperature=1.0, bias=None,
    softcap=None, chunk=None, backend=None,
):  # fmt: skip
    """- Σ logps of the targets other than `ignore_index`, over their number for "mean"; 0 if there are none.

    Arguments, dtypes and errors as for linear_logprob. Ignored rows cost nothing. The gradient is formed
    together with the loss and used by the first backward pass; a second one through the same loss raises
    RuntimeError.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}: it must be 'mean' or 'sum'")
    keep = targets != ignore_index
    hidden, targets = hidden[keep], targets[keep]
    options = _checked_options(hidden, weight, targets, bias, temperature, softcap, chunk, backend)
    count = max(1, len(hidden)) if reduction == "mean" else 1

    def chunk_loss(k, logps, entropy):
        return -logps.sum() / count

    chunks = _chunks_of_rows(len(hidden), options.chunk_rows)
    needed = _needs_grad(hidden, weight, bias)
    return _LinearLoss.apply(hidden, weight, bias, targets, chunks, options, chunk_loss, needed, False)[0]


class LossInputs(NamedTuple):
    """What a policy-gradient loss of S sequences of C tokens needs beside the policy's log-probs.

    advantages (S,); mask (S, C), the tokens that count; old_logps (S, C) of the policy that sampled, None if
    that is the policy itself (the ratio is 1); ref_logps (S, C) of the reference, None without a KL term.
    """

    advantages: torch.Tensor
    mask: torch.Tensor
    old_logps: torch.Tensor | None = None
    ref_logps: torch.Tensor | None = None

    def select(self, rows):
        """The inputs of these sequences only: a slice, or their indices (n,)."""
        return LossInputs(*(None if x is None else x[rows] for x in self))


def linear_grpo_loss(
    loss_fn, hidden, weight, targets, inputs, *, kl=0.0, temperature=1.0, bias=None, softcap=None,
    chunk=None, backend=None, **loss_options,
):  # fmt: skip
    """A policy-gradient loss of S sequences and its gradient in one pass -> (loss, metrics, logps (S, C)).

    hidden (S, C, D), weight (V, D), targets (S, C); inputs: LossInputs. loss_fn(logps, inputs, kl=kl,
    **loss_options) -> (loss, sums of metrics) is grpo.py's `grpo_loss` or another of its signature: plain
    PyTorch over (s, C) numbers, called once per chunk of whole sequences (a ratio may be a sequence's), so it
    must be a sum over sequences, divided by numbers that do not depend on the chunk. It needs one number per
    token, not V, and its gradient is one number per token, so it stays out of the kernels: it is written
    once. Without `kl` a sequence of advantage 0 must have no gradient: it is dropped before the first GEMM.

    metrics: the sums of loss_fn, and over the tokens not dropped their number `rows` and the sum of their
    `entropy`. logps carry no gradient and are 0 where nothing was computed. Otherwise as
    linear_cross_entropy.
    """
    keep = inputs.mask.bool() & ((inputs.advantages != 0) | bool(kl))[:, None]  # (S, C)
    rows, tokens = hidden[keep], targets[keep]  # (N, D), (N,)
    options = _checked_options(rows, weight, tokens, bias, temperature, softcap, chunk, backend)
    # Of no rows one empty chunk, so that metrics are 0 and not missing.
    chunks = _chunks_of_sequences(keep.sum(1).tolist(), options.chunk_rows) or [(slice(0, 0), slice(0, 0))]
    metrics = {}

    def chunk_loss(k, logps, entropy):
        own, kept = inputs.select(chunks[k][0]), keep[chunks[k][0]]
        new = logps.new_zeros(kept.shape).masked_scatter(kept, logps)  # (s, C)
        old = new.detach() if own.old_logps is None else own.old_logps
        own = own._replace(mask=kept.to(own.mask.dtype), old_logps=old)
        loss, sums = loss_fn(new, own, kl=kl, **loss_options)
        for name, value in (sums | {"entropy": entropy.sum()}).items():
            metrics[name] = metrics.get(name, 0) + value
        return loss

    slices = [rows_of_chunk for _, rows_of_chunk in chunks]
    needed = _needs_grad(rows, weight, bias)
    loss, logps, _ = _LinearLoss.apply(rows, weight, bias, tokens, slices, options, chunk_loss, needed, True)
    metrics["rows"] = logps.new_tensor(len(rows))
    return loss, metrics, logps.new_zeros(keep.shape).masked_scatter(keep, logps)
