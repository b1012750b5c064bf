"""A vision-language model: load, encode, read a prompt once and continue it many times.

Any Hugging Face image-text-to-text model, from a hub name or a directory. The toy is such a directory; nothing
here knows which one it was given.

Glossary: `B` prompts (each an image and a text), `G` continuations of each, `P` prompt tokens, `C` continuation
tokens, `D` hidden size, `V` vocabulary. Prompts are padded on the left, continuations on the right, so that the
two meet: row i reads [pad pad prompt | continuation pad]. Rows of one prompt stand together: row b·G + g.
"""
import copy
import inspect
import os
import re
import shutil
import textwrap
import weakref
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from PIL import Image

from triton_ops import linear_logprob


class ModelError(ValueError):
    """A model that cannot be used. The message is one line: which, why, what to do."""
    exit_status = 2


@dataclass
class VLM:
    model: torch.nn.Module
    processor: object
    end_id: int  # end of turn, which training teaches
    stop_ids: list  # every token that ends a turn when sampled
    banned_ids: list  # image placeholders, other special tokens, rows of the embedding that no token has
    special: re.Pattern  # finds the names of special tokens in a text
    logit_rule: tuple = (1.0, None)  # (divisor, softcap): logits = softcap · tanh(head(state) / softcap) / divisor
    shares: str = "always"  # whether a prompt read once can be continued: "always", "without gradient" or "never" (plain rows)
    keeps: bool = False  # whether `look` keeps an image's features (freeze_images)

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
# Loading and saving.

def load_processor(name):
    """The model's processor, without its video part: that alone would demand torchvision."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)  # left open, it asks on the terminal
    if config.model_type == "smolvlm":  # its own asks for num2words, to spell how many frames a video has; of images both make the same
        return transformers.Idefics3Processor.from_pretrained(name, backend="pil", trust_remote_code=False)
    cls = getattr(transformers, PROCESSOR_MAPPING_NAMES.get(config.model_type) or "", None)
    if cls is None or "video_processor" not in cls.get_attributes():
        return transformers.AutoProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
    attributes = [a for a in cls.get_attributes() if a != "video_processor"]
    still = type(cls.__name__, (cls,), {"get_attributes": classmethod(lambda _: attributes)})
    return still.from_pretrained(name, backend="pil")


def best_device():
    """cuda where there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def best_dtype():
    """bf16 where the device computes in it, else fp32. Weights that are trained stay fp32 (autocast computes in this)."""
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def load(name, device=None, dtype=torch.float32):
    """Load model and processor. Raises ModelError where `name` is no image-text-to-text model."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    local = os.path.exists(name) or name.startswith((".", "/")) or name.count("/") > 1  # a hub name is owner/model
    if local and not os.path.isfile(os.path.join(name, "config.json")):
        raise ModelError(f"{name}: not a model (no config.json in it); give a folder saved by save_pretrained or a hub name")
    try:
        processor = load_processor(name)
        model, report = transformers.AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=False, ignore_mismatched_sizes=True, output_loading_info=True)
        vlm = wrap(model.to(device or best_device()).eval(), processor)
    except Exception as e:  # the library raises whatever it likes at a folder that is not what it expects
        raise ModelError(f"{name}: cannot load it as an image-text-to-text model: {in_one_line(e)}; "
                         "give one saved by save_pretrained, in safetensors, that needs no code of its own") from e
    wrong = what_is_wrong(vlm, report) or what_does_not_fit(vlm)
    if wrong:
        raise ModelError(f"{name}: {wrong}")
    vlm.shares = how_it_shares(vlm)
    if vlm.shares != "always":
        print(f"{name}: this architecture can {'not' if vlm.shares == 'never' else 'only without gradient'} continue a prompt read once: "
              "plain rows instead, the same results, slower", flush=True)
    return vlm


def in_one_line(error):
    return textwrap.shorten(str(error), 250, placeholder=" ...") or type(error).__name__


def what_is_wrong(vlm, report):
    """Why a model that loads would not compute what it claims to, or None. `report`: the library's own, of its loading."""
    unset = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if unset:  # they would start from random values
        return (f"weights do not fit config.json: {unset[0]} and {len(unset) - 1} more are missing or of another shape; "
                "save or download it again")
    if not vlm.processor.chat_template:
        return "no chat template (chat_template.jinja), so it cannot be asked anything; take the -Instruct or -it model"
    if vlm.logit_rule is None:
        return "its logits are neither capped nor scaled as config.json says, so token_logps and sample cannot compute them"


@torch.no_grad()
def find_logit_rule(model):
    """(divisor, softcap) with which VLM.logit_rule gives the model's own logits, or None if there are none.

    Of the classes whose config has such a number some use it, others do not, and one multiplies by what others divide by. So
    the model is asked: one token, and in place of the head's output numbers whose fate we then see.
    """
    text = model.config.get_text_config()
    cap, *scales = (getattr(text, k, None) for k in ("final_logit_softcapping", "logit_scale", "logits_scaling"))
    rules = [(1.0, None), *((1.0, cap) for _ in [0] if cap), *((d, None) for s in scales if s for d in (s, 1 / s))]
    if len(rules) == 1:
        return rules[0]
    head = model.get_output_embeddings()
    probe = torch.linspace(-50, 50, len(head.weight), device=head.weight.device)  # (V,)
    hook = head.register_forward_hook(lambda module, inputs, output: probe.to(output.dtype).expand_as(output))
    try:
        seen = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=probe.device)).logits[0, -1].float()
    finally:
        hook.remove()
    return next((r for r in rules if torch.allclose(seen, bent(probe, r), rtol=0.02, atol=0.02)), None)  # bf16 has 3 digits


def bent(logits, rule):
    """What the model makes of its head's output: (..., V) → (..., V)."""
    divisor, softcap = rule
    return (softcap * torch.tanh(logits / softcap) if softcap else logits) / divisor


def what_does_not_fit(vlm):
    """Why the model cannot take what its processor gives, or None: tried with one blank image and a word, in a plain row."""
    last, rows = max(vlm.tokenizer.get_vocab().values()), vlm.model.get_input_embeddings().weight.shape[0]
    if last >= rows:
        return f"its vocabulary does not fit: token {last} of the tokenizer, {rows} rows of the embedding; give it its own tokenizer"
    try:
        with torch.no_grad():
            hidden_states(vlm, encode_prompts(vlm, [Image.new("RGB", (64, 64))], ["?"]), *encode_continuations(vlm, ["!"]))
    except Exception as e:  # raised wherever the two disagree
        return f"its processor does not fit the model: {in_one_line(e)}; give it its own processor's files"


def how_it_shares(vlm):
    """VLM.shares: tried with two prompts, one of them padded, and two continuations of each, against plain rows.

    A cache fails in several ways: it cannot be repeated (as some recurrent layers' cannot), or is continued by one token alone
    (Jamba), or from position 0 (Bamba), or the backward pass would read what has been overwritten (Qwen3.5). That last is tried
    without images: the activations of a large model over an image's tokens may be more than there is memory for.
    """
    texts, (ids, mask) = ["?", "Which side?"], encode_continuations(vlm, ["left", "x", "", "a cyst"])  # (4, C) each
    real = torch.nn.functional.pad(mask, (1, 0), value=1).bool()  # (4, C+1)
    exact = vlm.model.dtype == torch.float32  # else it answers and scores, and does not learn
    close = lambda a, b: (a - b).norm() <= (1e-3 if exact else 0.1) * b.norm()  # noqa: E731
    plain = lambda rows: hidden_states(vlm, rows, ids, mask)[real].float()  # noqa: E731; of 4 prompts for 4 continuations

    def shared(prompts):
        cache, seen, last = read(vlm, prompts, 2)
        first = continue_from(vlm, cache, torch.cat([seen, mask[:, :1]], 1), ids[:, :1])  # a token alone, as `sample` goes on
        others = continue_from(vlm, cache, torch.cat([seen, mask], 1), ids[:, 1:])  # several at once
        return torch.cat([last[:, None], first, others], 1)[real].float()

    def words(group):
        inputs = vlm.tokenizer([t for t in texts for _ in range(group)], padding=True, padding_side="left", return_tensors="pt")
        return {k: inputs[k].to(vlm.device) for k in ("input_ids", "attention_mask")}

    def slopes(states):
        norms = [p for p in vlm.model.parameters() if p.ndim == 1 and p.requires_grad]  # and biases: few numbers, in every layer
        return torch.cat([g for g in torch.autograd.grad(states.sin().sum(), norms, allow_unused=True) if g is not None])

    prompts = encode_prompts(vlm, [Image.new("RGB", (64, 64))] * 2, texts)
    found = "never"
    try:
        with torch.no_grad():
            if not close(shared(prompts), plain(prompts.repeated(2))):
                return found
        found = "without gradient"
        with torch.enable_grad():
            if not exact or close(slopes(shared(words(1))), slopes(plain(words(2)))):
                found = "always"
    except Exception:  # the library raises whatever it likes where a thing was not meant to be done
        pass
    return found


def wrap(model, processor):
    """A VLM of a model and its processor: finds out which tokens end a turn and which must never be sampled."""
    tokenizer = processor.tokenizer
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    stops = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id} | set(stops if isinstance(stops, list) else [] if stops is None else [stops])
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special} | set(tokenizer.all_special_ids)
    special |= {v for k, v in vars(model.config).items() if k.endswith(("_token_id", "_token_index")) and isinstance(v, int)}
    rows = set(range(model.get_output_embeddings().weight.shape[0]))
    banned = (rows & special | rows - set(tokenizer.get_vocab().values())) - stops
    names = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special} | set(tokenizer.all_special_tokens)
    names |= {v for k, v in vars(processor).items() if k.endswith("_token") and isinstance(v, str)}  # its image placeholder
    names = sorted((n for n in names if len(n) > 1), key=lambda n: (-len(n), n))
    special_names = re.compile("|".join(map(re.escape, names)) or "(?!)")
    return VLM(model, processor, tokenizer.eos_token_id, sorted(stops), sorted(banned), special_names, find_logit_rule(model))


def save(vlm, folder):
    """Save in the Hugging Face format: config, safetensors, tokenizer, image processor, chat template.

    Raises ModelError where the disk has no room for it.
    """
    os.makedirs(folder, exist_ok=True)
    size, free = sum(p.nbytes for p in vlm.model.parameters()), shutil.disk_usage(folder).free
    if size > free:
        raise ModelError(f"{folder}: the model needs {size / 2**20:.3f} MiB and {free / 2**20:.3f} MiB are free; "
                         "make room, the same command goes on from here")
    vlm.model.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)


def freeze_vision(vlm):
    """Leave the vision tower as it is; the projector and the language model go on learning."""
    tower = [parameter for name, parameter in vlm.model.named_parameters() if "merger" not in name
             and any(part in name for part in ("vision_tower.", "vision_model.", "visual."))]
    if not tower:
        raise ModelError(f"{type(vlm.model).__name__}: no vision tower found by name; train it whole")
    for parameter in tower:
        parameter.requires_grad_(False)


def freeze_images(vlm):
    """Leave the vision tower and the projector as they are: an image's features stay the same, and `look` keeps them."""
    learning = {id(p) for part in (vlm.model.get_decoder(), vlm.head) for p in part.parameters()}
    if all(id(p) in learning for p in vlm.model.parameters()):
        raise ModelError(f"{type(vlm.model).__name__}: nothing found beside the language model that could make an image's features; train it whole")
    for parameter in vlm.model.parameters():
        parameter.requires_grad_(id(parameter) in learning)
    vlm.keeps = can_keep(vlm)
    if not vlm.keeps:
        print(f"{type(vlm.model).__name__}: this architecture takes no features that were computed before: its vision tower reads an "
              "image at every pass, the same results, slower", flush=True)


@torch.no_grad()
def can_keep(vlm):
    """Whether kept features give the states that pixels give: tried with two images of two sizes, and two texts."""
    images, texts = [Image.new("RGB", (64, 64), "black"), Image.new("RGB", (96, 64), "white")], ["?", "Which side?"]
    answers = encode_continuations(vlm, ["left", "x"])
    try:
        looking = replace(vlm, keeps=True)
        kept = side_by_side(vlm, look(looking, images, texts, prepare(looking, images, texts)))
        kept, plain = (hidden_states(vlm, p, *answers)[:, 0].float() for p in (kept, encode_prompts(vlm, images, texts)))
    except Exception:  # the library raises whatever it likes where a thing was not meant to be done
        return False
    return bool((kept - plain).norm() <= (1e-3 if vlm.model.dtype == torch.float32 else 0.1) * plain.norm())


def frozen_copy(vlm):
    """The same model with weights of its own that no optimiser moves, GRPO's reference; those that are frozen already it shares."""
    shared = {id(p): p for p in vlm.model.parameters() if not p.requires_grad}
    return replace(vlm, model=copy.deepcopy(vlm.model, shared).eval().requires_grad_(False))


# ---------------------------------------------------------------------------------------------------------
# Encoding.

class Inputs(dict):
    """The model's inputs, one row a prompt, and `repeated(G)`: the same with G rows a prompt (of many models an image has no row)."""


def encode_prompts(vlm, images, texts, device=None):
    """Images (PIL, RGB) and user texts, one of each a prompt → the model's Inputs, left-padded to (B, P).

    A special token's name in a text is plain text: a space after its first character tells it from the token.
    """
    again = lambda group: encode_prompts(vlm, *([x for x in of for _ in range(group)] for of in (images, texts)))  # noqa: E731
    texts = [vlm.special.sub(lambda name: f"{name[0][0]} {name[0][1:]}", text) for text in texts]
    chats = [vlm.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
        add_generation_prompt=True, tokenize=False) for text in texts]
    begun = vlm.tokenizer.bos_token is not None and chats[0].startswith(vlm.tokenizer.bos_token)  # no second <bos>
    inputs = vlm.processor(text=chats, images=[[i] for i in images], padding=True, padding_side="left",
                           add_special_tokens=not begun, return_tensors="pt")
    prompts = Inputs((k, v.to(device or vlm.device)) for k, v in inputs.items())
    prompts.repeated = again
    return prompts


@dataclass
class Prompt:
    """An image and a text; inputs: the model's, (1, P), with the image's features in place of its pixels, or None where none are kept."""
    image: Image.Image
    text: str
    inputs: dict = None


def prepare(vlm, images, texts):
    """What `look` needs of B images and texts, on the CPU. The processor's work alone: a thread can do it, with a processor of its own."""
    return encode_prompts(vlm, images, texts, "cpu") if vlm.keeps else None


@torch.no_grad()
def look(vlm, images, texts, prepared):
    """B images and texts → a Prompt each. After freeze_images the vision tower reads them here, once for samples, reference and updates."""
    if prepared is None:
        return [Prompt(*both) for both in zip(images, texts)]
    base, inputs = vlm.model.base_model, {k: v.to(vlm.device) for k, v in prepared.items()}
    asked = inspect.signature(base.get_image_features).parameters
    seen = base.get_image_features(**{k: v for k, v in inputs.items() if k in asked}, return_dict=True)
    features, layers = seen.pooler_output, getattr(seen, "deepstack_features", None) or []  # these of Qwen3-VL: a list an image each
    if torch.is_tensor(features):  # (rows, tokens, D), of an image in tiles several; else a list of (tokens, D), one an image
        tokens = (inputs["input_ids"] == vlm.model.config.image_token_id).sum(1)  # (B,)
        features = features.split((tokens // features.shape[1]).tolist())
    else:
        features = [[x] for x in features]
    prompts = []
    for b, (image, text) in enumerate(zip(images, texts)):
        width = int(inputs["attention_mask"][b].sum())
        row = {k: v[b:b + 1, -width:] if v.shape == inputs["input_ids"].shape else v[b:b + 1]
               for k, v in inputs.items() if not k.startswith("pixel_")}
        kept = SimpleNamespace(pooler_output=features[b], deepstack_features=[x[b:b + 1] for x in layers])
        prompts.append(Prompt(image, text, row | {"mm_encoder_outputs": {"image": kept}}))
    return prompts


def side_by_side(vlm, prompts):
    """B Prompts that were looked at → the model's Inputs, left-padded to (B, P), as encode_prompts makes them."""
    if prompts[0].inputs is None:
        return encode_prompts(vlm, [p.image for p in prompts], [p.text for p in prompts])
    rows, batch = [p.inputs for p in prompts], Inputs()
    width = max(row["input_ids"].shape[1] for row in rows)
    for key, value in rows[0].items():
        if key == "mm_encoder_outputs":  # as `look` cut them: lists of (tokens, D), or tensors (rows, tokens, D)
            seen = [row[key]["image"] for row in rows]
            whole = lambda parts: torch.cat(parts) if torch.is_tensor(parts[0]) else [x for part in parts for x in part]  # noqa: E731
            layers = zip(*(s.deepstack_features for s in seen))
            batch[key] = {"image": SimpleNamespace(pooler_output=whole([s.pooler_output for s in seen]),
                                                   deepstack_features=[whole(parts) for parts in layers])}
        elif value.shape == rows[0]["input_ids"].shape:  # a number a token
            fill = vlm.tokenizer.pad_token_id if key == "input_ids" else 0
            batch[key] = torch.cat([torch.nn.functional.pad(row[key], (width - row[key].shape[1], 0), value=fill) for row in rows])
        else:  # a row an image
            batch[key] = torch.cat([row[key] for row in rows])
    batch.repeated = lambda group: side_by_side(vlm, [p for p in prompts for _ in range(group)])
    return batch


def encode_continuations(vlm, texts, end=True):
    """Responses → (ids, mask), right-padded to (N, C); each closes with the end-of-turn token, which counts.

    A special token's name in a text is plain text: an image placeholder without an image would end the forward pass.
    """
    rows = [vlm.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]
    rows = [row + [vlm.end_id] * end for row in rows]
    width = max(map(len, rows))
    ids = torch.tensor([r + [vlm.tokenizer.pad_token_id] * (width - len(r)) for r in rows])  # (N, C)
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])  # (N, C)
    return ids.to(vlm.device), mask.to(vlm.device)


def decode(vlm, ids, mask):
    """(N, C) sampled ids → N texts, without the end-of-turn token."""
    return [vlm.tokenizer.decode(row[m.bool()], skip_special_tokens=True) for row, m in zip(ids.cpu(), mask.cpu())]


# ---------------------------------------------------------------------------------------------------------
# Read once, continue many.

def read(vlm, prompts, group=1):
    """Read B prompts once → (cache of B·G rows, attention mask (B·G, P), last hidden states (B·G, D)).

    Gradients flow through the cache to the prompt's side when they are on.
    """
    base = vlm.model.base_model
    if hasattr(base, "rope_deltas"):
        base.rope_deltas = None  # another batch's
    out = base(**prompts, use_cache=True)
    cache, last = out.past_key_values, out.last_hidden_state[:, -1]  # the last column is never padding
    rows, shift = torch.arange(len(last), device=last.device).repeat_interleave(group), getattr(base, "rope_deltas", None)
    cache.rope_deltas = None if shift is None else shift[rows]  # (B·G, 1); on the model, the next batch would overwrite them
    if group > 1:  # both repeat; the second has the faster backward pass, and would miss a recurrent layer's state
        recurrent = any(hasattr(layer, "conv_states") for layer in cache.layers)
        cache.reorder_cache(rows) if recurrent else cache.batch_repeat_interleave(group)
    return cache, prompts["attention_mask"][rows], last.repeat_interleave(group, 0)


def continue_from(vlm, cache, mask, ids):
    """Continue cached rows with ids (N, C) → their hidden states (N, C, D); the cache grows by C. mask (N, P+C)."""
    positions = {}  # most models count on from the cache's length
    if cache.rope_deltas is not None:  # M-RoPE (Qwen): counted without padding, and an image advances it by its longer side
        text = (mask.cumsum(-1) - 1)[:, -ids.shape[1]:] + cache.rope_deltas  # (N, C)
        positions = {"position_ids": text.expand(3, -1, -1)}  # of text: the same in time, height and width
    return vlm.model.base_model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True,
                                **positions).last_hidden_state


class Room:
    """In place of a cache layer's `update`: writes new tokens in place, where the layer's own copies all P to add one. No gradient."""

    def __init__(self, layer, more):
        self.layer, self.used = weakref.proxy(layer), layer.keys.shape[-2]  # a cycle would outlive the cache until the next collection
        self.keys, self.values = (torch.cat([x, x.new_empty(*x.shape[:2], more, x.shape[3])], 2) for x in (layer.keys, layer.values))

    def __call__(self, keys, values, *args, **kwargs):
        new = slice(self.used, self.used + keys.shape[-2])
        self.keys[:, :, new], self.values[:, :, new], self.used = keys, values, new.stop
        self.layer.keys, self.layer.values = self.keys[:, :, :new.stop], self.values[:, :, :new.stop]
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
    if group == 1:  # nothing to share: one pass over prompt and continuation (the only one that gradient checkpointing allows)
        inputs = prompts | {"input_ids": torch.cat([prompts["input_ids"], ids], 1),
                            "attention_mask": torch.cat([prompts["attention_mask"], mask], 1)}
        for key in ("token_type_ids", "mm_token_type_ids"):  # a continuation is text: type 0
            if key in prompts:
                inputs[key] = torch.cat([prompts[key], torch.zeros_like(ids)], 1)
        return vlm.model.base_model(**inputs, use_cache=False).last_hidden_state[:, -ids.shape[1] - 1:]
    cache, prompt_mask, last = read(vlm, prompts, group)
    states = continue_from(vlm, cache, torch.cat([prompt_mask, mask], 1), ids)  # (N, C, D)
    return torch.cat([last[:, None], states], 1)


def lm_head(vlm, states, temperature=1.0):
    """What the ops of triton_ops.py ask for: (states, the head's weight, {temperature, bias, softcap}), in autocast's dtype."""
    device, bias = states.device.type, getattr(vlm.head, "bias", None)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
    divisor, softcap = vlm.logit_rule
    return states.to(dtype), vlm.head.weight.to(dtype), {"temperature": temperature * divisor, "softcap": softcap,
                                                         "bias": bias if bias is None else bias.to(dtype)}


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
    """Sample `group` continuations of each of B prompts → ids, mask (B·G, C), end-of-turn included.

    No top-k, no top-p: these are the model's own samples, less the tokens that must never be one (`banned_ids`).
    `temperature=0` is greedy. Each row draws from a generator of its own, seeded by `seeds` (B·G ints): token =
    the inverse of the distribution function at one uniform number, so a row does not depend on its batch.
    """
    rows = prompts["attention_mask"].shape[0] * group
    uniform = torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(s)) for s in seeds]) \
        if temperature else torch.zeros(rows, max_new_tokens)
    uniform = uniform.to(vlm.device)  # (N, C)
    stops, banned = (torch.tensor(x, dtype=torch.long, device=vlm.device) for x in (vlm.stop_ids, vlm.banned_ids))
    here = torch.arange(rows, device=vlm.device)  # (n,) which rows are still in the batch
    alive = torch.ones_like(here, dtype=torch.bool)  # (n,)
    ids = torch.full((rows, max_new_tokens), vlm.tokenizer.pad_token_id, device=vlm.device)
    kept = torch.zeros_like(ids)  # (N, C)
    if vlm.can_continue:
        cache, mask, state = read(vlm, prompts, group)
        make_room(cache, max_new_tokens)
    else:
        prompts, cache = prompts.repeated(group), None
        state = hidden_states(vlm, prompts, ids[:, :0], kept[:, :0])[:, -1]
    for step in range(max_new_tokens):
        logits = bent(vlm.head(state).float(), vlm.logit_rule)  # (n, V): one position, not C of them
        logits[:, banned] = -torch.inf
        token = pick(logits, temperature, uniform[here, step])
        ids[here, step], kept[here, step] = torch.where(alive, token, vlm.tokenizer.pad_token_id), alive.long()
        alive = alive & ~torch.isin(token, stops)
        left = int(alive.sum())
        if not left or step == max_new_tokens - 1:
            break
        if cache is None:  # a plain pass a token
            state = hidden_states(vlm, prompts, ids[:, :step + 1], kept[:, :step + 1])[:, -1]
            continue
        if left <= len(here) // 2:  # the long tail goes on without the rows that have ended
            stay = alive.nonzero()[:, 0]
            here, alive, mask = here[stay], alive[stay], mask[stay]
            make_room(cache, max_new_tokens - step, stay)
            cache.rope_deltas = None if cache.rope_deltas is None else cache.rope_deltas[stay]
        mask = torch.cat([mask, kept[here, step][:, None]], 1)
        state = continue_from(vlm, cache, mask, ids[here, step][:, None])[:, 0]
    return ids[:, :step + 1], kept[:, :step + 1]


def pick(logits, temperature, uniform):
    """One token a row: the largest logit at temperature 0, else the inverse CDF of the softmax at `uniform`."""
    if not temperature:
        return logits.argmax(-1)
    cdf = (logits / temperature).softmax(-1).double().cumsum(-1)  # (N, V); double: 150,000 terms must sum to 1
    below = uniform.double()[:, None] * cdf[:, -1:]
    return (cdf <= below).sum(-1).clamp(max=cdf.shape[-1] - 1)
