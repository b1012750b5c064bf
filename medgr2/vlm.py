"""A vision-language model: load, encode, read a prompt once and continue it many times.

Any Hugging Face image-text-to-text model, from a hub name or a directory. The toy is such a directory; nothing
here knows which one it was given.

Glossary: `B` prompts (each an image and a text), `G` continuations of each, `P` prompt tokens, `C` continuation
tokens, `D` hidden size, `V` vocabulary. Prompts are padded on the left, continuations on the right, so that the
two meet: row i reads [pad pad prompt | continuation pad]. Rows of one prompt stand together: row b·G + g.
"""

import inspect
import re
import weakref
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from PIL import Image

from triton_ops import linear_logprob


@dataclass
class VLM:
    model: torch.nn.Module
    processor: object
    # end of turn, which training teaches
    end_id: int
    # every token that ends a turn when sampled
    stop_ids: list
    # image placeholders, other special tokens, rows of the embedding that no token has
    banned_ids: list
    # finds the names of special tokens in a text
    special: re.Pattern
    # (divisor, softcap): logits = softcap · tanh(head(state) / softcap) / divisor
    logit_rule: tuple = (1.0, None)
    # whether a prompt read once can be continued: "always", "without gradient" or "never" (plain rows)
    shares: str = "always"
    # whether `look` keeps an image's features (freeze_images)
    keeps: bool = False

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    @property
    def device(self):
        return self.model.device

    @property
    def can_continue(self):
        return self.shares == "always" or self.shares == "without gradient" and not torch.is_grad_enabled()

    @property
    def head(self):
        return self.model.get_output_embeddings()


# ---------------------------------------------------------------------------------------------------------
# Encoding.


class Inputs(dict):
    """The model's inputs, one row a prompt, and `repeated(G)`: the same with G rows a prompt (of many models an image has no row)."""


def encode_prompts(vlm, images, texts, device=None):
    """Images (PIL, RGB) and user texts, one of each a prompt → the model's Inputs, left-padded to (B, P).

    A special token's name in a text is plain text: a space after its first character tells it from the token.
    """
    again = lambda group: encode_prompts(
        vlm, *([x for x in of for _ in range(group)] for of in (images, texts))
    )  # noqa: E731
    texts = [vlm.special.sub(lambda name: f"{name[0][0]} {name[0][1:]}", text) for text in texts]
    chats = [
        vlm.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for text in texts
    ]
    # no second <bos>
    begun = vlm.tokenizer.bos_token is not None and chats[0].startswith(vlm.tokenizer.bos_token)
    inputs = vlm.processor(
        text=chats,
        images=[[i] for i in images],
        padding=True,
        padding_side="left",
        add_special_tokens=not begun,
        return_tensors="pt",
    )
    prompts = Inputs((k, v.to(device or vlm.device)) for k, v in inputs.items())
    prompts.repeated = again
    return prompts


@dataclass
class Prompt:
    """An image and a text; inputs: the model's, (1, P), with the image's features in place of its pixels, or None where none are kept."""

    image: Image.Image
    text: str
    inputs: dict = None


def preprocess(vlm, images, texts):
    """What `look` needs of B images and texts, on the CPU. The processor's work alone: a thread can do it, with a processor of its own."""
    return encode_prompts(vlm, images, texts, "cpu") if vlm.keeps else None


@torch.no_grad()
def encode_images(vlm, images, texts, prepared):
    """B images and texts → a Prompt each. After freeze_images the vision tower reads them here, once for samples, reference and updates."""
    if prepared is None:
        return [Prompt(*both) for both in zip(images, texts)]
    base, inputs = vlm.model.base_model, {k: v.to(vlm.device) for k, v in prepared.items()}
    asked = inspect.signature(base.get_image_features).parameters
    seen = base.get_image_features(**{k: v for k, v in inputs.items() if k in asked}, return_dict=True)
    # these of Qwen3-VL: a list an image each
    features, layers = seen.pooler_output, getattr(seen, "deepstack_features", None) or []
    # (rows, tokens, D), of an image in tiles several; else a list of (tokens, D), one an image
    if torch.is_tensor(features):
        tokens = (inputs["input_ids"] == vlm.model.config.image_token_id).sum(1)  # (B,)
        features = features.split((tokens // features.shape[1]).tolist())
    else:
        features = [[x] for x in features]
    prompts = []
    for b, (image, text) in enumerate(zip(images, texts)):
        width = int(inputs["attention_mask"][b].sum())
        row = {
            k: v[b : b + 1, -width:] if v.shape == inputs["input_ids"].shape else v[b : b + 1]
            for k, v in inputs.items()
            if not k.startswith("pixel_")
        }
        kept = SimpleNamespace(pooler_output=features[b], deepstack_features=[x[b : b + 1] for x in layers])
        prompts.append(Prompt(image, text, row | {"mm_encoder_outputs": {"image": kept}}))
    return prompts


def collate_prompts(vlm, prompts):
    """B Prompts that were looked at → the model's Inputs, left-padded to (B, P), as encode_prompts makes them."""
    if prompts[0].inputs is None:
        return encode_prompts(vlm, [p.image for p in prompts], [p.text for p in prompts])
    rows, batch = [p.inputs for p in prompts], Inputs()
    width = max(row["input_ids"].shape[1] for row in rows)
    for key, value in rows[0].items():
        # as `look` cut them: lists of (tokens, D), or tensors (rows, tokens, D)
        if key == "mm_encoder_outputs":
            seen = [row[key]["image"] for row in rows]
            whole = lambda parts: (
                torch.cat(parts) if torch.is_tensor(parts[0]) else [x for part in parts for x in part]
            )  # noqa: E731
            layers = zip(*(s.deepstack_features for s in seen))
            batch[key] = {
                "image": SimpleNamespace(
                    pooler_output=whole([s.pooler_output for s in seen]),
                    deepstack_features=[whole(parts) for parts in layers],
                )
            }
        elif value.shape == rows[0]["input_ids"].shape:
            # a number a token
            fill = vlm.tokenizer.pad_token_id if key == "input_ids" else 0
            batch[key] = torch.cat(
                [
                    torch.nn.functional.pad(row[key], (width - row[key].shape[1], 0), value=fill)
                    for row in rows
                ]
            )
        else:
            # a row an image
            batch[key] = torch.cat([row[key] for row in rows])
    batch.repeated = lambda group: collate_prompts(vlm, [p for p in prompts for _ in range(group)])
    return batch


def encode_continuations(vlm, texts, end=True):
    """Responses → (ids, mask), right-padded to (N, C); each closes with the end-of-turn token, which counts.

    A special token's name in a text is plain text: an image placeholder without an image would end the forward pass.
    """
    rows = [
        vlm.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for text in texts
    ]
    rows = [row + [vlm.end_id] * end for row in rows]
    width = max(map(len, rows))
    ids = torch.tensor([r + [vlm.tokenizer.pad_token_id] * (width - len(r)) for r in rows])  # (N, C)
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])  # (N, C)
    return ids.to(vlm.device), mask.to(vlm.device)


def decode(vlm, ids, mask):
    """(N, C) sampled ids → N texts, without the end-of-turn token."""
    return [
        vlm.tokenizer.decode(row[m.bool()], skip_special_tokens=True) for row, m in zip(ids.cpu(), mask.cpu())
    ]


# ---------------------------------------------------------------------------------------------------------
# Prefill once, continue many.


def prefill(vlm, prompts, group=1):
    """Read B prompts once → (cache of B·G rows, attention mask (B·G, P), last hidden states (B·G, D)).

    Gradients flow through the cache to the prompt's side when they are on.
    """
    base = vlm.model.base_model
    if hasattr(base, "rope_deltas"):
        # another batch's
        base.rope_deltas = None
    out = base(**prompts, use_cache=True)
    # the last column is never padding
    cache, last = out.past_key_values, out.last_hidden_state[:, -1]
    rows, shift = (
        torch.arange(len(last), device=last.device).repeat_interleave(group),
        getattr(base, "rope_deltas", None),
    )
    # (B·G, 1); on the model, the next batch would overwrite them
    cache.rope_deltas = None if shift is None else shift[rows]
    # both repeat; the second has the faster backward pass, and would miss a recurrent layer's state
    if group > 1:
        recurrent = any(hasattr(layer, "conv_states") for layer in cache.layers)
        cache.reorder_cache(rows) if recurrent else cache.batch_repeat_interleave(group)
    return cache, prompts["attention_mask"][rows], last.repeat_interleave(group, 0)


def decode_step(vlm, cache, mask, ids):
    """Continue cached rows with ids (N, C) → their hidden states (N, C, D); the cache grows by C. mask (N, P+C)."""
    # most models count on from the cache's length
    positions = {}
    # M-RoPE (Qwen): counted without padding, and an image advances it by its longer side
    if cache.rope_deltas is not None:
        text = (mask.cumsum(-1) - 1)[:, -ids.shape[1] :] + cache.rope_deltas  # (N, C)
        # of text: the same in time, height and width
        positions = {"position_ids": text.expand(3, -1, -1)}
    return vlm.model.base_model(
        input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **positions
    ).last_hidden_state


class Room:
    """In place of a cache layer's `update`: writes new tokens in place, where the layer's own copies all P to add one. No gradient."""

    def __init__(self, layer, more):
        # a cycle would outlive the cache until the next collection
        self.layer, self.used = weakref.proxy(layer), layer.keys.shape[-2]
        self.keys, self.values = (
            torch.cat([x, x.new_empty(*x.shape[:2], more, x.shape[3])], 2) for x in (layer.keys, layer.values)
        )

    def __call__(self, keys, values, *args, **kwargs):
        new = slice(self.used, self.used + keys.shape[-2])
        self.keys[:, :, new], self.values[:, :, new], self.used = keys, values, new.stop
        self.layer.keys, self.layer.values = self.keys[:, :, : new.stop], self.values[:, :, : new.stop]
        return self.layer.keys, self.layer.values


def make_room(cache, more, rows=None):
    """Room for `more` tokens in each layer that keeps all it is given (a sliding one forgets, and goes on as it does).

    With `rows` (n,) the cache keeps these alone; a layer at a time, so that no two whole caches stand side by side.
    """
    for layer in cache.layers:
        if rows is not None:
            layer.reorder_cache(rows)
        if type(layer).__name__ == "DynamicLayer" and layer.is_initialized:
            layer.update = Room(layer, more)


def hidden_states(vlm, prompts, ids, mask):
    """Hidden states around N = B·G continuations (N, C), each prompt read once.

    Returns (N, C+1, D): position c predicts token c, and position C follows the last one (garbage where
    `mask` is 0; the state after a shorter continuation stands at position mask.sum()).
    """
    group = ids.shape[0] // prompts["attention_mask"].shape[0]
    if group > 1 and not vlm.can_continue:
        prompts, group = prompts.repeated(group), 1
    # nothing to share: one pass over prompt and continuation (the only one that gradient checkpointing
    # allows)
    if group == 1:
        inputs = prompts | {
            "input_ids": torch.cat([prompts["input_ids"], ids], 1),
            "attention_mask": torch.cat([prompts["attention_mask"], mask], 1),
        }
        # a continuation is text: type 0
        for key in ("token_type_ids", "mm_token_type_ids"):
            if key in prompts:
                inputs[key] = torch.cat([prompts[key], torch.zeros_like(ids)], 1)
        return vlm.model.base_model(**inputs, use_cache=False).last_hidden_state[:, -ids.shape[1] - 1 :]
    cache, prompt_mask, last = prefill(vlm, prompts, group)
    states = decode_step(vlm, cache, torch.cat([prompt_mask, mask], 1), ids)  # (N, C, D)
    return torch.cat([last[:, None], states], 1)


def apply_logit_rule(logits, rule):
    """What the model makes of its head's output: (..., V) → (..., V)."""
    divisor, softcap = rule
    return (softcap * torch.tanh(logits / softcap) if softcap else logits) / divisor


def lm_head(vlm, states, temperature=1.0):
    """What the ops of triton_ops.py ask for: (states, the head's weight, {temperature, bias, softcap}), in autocast's dtype."""
    device, bias = states.device.type, getattr(vlm.head, "bias", None)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
    divisor, softcap = vlm.logit_rule
    return (
        states.to(dtype),
        vlm.head.weight.to(dtype),
        {
            "temperature": temperature * divisor,
            "softcap": softcap,
            "bias": bias if bias is None else bias.to(dtype),
        },
    )


def token_logps(vlm, prompts, ids, mask, temperature=1.0, states=None):
    """Log-probability and entropy of every continuation token: (N, C) each, zero where `mask` is 0.

    Only positions under the mask reach the LM head: the N·C × V logits never exist (triton_ops.py).
    """
    states = hidden_states(vlm, prompts, ids, mask) if states is None else states
    keep = mask.bool()
    rows, weight, options = lm_head(vlm, states[:, :-1][keep], temperature)
    logps, entropy = linear_logprob(rows, weight, ids[keep], **options)
    zeros = torch.zeros(mask.shape, dtype=logps.dtype, device=mask.device)
    return zeros.masked_scatter(keep, logps), zeros.masked_scatter(keep, entropy)


@torch.no_grad()
def sample(vlm, prompts, seeds, max_new_tokens, temperature=1.0, group=1):
    """Sample `group` continuations of each of B prompts → ids, mask (B·G, C), truncated (B·G,).

    The end-of-turn token is included. A continuation that reaches max_new_tokens without one is truncated.

    No top-k, no top-p: these are the model's own samples, less the tokens that must never be one (`banned_ids`).
    `temperature=0` is greedy. Each row draws from a generator of its own, seeded by `seeds` (B·G ints): token =
    the inverse of the distribution function at one uniform number, so a row does not depend on its batch.
    """
    rows = prompts["attention_mask"].shape[0] * group
    uniform = (
        torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(s)) for s in seeds])
        if temperature
        else torch.zeros(rows, max_new_tokens)
    )
    uniform = uniform.to(vlm.device)  # (N, C)
    stops, banned = (
        torch.tensor(x, dtype=torch.long, device=vlm.device) for x in (vlm.stop_ids, vlm.banned_ids)
    )
    # (n,) which rows are still in the batch
    here = torch.arange(rows, device=vlm.device)
    alive = torch.ones_like(here, dtype=torch.bool)  # (n,)
    ids = torch.full((rows, max_new_tokens), vlm.tokenizer.pad_token_id, device=vlm.device)
    kept = torch.zeros_like(ids)  # (N, C)
    truncated = torch.ones(rows, dtype=torch.bool, device=vlm.device)  # (N,)
    if vlm.can_continue:
        cache, mask, state = prefill(vlm, prompts, group)
        make_room(cache, max_new_tokens)
    else:
        prompts, cache = prompts.repeated(group), None
        state = hidden_states(vlm, prompts, ids[:, :0], kept[:, :0])[:, -1]
    for step in range(max_new_tokens):
        logits = apply_logit_rule(
            vlm.head(state).float(), vlm.logit_rule
        )  # (n, V): one position, not C of them
        logits[:, banned] = -torch.inf
        token = sample_token(logits, temperature, uniform[here, step])
        ids[here, step], kept[here, step] = (
            torch.where(alive, token, vlm.tokenizer.pad_token_id),
            alive.long(),
        )
        alive = alive & ~torch.isin(token, stops)
        truncated[here] = alive
        left = int(alive.sum())
        if not left or step == max_new_tokens - 1:
            break
        # a plain pass a token
        if cache is None:
            state = hidden_states(vlm, prompts, ids[:, : step + 1], kept[:, : step + 1])[:, -1]
            continue
        # the long tail goes on without the rows that have ended
        if left <= len(here) // 2:
            stay = alive.nonzero()[:, 0]
            here, alive, mask = here[stay], alive[stay], mask[stay]
            make_room(cache, max_new_tokens - step, stay)
            cache.rope_deltas = None if cache.rope_deltas is None else cache.rope_deltas[stay]
        mask = torch.cat([mask, kept[here, step][:, None]], 1)
        state = decode_step(vlm, cache, mask, ids[here, step][:, None])[:, 0]
    return ids[:, : step + 1], kept[:, : step + 1], truncated


def sample_token(logits, temperature, uniform):
    """One token a row: the largest logit at temperature 0, else the inverse CDF of the softmax at `uniform`."""
    if not temperature:
        return logits.argmax(-1)
    # (N, V); double: 150,000 terms must sum to 1
    cdf = (logits / temperature).softmax(-1).double().cumsum(-1)
    below = uniform.double()[:, None] * cdf[:, -1:]
    return (cdf <= below).sum(-1).clamp(max=cdf.shape[-1] - 1)
