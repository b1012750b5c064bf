"""Models from disk and to disk: loading with its checks, what of a model learns, saving."""

import copy
import os
import re
import shutil
import textwrap
from dataclasses import replace

import torch
import transformers
from PIL import Image
from torch.nn.functional import pad
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from medgr2 import vlm
from medgr2.errors import ModelError
from medgr2.vlm import VLM, encode_continuations, encode_prompts

# How far two computations of the same states may differ, relative to their norm: in fp32, in half precision.
TOLERANCE, HALF_TOLERANCE = 1e-3, 0.1
# What the checks at loading ask about: the second text is longer, so the first is padded.
TEXTS = ["?", "Which side?"]


def load(name, device=None, dtype=torch.float32):
    """The VLM of a folder or hub name. Raises ModelError if it is no usable image-text-to-text model."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # A hub name is owner/model.
    is_local = os.path.exists(name) or name.startswith((".", "/")) or name.count("/") > 1
    if is_local and not os.path.isfile(os.path.join(name, "config.json")):
        raise ModelError(
            f"{name}: not a model (no config.json in it); "
            "give a folder saved by save_pretrained or a hub name"
        )
    settings = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        processor = load_processor(name)
        model, report = transformers.AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, trust_remote_code=False, **settings
        )
        loaded = wrap(model.to(device or best_device()).eval(), processor)
    except Exception as error:
        # The library raises all kinds of exceptions at a folder that is not what it expects.
        raise ModelError(
            f"{name}: cannot load it as an image-text-to-text model: {in_one_line(error)}; "
            "give one saved by save_pretrained, in safetensors, that needs no code of its own"
        ) from error
    fault = find_loading_fault(loaded, report) or find_processor_fault(loaded)
    if fault:
        raise ModelError(f"{name}: {fault}")
    loaded.prefix_sharing = find_prefix_sharing(loaded)
    if loaded.prefix_sharing != "always":
        limits = {
            "never": "cannot continue a prefilled prompt: it computes whole rows instead",
            "without gradient": "cannot train through a prefilled prompt: it computes whole rows to train",
        }
        limit = limits[loaded.prefix_sharing]
        print(f"{name}: this architecture {limit}, with the same results, slower", flush=True)
    return loaded


def load_processor(name):
    """The model's processor without its video part, which alone would need torchvision."""
    # Left open, trust_remote_code asks on the terminal.
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    if config.model_type == "smolvlm":
        # SmolVLM's own needs num2words, for videos only. Both make the same of images.
        return transformers.Idefics3Processor.from_pretrained(name, backend="pil", trust_remote_code=False)
    cls = getattr(transformers, PROCESSOR_MAPPING_NAMES.get(config.model_type) or "", None)
    if cls is None or "video_processor" not in cls.get_attributes():
        return transformers.AutoProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
    attributes = [a for a in cls.get_attributes() if a != "video_processor"]
    without_video = type(cls.__name__, (cls,), {"get_attributes": classmethod(lambda _: attributes)})
    return without_video.from_pretrained(name, backend="pil")


def best_device():
    """cuda if there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def best_dtype():
    """bf16 if the device computes in it, else fp32. Trained weights stay fp32; autocast computes in this."""
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def in_one_line(error):
    return textwrap.shorten(str(error), 250, placeholder=" ...") or type(error).__name__


def wrap(model, processor):
    """The VLM of a model and its processor: finds which tokens end a turn and which must never be sampled."""
    tokenizer = processor.tokenizer
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    stops = {tokenizer.eos_token_id, *stops}
    tokens = set(tokenizer.get_vocab().values())
    rows = set(range(model.get_output_embeddings().weight.shape[0]))
    banned = (rows & special_ids(model, tokenizer) | rows - tokens) - stops
    names = special_names(processor)
    rule = find_logit_rule(model)
    return VLM(model, processor, tokenizer.eos_token_id, sorted(stops), sorted(banned), names, rule)


def special_ids(model, tokenizer):
    """The ids of all special tokens, image placeholders included."""
    ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids |= set(tokenizer.all_special_ids)
    for key, value in vars(model.config).items():
        if key.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            ids.add(value)
    return ids


def special_names(processor):
    """A pattern that finds the names of special tokens, the longest first."""
    tokenizer = processor.tokenizer
    names = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    names |= set(tokenizer.all_special_tokens)
    # The processor's image placeholder.
    names |= {v for k, v in vars(processor).items() if k.endswith("_token") and isinstance(v, str)}
    names = sorted((n for n in names if len(n) > 1), key=lambda n: (-len(n), n))
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def save(loaded, folder):
    """Save in the Hugging Face format: config, safetensors, tokenizer, image processor, chat template.

    Raises ModelError if the disk has no room for it.
    """
    os.makedirs(folder, exist_ok=True)
    size = sum(p.nbytes for p in loaded.model.parameters()) / 2**20
    free = shutil.disk_usage(folder).free / 2**20
    if size > free:
        raise ModelError(
            f"{folder}: the model needs {size:.3f} MiB and {free:.3f} MiB are free; "
            "make room, the same command resumes from here"
        )
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------
# Checks at loading: what a model cannot do is said in one line now, not after hours.


def find_loading_fault(loaded, report):
    """Why a model that loads would not compute what it claims to, or None. `report`: the library's own."""
    unset = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if unset:
        # They would start from random values.
        return (
            f"weights do not fit config.json: {unset[0]} and {len(unset) - 1} more are missing or of another "
            "shape; save or download it again"
        )
    if not loaded.processor.chat_template:
        return (
            "no chat template (chat_template.jinja), so it cannot be asked anything; "
            "take the -Instruct or -it model"
        )
    if loaded.logit_rule is None:
        return (
            "its logits are neither capped nor scaled as config.json says, "
            "so token_logps and sample cannot compute them"
        )
    return None


@torch.no_grad()
def find_logit_rule(model):
    """(divisor, softcap) with which VLM.logit_rule gives the model's own logits, or None if there are none.

    Among the classes whose config has such a number some use it, others do not, and one multiplies by what
    others divide by. So the model is asked: one token, with known numbers in place of the head's output.
    """
    rules = [(1.0, None), *stated_logit_rules(model.config.get_text_config())]
    if len(rules) == 1:
        return rules[0]
    head = model.get_output_embeddings()
    probe = torch.linspace(-50, 50, len(head.weight), device=head.weight.device)  # (V,)
    hook = head.register_forward_hook(lambda module, inputs, output: probe.to(output.dtype).expand_as(output))
    try:
        token = torch.zeros(1, 1, dtype=torch.long, device=probe.device)
        logits = model(input_ids=token).logits[0, -1].float()  # (V,)
    finally:
        hook.remove()
    for rule in rules:
        # bf16 has three digits.
        if torch.allclose(logits, vlm.apply_logit_rule(probe, rule), rtol=0.02, atol=0.02):
            return rule
    return None


def stated_logit_rules(config):
    """The rules that a text config may mean by its numbers."""
    cap = getattr(config, "final_logit_softcapping", None)
    rules = [(1.0, cap)] if cap else []
    for name in ("logit_scale", "logits_scaling"):
        scale = getattr(config, name, None)
        rules += [(scale, None), (1 / scale, None)] if scale else []
    return rules


def blank_images(count):
    return [Image.new("RGB", (64, 64))] * count


def find_processor_fault(loaded):
    """Why the model cannot take what its processor gives, or None: tried with a blank image and a word."""
    last = max(loaded.tokenizer.get_vocab().values())
    rows = loaded.model.get_input_embeddings().weight.shape[0]
    if last >= rows:
        return (
            f"its vocabulary does not fit: token {last} of the tokenizer, {rows} rows of the embedding; "
            "give it its own tokenizer"
        )
    try:
        with torch.no_grad():
            inputs = encode_prompts(loaded, blank_images(1), TEXTS[:1])
            vlm.hidden_states(loaded, inputs, *encode_continuations(loaded, ["!"]))
    except Exception as error:
        # The two can disagree in many ways, each with its own exception.
        return (
            f"its processor does not fit the model: {in_one_line(error)}; give it its own processor's files"
        )
    return None


def is_close(loaded, a, b):
    """Are two computations of the same states equal up to the rounding of the model's dtype?"""
    tolerance = TOLERANCE if loaded.model.dtype == torch.float32 else HALF_TOLERANCE
    return bool((a - b).norm() <= tolerance * b.norm())


def find_prefix_sharing(loaded):
    """VLM.prefix_sharing: "always", "without gradient" or "never". Tried against plain rows.

    A cache can fail in several ways: it cannot be repeated (some recurrent layers), it continues by one token
    only (Jamba) or from position 0 (Bamba), or the backward pass would read what has been overwritten
    (Qwen3.5).
    """
    found = "never"
    try:
        if continues_as_plain_rows(loaded):
            found = "without gradient"
            # In bf16 a model answers and scores; it is not trained.
            if loaded.model.dtype != torch.float32 or learns_as_plain_rows(loaded):
                found = "always"
    except Exception:
        # The library raises all kinds of exceptions at what an architecture was not made for.
        pass
    return found


def shared_states(loaded, inputs, ids, mask):
    """hidden_states of two continuations per prompt by a shared prefix: one token, then the rest at once."""
    prefix, last = vlm.prefill(loaded, inputs, 2)
    first = vlm.decode_step(loaded, prefix, ids[:, :1], mask[:, :1])
    others = vlm.decode_step(loaded, prefix, ids[:, 1:], mask[:, 1:])
    return torch.cat([last[:, None], first, others], 1)


def continuations_to_try(loaded):
    """Two continuations for each of TEXTS: ids and mask, (4, C), and which states to compare, (4, C+1)."""
    ids, mask = encode_continuations(loaded, ["left", "x", "", "a cyst"])
    return ids, mask, pad(mask, (1, 0), value=1).bool()


@torch.no_grad()
def continues_as_plain_rows(loaded):
    ids, mask, real = continuations_to_try(loaded)
    inputs = encode_prompts(loaded, blank_images(2), TEXTS)
    plain = vlm.plain_hidden_states(loaded, vlm.repeat_prompts(loaded, inputs, 2), ids, mask)
    return is_close(loaded, shared_states(loaded, inputs, ids, mask)[real].float(), plain[real].float())


@torch.enable_grad()
def learns_as_plain_rows(loaded):
    """Tried without images: a large model's activations over an image's tokens may not fit into memory."""
    ids, mask, real = continuations_to_try(loaded)

    def words(group):
        rows = [text for text in TEXTS for _ in range(group)]
        inputs = loaded.tokenizer(rows, padding=True, padding_side="left", return_tensors="pt")
        return {key: inputs[key].to(loaded.device) for key in ("input_ids", "attention_mask")}

    def gradient(states):
        # Of norms and biases: few numbers, in every layer.
        vectors = [p for p in loaded.model.parameters() if p.ndim == 1 and p.requires_grad]
        grads = torch.autograd.grad(states[real].float().sin().sum(), vectors, allow_unused=True)
        return torch.cat([g for g in grads if g is not None])

    shared = gradient(shared_states(loaded, words(1), ids, mask))
    return is_close(loaded, shared, gradient(vlm.plain_hidden_states(loaded, words(2), ids, mask)))


@torch.no_grad()
def can_reuse_features(loaded):
    """Whether kept features give the states that pixels give: tried with two images of two sizes."""
    images = [Image.new("RGB", (64, 64), "black"), Image.new("RGB", (96, 64), "white")]
    continuations = encode_continuations(loaded, ["left", "x"])
    reusing = replace(loaded, reuses_features=True)
    try:
        prompts = vlm.encode_images(reusing, vlm.preprocess(reusing, images, TEXTS))
        kept = vlm.hidden_states(loaded, vlm.collate_prompts(loaded, prompts), *continuations)
        plain = vlm.hidden_states(loaded, encode_prompts(loaded, images, TEXTS), *continuations)
    except Exception:
        # As above: all kinds of exceptions.
        return False
    return is_close(loaded, kept[:, 0].float(), plain[:, 0].float())


# ---------------------------------------------------------------------------------------------------------
# What learns.


def freeze(loaded, what):
    """`what` does not learn: "vision" (the tower), "images" (tower and projector) or "nothing"."""
    {"vision": freeze_vision, "images": freeze_images, "nothing": lambda _: None}[what](loaded)


def freeze_vision(loaded):
    """Leave the vision tower as it is; the rest learns. Raises ModelError if the model has none."""
    towers = ("vision_tower.", "vision_model.", "visual.")
    found = False
    for name, parameter in loaded.model.named_parameters():
        if "merger" not in name and any(part in name for part in towers):
            parameter.requires_grad_(False)
            found = True
    if not found:
        raise ModelError(f"{type(loaded.model).__name__}: no vision tower found by name; train it whole")


def freeze_images(loaded):
    """Leave the vision tower and the projector as they are: an image's features stay the same and can be
    kept.

    Raises ModelError if nothing is found beside the language model.
    """
    architecture = type(loaded.model).__name__
    learning = {id(p) for part in (loaded.model.get_decoder(), loaded.head) for p in part.parameters()}
    if all(id(p) in learning for p in loaded.model.parameters()):
        raise ModelError(
            f"{architecture}: nothing found beside the language model that could make an image's features; "
            "train it whole"
        )
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(id(parameter) in learning)
    loaded.reuses_features = can_reuse_features(loaded)
    if not loaded.reuses_features:
        print(
            f"{architecture}: this architecture takes no features that were computed before: its vision "
            "tower encodes the image at every pass, the same results, slower",
            flush=True,
        )


def frozen_copy(loaded):
    """The same model with weights that no optimiser moves: GRPO's reference. What is frozen is shared."""
    shared = {id(p): p for p in loaded.model.parameters() if not p.requires_grad}
    return replace(loaded, model=copy.deepcopy(loaded.model, shared).eval().requires_grad_(False))
