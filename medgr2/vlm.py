"""A vision-language model: prefill prompts once, continue each many times.

Any Hugging Face image-text-to-text model, from a hub name or a directory (medgr2/loading.py). The toy is such
a directory; nothing here knows which one it was given.

Glossary: `B` prompts (each an image and a text), `G` continuations of each, `N` = B·G rows, `P` prompt
tokens, `C` continuation tokens, `D` hidden size, `V` vocabulary. Prompts are padded on the left,
continuations on the right, so that the two meet: row i is [pad pad prompt | continuation pad]. Rows of one
prompt are neighbours: row b·G + g. Only `hidden_states` also takes different numbers of them (`owner`).

    inputs = encoding.encode_prompts(policy, images, texts)                  # (B, P)
    ids, mask, truncated = vlm.sample(policy, inputs, seeds, 96, group=8)    # (N, C), (N, C), (N,)
    logps, entropy = vlm.token_logps(policy, inputs, ids, mask)              # (N, C) each, with gradient
"""

import contextlib
import copy
import functools
import re
from dataclasses import dataclass

import torch
import torch.utils.checkpoint
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from medgr2.encoding import count_prompts, repeat_prompts, require_context, select_prompts
from medgr2.errors import ModelError
from triton_ops import linear_logprob


@dataclass
class VLM:
    model: torch.nn.Module
    processor: object
    # The end of a turn, which training teaches.
    end_id: int
    # Every token that ends a turn when sampled.
    stop_ids: list
    # Image placeholders, other special tokens, rows of the embedding without a token: of probability 0.
    banned_ids: list
    # Finds the names of special tokens in a text.
    special_names: re.Pattern
    # (divisor, softcap): logits = softcap · tanh(head(state) / softcap) / divisor.
    logit_rule: tuple = (1.0, None)
    # Whether a prefilled prompt can be continued: "always", "without gradient" or "never" (plain rows).
    prefix_sharing: str = "always"
    # Whether prompts about one image can share it (encoding.encode_by_image).
    shares_images: bool = False
    # Whether an image's features are computed once and kept (loading.freeze_images).
    reuses_features: bool = False
    # Whether decoder layers are recomputed in the backward pass (`checkpointing`).
    is_checkpointing: bool = False
    # Whether encoded prompts keep their images, so that select_prompts can encode them again.
    keeps_images: bool = True
    # peft's LoraModel around the model (adapters.add_lora), or None.
    lora: object = None
    # The most tokens that the model has positions for, prompt and reply together; None if it does not say.
    context: int | None = None
    # The fewest and the most pixels of an image, where the processor takes any (loading.limit_pixels).
    pixels: tuple = (None, None)
    # The folder that the model was loaded from; None if it was made in memory.
    source: str | None = None

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    @property
    def device(self):
        return self.model.device

    @property
    def head(self):
        return self.model.get_output_embeddings()

    @property
    def can_share_prefix(self):
        if self.is_checkpointing:
            # Checkpointed layers write no usual cache; hidden_states_in_parts gives them one of its own.
            return False
        if self.prefix_sharing == "without gradient":
            return not torch.is_grad_enabled()
        return self.prefix_sharing == "always"


# ---------------------------------------------------------------------------------------------------------
# Prefill once, continue many.


class Prefix:
    """B prefilled prompts in N = B·G rows, one per continuation: all that the model needs to continue.

    cache        keys and values (and the states of recurrent layers) of N rows, P tokens at first
    mask         (N, P), which tokens are no padding
    rope_deltas  (N, 1) or None. M-RoPE (Qwen) counts positions without padding, and an image advances them by
                 its longer side; this is what the text after the image adds. Kept here, because the model
                 overwrites it at its next batch.
    padding      (N, 1) or None. Most models count positions with the padding before a prompt, which is this
                 much. Only needed if there is more padding behind an image (Questions).
    """

    def __init__(self, cache, mask, rope_deltas, padding=None):
        self.cache, self.mask, self.rope_deltas, self.padding = cache, mask, rope_deltas, padding

    def with_tensors(self, tensors):
        """The same prefix with these keys and values in place of its own: two per layer, in order."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer, keys, values in zip(cache.layers, tensors[::2], tensors[1::2], strict=True):
            layer.keys, layer.values, layer.is_prefix = keys, values, True
        return Prefix(cache, self.mask, self.rope_deltas, self.padding)

    def tensors(self):
        """The keys and values: two per layer, in order."""
        return [x for layer in self.cache.layers for x in (layer.keys, layer.values)]

    def repeat(self, group):
        """Repeat each row `group` times."""
        rows = torch.arange(len(self.mask), device=self.mask.device).repeat_interleave(group)
        if any(hasattr(layer, "conv_states") for layer in self.cache.layers):
            self.cache.reorder_cache(rows)
        else:
            # The same with a faster backward pass, but it would miss a recurrent layer's states.
            self.cache.batch_repeat_interleave(group)
        self.select_positions(rows)

    def branch(self, images):
        """A row per question, a copy of its image's, images[b]; the question may begin with padding."""
        self.padding = (1 - self.mask).sum(1, keepdim=True)
        self.select(images)

    def select(self, rows):
        """Keep only these rows (n,)."""
        self.cache.reorder_cache(rows)
        self.select_positions(rows)

    def select_positions(self, rows):
        self.mask = self.mask[rows]
        self.rope_deltas = None if self.rope_deltas is None else self.rope_deltas[rows]
        self.padding = None if self.padding is None else self.padding[rows]

    def reserve(self, tokens):
        """Reserve space for `tokens` more in each plain DynamicLayer; other layers manage their own."""
        for i, layer in enumerate(self.cache.layers):
            if type(layer) is DynamicLayer and layer.is_initialized:
                self.cache.layers[i] = ReservedLayer(layer, tokens)

    def append(self, mask):
        """Count C more tokens → their positions as the model's keyword arguments. mask (N, C)."""
        self.mask = torch.cat([self.mask, mask], 1)  # (N, P+C)
        if self.rope_deltas is None and self.padding is None:
            # Most models count on from the length of their cache.
            return {}
        text = (self.mask.cumsum(-1) - 1)[:, -mask.shape[1] :]  # (N, C)
        if self.rope_deltas is None:
            return {"position_ids": text + self.padding}
        # A text advances equally in time, height and width.
        return {"position_ids": (text + self.rope_deltas).expand(3, -1, -1)}


class ReservedLayer(DynamicLayer):
    """A cache layer that writes new tokens into reserved space; DynamicLayer copies all P to append one.

    Without gradient only: a backward pass would read what has been overwritten.
    """

    def __init__(self, layer, tokens):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.length = layer.keys.shape[-2]
        self.key_space, self.value_space = (pad(x, (0, 0, 0, tokens)) for x in (layer.keys, layer.values))
        self.show()

    def show(self):
        """Let `keys` and `values` be views of what is in use."""
        self.keys, self.values = self.key_space[:, :, : self.length], self.value_space[:, :, : self.length]

    def update(self, keys, values, *args, **kwargs):
        new = slice(self.length, self.length + keys.shape[-2])
        self.key_space[:, :, new], self.value_space[:, :, new], self.length = keys, values, new.stop
        self.show()
        return self.keys, self.values

    def reorder_cache(self, rows):
        self.key_space, self.value_space = self.key_space[rows], self.value_space[rows]
        self.show()


class RecomputedLayer(DynamicLayer):
    """A cache layer for checkpointed decoder layers, which compute once more in the backward pass.

    It keeps the prompt's keys and values only. What continues the prompt (`is_prefix`) gets them before its
    own, so a second call finds what the first one found.
    """

    is_prefix = False

    def update(self, keys, values, *args, **kwargs):
        if self.is_prefix:
            return torch.cat([self.keys, keys], -2), torch.cat([self.values, values], -2)
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys, values
        return keys, values


def recomputed_cache(vlm):
    """An empty cache of RecomputedLayers; None if the model has other layers, such as sliding ones."""
    if vlm.prefix_sharing != "always" or not has_plain_cache(vlm):
        return None
    cache = DynamicCache(config=vlm.model.config.get_text_config())
    cache.layers = [RecomputedLayer() for _ in cache.layers]
    return cache


def has_plain_cache(vlm):
    """Do all layers keep the keys and values of all tokens? No sliding windows, no recurrent states."""
    layers = DynamicCache(config=vlm.model.config.get_text_config()).layers
    return all(type(layer) is DynamicLayer for layer in layers)


def has_only_keys_and_values(vlm):
    """Do all layers keep keys and values, be it of a sliding window, and no recurrent states?"""
    layers = DynamicCache(config=vlm.model.config.get_text_config()).layers
    return all(isinstance(layer, DynamicLayer) and not hasattr(layer, "conv_states") for layer in layers)


@contextlib.contextmanager
def checkpointing(vlm, on=True):
    """Inside this context layers keep only their inputs, and the backward pass computes the rest once more.

    Does nothing unless `on`. Raises ModelError if the decoder's layers are not made for it.
    """
    if not on:
        yield
        return
    layers = [x for x in vlm.model.modules() if isinstance(x, GradientCheckpointingLayer)]
    if not {*vlm.model.get_decoder().layers} <= {*layers}:
        name = type(vlm.model).__name__
        raise ModelError(f"{name}: its layers cannot be recomputed; train without --gradient-checkpointing")
    # The library's own switch also adds hooks, at each call, and trains with dropout.
    recompute = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    for layer in layers:
        layer._gradient_checkpointing_func = recompute
        # A RecomputedLayer keeps what it got first, so recomputing changes nothing.
        layer.training = layer.gradient_checkpointing = layer._can_checkpoint_with_cache = True
    vlm.is_checkpointing = True
    try:
        yield
    finally:
        vlm.is_checkpointing = False
        for layer in layers:
            layer.training = layer.gradient_checkpointing = layer._can_checkpoint_with_cache = False


def prefill(vlm, inputs, group=1):
    """Encode B prompts once → (Prefix of N = B·G rows, last hidden states (N, D)).

    With gradients on, they flow through the cache back to the prompt.
    """
    prefix, last = prefill_rows(vlm, inputs)
    if inputs.questions:
        prefix.branch(inputs.questions.image)
        last = decode_step(vlm, prefix, inputs.questions.ids, inputs.questions.mask)[:, -1]
    if group > 1:
        prefix.repeat(group)
    return prefix, last.repeat_interleave(group, 0)


def prefill_rows(vlm, inputs, cache=None):
    """Prefill the rows of the tensors: prompts, or images with what precedes the questions.

    cache: recomputed_cache's, or the model makes one.
    """
    base = vlm.model.base_model
    if hasattr(base, "rope_deltas"):
        # The last batch's.
        base.rope_deltas = None
    out = base(**inputs, past_key_values=cache, use_cache=True)
    cache = cache or out.past_key_values
    prefix = Prefix(cache, inputs["attention_mask"], getattr(base, "rope_deltas", None))
    # The last column is never padding.
    return prefix, out.last_hidden_state[:, -1]


def decode_step(vlm, prefix, ids, mask):
    """Continue the prefix by ids (N, C) → their hidden states (N, C, D). The prefix grows by C tokens."""
    positions = prefix.append(mask)
    state = {"attention_mask": prefix.mask, "past_key_values": prefix.cache, "use_cache": True}
    return vlm.model.base_model(input_ids=ids, **state, **positions).last_hidden_state


def hidden_states(vlm, inputs, ids, mask, owner=None):
    """Hidden states of N = B·G continuations (N, C). A prompt is encoded once if its prefix can be shared.

    owner: N numbers, each continuation's prompt, if prompts have different numbers of them.
    Returns (N, C+1, D): position c predicts token c, and position C follows the last one. It is garbage where
    `mask` is 0; the state after a shorter continuation is at position mask.sum().
    """
    require_context(vlm, inputs, ids.shape[1])
    prompts = count_prompts(inputs)
    if owner is None and len(ids) == prompts:
        if inputs.questions:
            return states_of_questions(vlm, prefill_rows(vlm, inputs)[0], inputs.questions, ids, mask)
        return plain_hidden_states(vlm, inputs, ids, mask)
    group = len(ids) // prompts
    if not vlm.can_share_prefix:
        rows = select_prompts(vlm, inputs, owner) if owner else repeat_prompts(vlm, inputs, group)
        return plain_hidden_states(vlm, rows, ids, mask)
    if owner is None:
        prefix, last = prefill(vlm, inputs, group)
    else:
        prefix, last = prefill(vlm, inputs)
        rows = torch.tensor(owner, device=ids.device)
        prefix.select(rows)
        last = last[rows]
    return torch.cat([last[:, None], decode_step(vlm, prefix, ids, mask)], 1)


def states_of_questions(vlm, prefix, questions, ids, mask):
    """hidden_states of one continuation per question, in one pass. prefix: of the images."""
    prefix.branch(questions.image)
    joined = torch.cat([questions.ids, ids], 1), torch.cat([questions.mask, mask], 1)  # (N, S+C)
    return decode_step(vlm, prefix, *joined)[:, -ids.shape[1] - 1 :]


def hidden_states_in_parts(vlm, inputs, ids, mask, size=None):
    """Yield (rows, hidden_states of these rows (n, C+1, D)), `size` continuations of each prompt at a time.

    For learning with less memory: the caller runs a part's backward pass before it asks for the next part,
    and asks until there is none. A prompt is still encoded once if all layers keep keys and values: each part
    leaves its gradient of the prefix, and when all have, one backward pass takes it on to the prompt. Without
    `size`, one part: all rows.
    """
    if inputs.questions:
        raise ValueError("prompts that share images are learned from by row_states")
    prompts = count_prompts(inputs)
    group = ids.shape[0] // prompts
    cache = recomputed_cache(vlm) if vlm.is_checkpointing else None
    if (size is None or size >= group) and not cache:
        yield slice(None), hidden_states(vlm, inputs, ids, mask)
        return
    index = torch.arange(ids.shape[0], device=ids.device).view(prompts, group)
    parts = [part.flatten() for part in index.split(size or group, 1)]
    if not (cache or (vlm.can_share_prefix and has_only_keys_and_values(vlm))):
        for rows in parts:
            yield rows, hidden_states(vlm, inputs, ids[rows], mask[rows])
        return
    require_context(vlm, inputs, ids.shape[1])
    prefix, last = prefill_rows(vlm, inputs, cache)
    computed = [last, *prefix.tensors()]
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in computed]
    for rows in parts:
        n = len(rows) // prompts
        own = prefix.with_tensors(leaves[1:])
        own.repeat(n)
        first = leaves[0].repeat_interleave(n, 0)[:, None]
        yield rows, torch.cat([first, decode_step(vlm, own, ids[rows], mask[rows])], 1)
    pass_gradients_on(computed, leaves)


def pass_gradients_on(computed, leaves):
    """The backward pass of what was computed, from the gradients of its detached copies."""
    reached = [(x, leaf.grad) for x, leaf in zip(computed, leaves) if leaf.grad is not None]
    if reached:
        torch.autograd.backward(*zip(*reached))


def row_states(vlm, inputs):
    """Yield, once, the hidden states (B, W, D) of the rows; of the questions if prompts share images.

    To learn from encoding.append_replies' rows: the caller runs the backward pass and asks for the next. Each
    image is prefilled once for its questions, and one more backward pass takes their gradients on to it.
    """
    require_context(vlm, inputs, 0)
    if not inputs.questions:
        yield vlm.model.base_model(**inputs, use_cache=False).last_hidden_state
        return
    prefix, last = prefill_rows(vlm, inputs, recomputed_cache(vlm) if vlm.is_checkpointing else None)
    computed = [last, *prefix.tensors()]
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in computed]
    own = prefix.with_tensors(leaves[1:])
    own.branch(inputs.questions.image)
    yield decode_step(vlm, own, inputs.questions.ids, inputs.questions.mask)
    if last.requires_grad:
        # Sharding gathers a layer's weights again when the gradient of its output arrives: one of zeros.
        leaves[0].grad = torch.zeros_like(last)
        pass_gradients_on(computed, leaves)


def plain_hidden_states(vlm, inputs, ids, mask):
    """hidden_states in one pass over prompt and continuation."""
    joined = dict(inputs)
    joined["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)  # (N, P+C)
    joined["attention_mask"] = torch.cat([inputs["attention_mask"], mask], 1)
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            # A continuation is text: type 0.
            joined[key] = torch.cat([inputs[key], torch.zeros_like(ids)], 1)
    return vlm.model.base_model(**joined, use_cache=False).last_hidden_state[:, -ids.shape[1] - 1 :]


def lm_head(vlm, states, temperature=1.0):
    """The arguments of triton_ops.py in autocast's dtype: states, weight, {temperature, bias, softcap}.

    The bias of a banned token is -inf, so that these are the probabilities that `sample` draws from.
    """
    device, weight, bias = states.device.type, vlm.head.weight, getattr(vlm.head, "bias", None)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
    divisor, softcap = vlm.logit_rule
    banned = torch.tensor(vlm.banned_ids, dtype=torch.long, device=weight.device)
    bias = weight.new_zeros(len(weight)) if bias is None else bias  # (V,)
    bias = bias.index_fill(0, banned, -torch.inf).to(dtype)
    options = {"temperature": temperature * divisor, "softcap": softcap, "bias": bias}
    return states.to(dtype), weight.to(dtype), options


def apply_logit_rule(logits, rule):
    """What the model makes of its head's output: (..., V) → (..., V)."""
    divisor, softcap = rule
    return (softcap * torch.tanh(logits / softcap) if softcap else logits) / divisor


def token_logps(vlm, inputs, ids, mask, temperature=1.0, states=None):
    """Log-probability and entropy of every continuation token: (N, C) each, zero where `mask` is 0.

    They are of the distribution that `sample` draws from at this temperature: a banned token's is -inf.
    Only positions under the mask reach the LM head: the N·C × V logits never exist (triton_ops.py).
    """
    states = hidden_states(vlm, inputs, ids, mask) if states is None else states
    keep = mask.bool()
    rows, weight, options = lm_head(vlm, states[:, :-1][keep], temperature)
    logps, entropy = linear_logprob(rows, weight, ids[keep], **options)
    require_numbers(vlm, ~logps.isnan().any())
    zeros = torch.zeros(mask.shape, dtype=logps.dtype, device=mask.device)
    return zeros.masked_scatter(keep, logps), zeros.masked_scatter(keep, entropy)


def require_numbers(vlm, holds):
    """Raise ModelError unless `holds`, a bool tensor: are the model's logits numbers?"""
    if not holds:
        raise ModelError(
            f"{type(vlm.model).__name__}: its logits are not finite; if it is being trained, lower --lr, "
            "with another --out (metrics.jsonl has the last steps); if not, take another model"
        )


# ---------------------------------------------------------------------------------------------------------
# Sampling.


@torch.no_grad()
def sample(vlm, inputs, seeds, max_new_tokens, temperature=1.0, group=1):
    """Sample `group` continuations of each of B prompts → ids (N, C), mask (N, C), truncated (N,).

    The end-of-turn token is included. A continuation that reaches max_new_tokens without one is truncated.
    No top-k, no top-p: these are the model's own samples, but the `banned_ids` have no probability, as in
    token_logps. `temperature=0` is greedy. Each row draws from a generator of its own, seeded by `seeds`
    (N ints), so a row does not depend on its batch.
    """
    require_context(vlm, inputs, max_new_tokens)
    N = count_prompts(inputs) * group
    uniform = uniform_numbers(seeds, max_new_tokens) if temperature else torch.zeros(N, max_new_tokens)
    uniform = uniform.to(vlm.device)  # (N, C)
    stops = torch.tensor(vlm.stop_ids, device=vlm.device)
    banned = torch.tensor(vlm.banned_ids, dtype=torch.long, device=vlm.device)
    ids = torch.full((N, max_new_tokens), vlm.tokenizer.pad_token_id, device=vlm.device)
    mask = torch.zeros_like(ids)  # (N, C)
    truncated = torch.ones(N, dtype=torch.bool, device=vlm.device)
    # The rows that are still in the batch, and which of them have not ended: (n,) each.
    rows = torch.arange(N, device=vlm.device)
    alive = torch.ones_like(rows, dtype=torch.bool)
    are_finite = torch.ones((), dtype=torch.bool, device=vlm.device)
    if vlm.can_share_prefix:
        prefix, state = prefill(vlm, inputs, group)
        prefix.reserve(max_new_tokens)
    else:
        prefix, inputs = None, repeat_prompts(vlm, inputs, group)
        state = hidden_states(vlm, inputs, ids[:, :0], mask[:, :0])[:, -1]
    for step in range(max_new_tokens):
        # One position, not C of them.
        logits = apply_logit_rule(vlm.head(state).float(), vlm.logit_rule)  # (n, V)
        logits[:, banned] = -torch.inf
        are_finite &= logits.amax(-1).isfinite().all()
        token = sample_token(logits, temperature, uniform[rows, step])
        ids[rows, step] = torch.where(alive, token, vlm.tokenizer.pad_token_id)
        mask[rows, step] = alive.long()
        alive = alive & ~torch.isin(token, stops)
        truncated[rows] = alive
        if not alive.any() or step == max_new_tokens - 1:
            break
        if prefix is None:
            # A plain pass per token.
            state = hidden_states(vlm, inputs, ids[:, : step + 1], mask[:, : step + 1])[:, -1]
            continue
        if alive.sum() <= len(rows) // 2:
            # The long tail continues without the rows that have ended.
            kept = alive.nonzero()[:, 0]
            rows, alive = rows[kept], alive[kept]
            prefix.select(kept)
        state = decode_step(vlm, prefix, ids[rows, step][:, None], mask[rows, step][:, None])[:, 0]
    require_numbers(vlm, are_finite)
    return ids[:, : step + 1], mask[:, : step + 1], truncated


def uniform_numbers(seeds, count):
    """`count` numbers in [0, 1) of a generator per seed: (N, count)."""
    return torch.stack([torch.rand(count, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def sample_token(logits, temperature, uniform):
    """One token per row: the largest logit at temperature 0, else the inverse CDF at `uniform` (n,)."""
    if not temperature:
        return logits.argmax(-1)
    # In double, because 150,000 terms must sum to 1.
    cdf = (logits / temperature).softmax(-1).double().cumsum(-1)  # (n, V)
    below = uniform.double()[:, None] * cdf[:, -1:]
    return (cdf <= below).sum(-1).clamp(max=cdf.shape[-1] - 1)
