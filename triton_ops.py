"""Losses of target tokens straight from hidden states: the (N, V) logits never exist.

    x = hidden @ weight.T + bias                         only ever a chunk of its N rows at a time
    z = softcap · tanh(x / softcap) / temperature
    logps_i   = z_i[y_i] - log sum_j exp z_ij            d logps_i   / d z_ij = 1[j = y_i] - p_ij
    entropy_i = - sum_j p_ij log p_ij                    d entropy_i / d z_ij = - p_ij (log p_ij + entropy_i)

Why in chunks: 8k tokens of a 152k-word vocabulary are 5 GB of fp32 logits, and plain autograd holds several such tensors.
Here a GEMM fills a buffer of some rows; one row operation reduces it to a few numbers a row, from which the loss follows
and what it asks of each log-prob; a second one overwrites the buffer with d loss / d logits; two GEMMs more take that on
to hidden and weight; and the buffer serves the next chunk.

    linear_logprob        log-probs and entropies as such, differentiable: the backward pass computes the logits again,
                          because what they are asked for is known only then (4 GEMMs in all, 1 without gradient)
    linear_cross_entropy  a loss is a scalar, its gradient needs nothing from later: formed in the forward pass (3 GEMMs)
    linear_grpo_loss      the same for a policy-gradient objective of a group's log-probs (3 GEMMs)

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
except ImportError:
    # no wheel for macOS or Windows: the torch backend needs none
    triton = None

# Without Triton the kernels stay plain, unused functions. Decorating them only at first use would gain nothing:
# TRITON_INTERPRET counts when Triton itself is first imported, for its own tl.sum is such a kernel too.
_jit = triton.jit if triton else lambda kernel: kernel

# The logits buffer holds so many bytes and rows at most. CUDA: 1766 fp32 rows at V = 152k; adding a chunk up in d weight moves
# 8 V D bytes while its GEMM does 2 n V D FLOPs, so thousands of rows keep tensor cores busy (not measured: no GPU at hand).
# CPU: as measured, 262 rows at V = 32,000, and no more than 1024 of a small vocabulary: rows are best worked on in the cache.
CHUNK_BYTES = {"cuda": 2**30, "cpu": 2**25}
CHUNK_ROWS = {"cuda": 2**15, "cpu": 2**10}
# logits that a Triton program holds at a time: 16 a thread at 8 warps
MAX_BLOCK = 4096
# exp of this is 0 in any precision, and 0 times it is 0, where 0 * -inf would be NaN
LOWEST = -1e4


# ---- row operations in plain PyTorch; like the Triton ones they may overwrite `x`, the caller's scratch buffer


def _statistics_torch(x, targets, temperature, softcap, with_entropy=True):
    """(n, V) x, (n,) targets -> (logps, entropy), each (n,), without entropy NaN in its place; and what the gradient needs."""
    slope = None
    if softcap:
        x.div_(softcap).tanh_()
        slope = 1 - x * x  # (n, V)
        x.mul_(softcap)
    z = x if temperature == 1 else x.div_(temperature)  # (n, V)
    z.sub_(z.amax(-1, keepdim=True))
    z_target = z.gather(-1, targets[:, None])[:, 0]  # (n,)
    # two passes over (n, V) less
    if not with_entropy:
        e = z.exp_()  # (n, V)
        s = e.sum(-1)  # (n,)
        return (z_target - s.log(), torch.full_like(s, torch.nan)), (e, None, s, slope)
    e = z.clamp_(min=LOWEST).exp()  # (n, V)
    s = e.sum(-1)  # (n,)
    ez = z.mul_(e)  # (n, V)
    # (n,); never the difference of two large numbers
    entropy = s.log() - ez.sum(-1) / s
    return (z_target - s.log(), entropy), (e, ez, s, slope)


def _gradient_torch(x, saved, targets, entropy, grad_logps, grad_entropy, temperature, softcap, dtype):
    """d loss / d x, (n, V) in `dtype`, from d loss / d logps and d loss / d entropy, (n,) each or None."""
    # p = e / s and log p = z - log s, so that p log p = ez / s - p log s
    e, ez, s, slope = saved
    per_s = lambda c: (c / (s * temperature))[:, None]  # noqa: E731
    if grad_entropy is None:
        grad = e.mul_(per_s(-grad_logps))
    else:
        grad = e.mul_(per_s(grad_entropy * (s.log() - entropy) - grad_logps)).addcmul_(
            ez, per_s(-grad_entropy)
        )
    grad.scatter_add_(-1, targets[:, None], (grad_logps / temperature)[:, None])
    return (grad if slope is None else grad.mul_(slope)).to(dtype)


# ---- row operations in Triton: one program a row, all in fp32; no atomics, so two runs agree bit for bit


@_jit
def _capped(x, softcap):
    """softcap · tanh(x / softcap), or x where softcap is 0."""
    if softcap > 0:
        x = softcap * (2 * tl.sigmoid(2 * x / softcap) - 1)
    return x


@_jit
def _statistics_kernel(x_ptr, targets_ptr, logps_ptr, entropy_ptr, row_max_ptr, log_sum_ptr,
                       temperature, softcap, V, BLOCK: tl.constexpr):  # fmt: skip
    # int64, because row * V may pass 2**31
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * V
    # Online softmax: m is the maximum so far, s = sum e^(z-m), t = sum e^(z-m) (z-m). In the end
    # log sum e^z = m + log s and entropy = log s - t / s, which never subtracts two large numbers.
    # about the lowest float32, and not -inf: exp(-inf - -inf) is NaN
    m = -3.4e38
    s = 0.0
    t = 0.0
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        # 4 V bytes read a row, once
        x = tl.load(x_ptr + cols, mask=cols < V, other=0.0)
        z = tl.where(cols < V, _capped(x, softcap) / temperature, float("-inf"))
        new_m = tl.maximum(m, tl.max(z, 0))
        shrink = tl.exp(m - new_m)
        e = tl.exp(z - new_m)
        # each `where` turns 0 * -inf, a NaN, into 0 * 0
        t = shrink * (t + s * tl.where(shrink > 0, m - new_m, 0.0)) + tl.sum(
            e * tl.where(e > 0, z - new_m, 0.0), 0
        )
        s = shrink * s + tl.sum(e, 0)
        m = new_m
    target = tl.load(targets_ptr + row)
    # a target outside the vocabulary reads nothing and gives NaN
    inside = (target >= 0) & (target < V)
    z_target = _capped(tl.load(x_ptr + target, mask=inside, other=float("nan")), softcap) / temperature
    # 16 bytes written a row, in these four
    tl.store(logps_ptr + row, (z_target - m) - tl.log(s))
    tl.store(entropy_ptr + row, tl.log(s) - t / s)
    # two numbers, because in their sum a large m would swallow log s's digits
    tl.store(row_max_ptr + row, m)
    tl.store(log_sum_ptr + row, tl.log(s))


@_jit
def _gradient_kernel(x_ptr, grad_ptr, targets_ptr, row_max_ptr, log_sum_ptr, entropy_ptr, grad_logps_ptr,
                     grad_entropy_ptr, temperature, softcap, V, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * V
    # x itself where its dtype is the GEMMs'
    grad_ptr += row * V
    target = tl.load(targets_ptr + row)
    row_max = tl.load(row_max_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    entropy = tl.load(entropy_ptr + row)
    grad_logp = tl.load(grad_logps_ptr + row)
    grad_entropy = tl.load(grad_entropy_ptr + row)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        # 4 V bytes read a row
        capped = _capped(tl.load(x_ptr + cols, mask=cols < V, other=0.0), softcap)
        log_p = (capped / temperature - row_max) - log_sum
        p = tl.exp(log_p)
        # in fp32: a p of 0.999 rounded to bf16 first would leave 0
        d_logp = tl.where(cols == target, 1.0, 0.0) - p
        # 0 * -inf again
        d_entropy = -p * tl.where(p > 0, log_p + entropy, 0.0)
        grad = (grad_logp * d_logp + grad_entropy * d_entropy) / temperature
        if softcap > 0:
            grad *= 1 - (capped / softcap) * (capped / softcap)
        # 4 V bytes written a row, 2 V in bf16
        tl.store(grad_ptr + cols, grad, mask=cols < V)


def _launch(kernel, x, *args):
    n, V = x.shape
    # Triton launches on the current device, which need not be that of x
    with torch.cuda.device_of(x):
        # a grid of no programs is an error
        if n:
            kernel[(n,)](x, *args, V, BLOCK=min(MAX_BLOCK, triton.next_power_of_2(V)), num_warps=8)


# with or without: the kernel waits for memory
def _statistics_triton(x, targets, temperature, softcap, with_entropy=True):
    # saved: row_max, log_sum; each (n,)
    logps, entropy, *saved = x.new_empty(4, len(x)).unbind()
    _launch(_statistics_kernel, x, targets, logps, entropy, *saved, temperature, softcap)
    return (logps, entropy), saved


def _gradient_triton(x, saved, targets, entropy, grad_logps, grad_entropy, temperature, softcap, dtype):
    # rounded on the way out; the interpreter would truncate instead, so there in a pass of its own
    grad = torch.empty_like(x, dtype=dtype) if x.is_cuda and x.dtype != dtype else x
    grad_entropy = torch.zeros_like(entropy) if grad_entropy is None else grad_entropy
    _launch(
        _gradient_kernel, x, grad, targets, *saved, entropy, grad_logps, grad_entropy, temperature, softcap
    )
    return grad.to(dtype)


# ---- the chunks

_STATISTICS = {"torch": _statistics_torch, "triton": _statistics_triton}
_GRADIENT = {"torch": _gradient_torch, "triton": _gradient_triton}


def _stats_dtype(hidden):
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _matmul_into(out, a, b, beta=0):
    """out = beta * out + a @ b, in place and in out's dtype (autocast does not reach `out=`: dtypes stay as given)."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif a.is_cuda:
        # tensor cores sum bf16 products in fp32 anyway: keep that sum instead of rounding it
        torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)
    else:
        # the CPU has no such GEMM: the product is rounded to bf16 first
        out.copy_(a @ b) if beta == 0 else out.add_(a @ b)


def _run(
    hidden,
    weight,
    bias,
    targets,
    pieces,
    temperature,
    softcap,
    backend,
    asked=None,
    wanted=(False, False, False),
    with_entropy=True,
):
    """All chunks -> logps (N,), entropy (N,) (without it anything), and where wanted the gradients of hidden, weight and bias, else None.

    pieces: slices of rows, a chunk each. asked(k, rows, logps, entropy) -> d loss / d logps, d loss / d entropy (or None)
    of the rows of piece k, (n,) each; None for no gradient.
    """
    exact = _stats_dtype(hidden)
    logps, entropy = (hidden.new_empty(len(hidden), dtype=exact) for _ in range(2))
    # d weight in fp32 for bf16 weights too: a bf16 sum over chunks would lose what each chunk adds
    grads = [
        x.new_zeros(x.shape, dtype=d) if w else None
        for w, x, d in zip(wanted, (hidden, weight, bias), (hidden.dtype, exact, exact))
    ]
    buffer = hidden.new_empty(max((p.stop - p.start for p in pieces), default=0), len(weight), dtype=exact)
    for k, rows in enumerate(pieces):
        x = buffer[: rows.stop - rows.start]
        # 2 n V D FLOPs; reads all of weight, writes 4 n V bytes
        _matmul_into(x, hidden[rows], weight.T)
        if bias is not None:
            x.add_(bias)
        (logps[rows], entropy[rows]), saved = _STATISTICS[backend](
            x, targets[rows], temperature, softcap, with_entropy
        )
        coefficients = asked(k, rows, logps[rows], entropy[rows]) if asked else None
        if any(wanted):
            # d bias is summed before rounding
            dtype = exact if wanted[2] else hidden.dtype
            grad_x = _GRADIENT[backend](
                x, saved, targets[rows], entropy[rows], *coefficients, temperature, softcap, dtype
            )
            if wanted[2]:
                grads[2] += grad_x.sum(0)
            grad_x = grad_x.to(hidden.dtype)
            if wanted[0]:
                # 2 n V D FLOPs
                _matmul_into(grads[0][rows], grad_x, weight)
            if wanted[1]:
                # 2 n V D FLOPs; 8 V D bytes to add up
                _matmul_into(grads[1], grad_x.T, hidden[rows], beta=1)
    return logps, entropy, grads


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, pieces, options):
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.given = pieces, options
        # an output without use costs nothing
        ctx.set_materialize_grads(False)
        return _run(hidden, weight, bias, targets, pieces, *options)[:2]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, grad_entropy):
        hidden = ctx.saved_tensors[0]
        # the entropy alone is used
        if grad_logps is None:
            grad_logps = hidden.new_zeros(len(hidden), dtype=_stats_dtype(hidden))
        rows_of = lambda grad, rows: None if grad is None else grad[rows].contiguous()  # noqa: E731; a sum's has stride 0
        asked = lambda k, rows, *_: (rows_of(grad_logps, rows), rows_of(grad_entropy, rows))  # noqa: E731
        pieces, options = ctx.given
        return (
            *_run(*ctx.saved_tensors, pieces, *options, asked, ctx.needs_input_grad[:3])[2],
            None,
            None,
            None,
        )


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, pieces, options, loss_of, wanted, with_entropy):
        """The sum over the pieces of loss_of(k, logps, entropy), its gradient formed on the way; all logps, all entropies (or NaN)."""
        losses = []

        def asked(k, rows, logps, entropy):
            # of a few numbers a row
            with torch.enable_grad():
                logps = logps.clone().requires_grad_()
                loss = loss_of(k, logps, entropy)
                losses.append(loss.detach())
                return torch.autograd.grad(loss, logps)[0].contiguous(), None

        logps, entropy, ctx.grads = _run(
            hidden, weight, bias, targets, pieces, *options, asked, wanted, with_entropy
        )
        ctx.mark_non_differentiable(logps, entropy)
        return torch.stack(losses).sum() if losses else logps.new_zeros(()), logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        if ctx.grads is None:
            raise RuntimeError(
                "the gradient of this loss has been handed out already: compute the loss again"
            )
        # scaled in place, so a second time would scale twice
        grads, ctx.grads = ctx.grads, None
        return *(g if g is None else g.mul_(grad_loss) for g in grads), None, None, None, None, None, None


def _check(hidden, weight, targets, bias, temperature, softcap, chunk, backend):
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or len(weight) == 0:
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"hidden and weight are {shapes}: they must be (N, D) and (V, D) with V > 0")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(
            f"hidden is {hidden.dtype}, weight {weight.dtype}: they must have one floating-point dtype"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"bias is {bias.dtype} {tuple(bias.shape)}: it must be {weight.dtype} ({len(weight)},)"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets are {targets.dtype} {tuple(targets.shape)}: they must be int64 ({len(hidden)},)"
        )
    # on CUDA this would wait for the GPU
    if not targets.is_cuda and ((targets < 0) | (targets >= len(weight))).any():
        raise ValueError(
            f"targets span {targets.min()} to {targets.max()}: they must be in [0, {len(weight)})"
        )
    if not temperature > 0 or (softcap is not None and not softcap > 0) or (chunk is not None and chunk < 1):
        raise ValueError(
            f"temperature is {temperature}, softcap {softcap}, chunk {chunk}: they must be above 0"
        )
    if backend not in (None, "torch", "triton"):
        raise ValueError(f"backend is {backend!r}: it must be 'torch', 'triton' or None")
    if backend == "triton" and triton is None:
        raise ImportError(
            "backend='triton' needs the triton package, which is not installed: use backend='torch'"
        )
    if backend == "triton" and hidden.dtype == torch.float64:
        raise ValueError("backend='triton' computes in float32: use backend='torch' for float64")
    if backend == "triton" and not hidden.is_cuda and isinstance(tl.sum, triton.JITFunction):
        raise ValueError(
            "backend='triton' runs on the CPU only if TRITON_INTERPRET=1 is set before triton is imported"
        )


def _settle(hidden, weight, targets, bias, temperature, softcap, chunk, backend):
    """Check the arguments -> rows a chunk, (temperature, softcap or 0, backend)."""
    _check(hidden, weight, targets, bias, temperature, softcap, chunk, backend)
    if chunk is None:
        device, row = "cuda" if hidden.is_cuda else "cpu", len(weight) * _stats_dtype(hidden).itemsize
        chunk = max(1, min(CHUNK_ROWS[device], CHUNK_BYTES[device] // row))
    if backend is None:
        backend = "triton" if hidden.is_cuda and triton and hidden.dtype != torch.float64 else "torch"
    return chunk, (float(temperature), float(softcap or 0), backend)


def _pieces(lengths, chunk):
    """Runs of whole sequences, `chunk` rows a piece but at least one sequence -> [(slice of sequences, slice of rows)].

    Sequences of no rows belong to some piece, or to none where nothing follows.
    """
    pieces, first, start, stop = [], 0, 0, 0
    for i, n in enumerate(lengths):
        if stop > start and stop + n - start > chunk:
            pieces.append((slice(first, i), slice(start, stop)))
            first, start = i, stop
        stop += n
    return [*pieces, (slice(first, len(lengths)), slice(start, stop))] if stop > start else pieces


def _even_pieces(N, chunk):
    return [slice(start, min(start + chunk, N)) for start in range(0, N, chunk)]


def _wanted(*tensors):
    return tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors)


# ---- the public functions


def linear_logprob(
    hidden, weight, targets, temperature=1.0, bias=None, softcap=None, *, chunk=None, backend=None
):
    """Log-probability (nats) of each target under softmax(z), z as on top, and that softmax's entropy.

    hidden (N, D), weight (V, D), targets (N,) int64, bias (V,) -> logps (N,), entropy (N,): float32, or float64 of float64
    inputs. Both are differentiable, once, with respect to hidden, weight and bias. Statistics are float32 whatever the
    inputs are; so are the logits of bf16 inputs on CUDA, while on the CPU these are rounded to bf16.

    `chunk`: rows of logits in memory at a time, by default as CHUNK_BYTES and CHUNK_ROWS allow. It changes rounding, no more.
    `backend`: "torch" or "triton"; by default triton on CUDA where it is installed (float64 excepted), else torch.

    Raises ValueError for shapes, dtypes and targets that do not fit, ImportError for a missing Triton. Targets are
    checked on the CPU only: on CUDA one outside [0, V) gives NaN (triton) or a device-side assert (torch).
    """
    chunk, options = _settle(hidden, weight, targets, bias, temperature, softcap, chunk, backend)
    return _LinearLogprob.apply(
        hidden, weight, bias, targets.contiguous(), _even_pieces(len(hidden), chunk), options
    )


def linear_cross_entropy(hidden, weight, targets, ignore_index=-100, *, reduction="mean", temperature=1.0, bias=None, softcap=None,
                         chunk=None, backend=None):  # fmt: skip
    """- Σ logps of the targets that are not `ignore_index`, over their number ("mean") or not ("sum"); 0 where there is none.

    Arguments, dtypes and errors as for linear_logprob. Ignored rows cost nothing. The gradient is formed together with the
    loss and handed out by the first backward pass; a second one through the same loss raises RuntimeError.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}: it must be 'mean' or 'sum'")
    keep = targets != ignore_index
    hidden, targets = hidden[keep], targets[keep]
    chunk, options = _settle(hidden, weight, targets, bias, temperature, softcap, chunk, backend)
    count = max(1, len(hidden)) if reduction == "mean" else 1
    return _LinearLoss.apply(hidden, weight, bias, targets, _even_pieces(len(hidden), chunk), options,
                             lambda k, logps, entropy: -logps.sum() / count, _wanted(hidden, weight, bias), False)[0]  # fmt: skip


def linear_grpo_loss(objective, hidden, weight, targets, old_logps, ref_logps, advantages, mask, counts, *, kl=0.0, temperature=1.0,
                     bias=None, softcap=None, chunk=None, backend=None, **variant):  # fmt: skip
    """A policy-gradient objective of S sequences of C tokens and its gradient, in one pass -> (loss, metrics, logps (S, C)).

    hidden (S, C, D); weight (V, D); targets, mask, old_logps, ref_logps (S, C); advantages (S,). old_logps None: the policy
    is the one that sampled, the ratio 1. objective(logps, old_logps, ref_logps, advantages, mask, counts, kl=kl, **variant)
    -> (loss, sums of metrics) is grpo.py's `grpo_loss` or another of its signature: plain PyTorch over (s, C) numbers, called
    once a chunk of whole sequences (a ratio may be a sequence's), so it must be a sum over sequences, what divides it being
    in `counts`. Of a token's V logits it needs one number and returns one coefficient, so it stays out of the kernels: written once,
    and changed in one place. Without `kl` a sequence of advantage 0 must have no gradient: it is dropped before the first GEMM.

    metrics: the objective's, and over the tokens not dropped their number `rows` and the sum of their `entropy`. logps carry
    no gradient, and are 0 where nothing was computed. Otherwise as linear_cross_entropy.
    """
    keep = mask.bool() & ((advantages != 0) | bool(kl))[:, None]  # (S, C)
    rows, words = hidden[keep], targets[keep]  # (N, D), (N,)
    chunk, options = _settle(rows, weight, words, bias, temperature, softcap, chunk, backend)
    # of nothing, metrics are 0
    pieces, metrics = _pieces(keep.sum(1).tolist(), chunk) or [(slice(0, 0), slice(0, 0))], {}

    def loss_of(k, logps, entropy):
        part = pieces[k][0]
        new = logps.new_zeros(keep[part].shape).masked_scatter(keep[part], logps)  # (s, C)
        old, ref = (
            new.detach() if old_logps is None else old_logps[part],
            None if ref_logps is None else ref_logps[part],
        )
        loss, sums = objective(
            new, old, ref, advantages[part], keep[part].to(mask.dtype), counts, kl=kl, **variant
        )
        for name, value in (sums | {"entropy": entropy.sum()}).items():
            metrics[name] = metrics.get(name, 0) + value
        return loss

    loss, logps, _ = _LinearLoss.apply(rows, weight, bias, words, [p[1] for p in pieces], options,
                                       loss_of, _wanted(rows, weight, bias), True)  # fmt: skip
    return (
        loss,
        metrics | {"rows": logps.new_tensor(len(rows))},
        logps.new_zeros(keep.shape).masked_scatter(keep, logps),
    )
