"""Models: loading with checks, freezing, saving."""

import copy
import json
import os
import re
import shutil
from dataclasses import replace
from fnmatch import fnmatch

import torch
import transformers
from accelerate import Accelerator
from huggingface_hub import snapshot_download
from PIL import Image
from torch.nn.functional import pad
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from medgr2 import encoding, training, vlm
from medgr2.encoding import encode_continuations, encode_prompts
from medgr2.errors import ModelError, RunError, in_one_line, is_out_of_memory
from medgr2.progress import tell
from medgr2.prompts import TAG
from medgr2.vlm import VLM

# How far two computations of the same states may differ, relative to their norm: in fp32, in half precision.
TOLERANCE, HALF_TOLERANCE = 1e-3, 0.1
# What the checks at loading ask about: the second text is longer, so the first is padded.
TEXTS = ["?", "Which side?"]
# Files of weights: in formats that are not loaded, or written anew by `save`.
WEIGHTS = "*.safetensors *.index.json *.bin *.pt *.pth *.ckpt *.gguf *.h5 *.msgpack *.onnx *.tar".split()
# What a run of ours writes beside its model.
RUN_FILES = ("args.json", "metrics.json", "marks.json", "*.jsonl", "*.damaged", "lock")


def load(name, device=None, dtype=torch.float32, learns=False):
    """The VLM of a folder or hub name. Raises ModelError if it is no usable image-text-to-text model.

    `learns`: it will be trained, as one in fp32 always may be.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    settings = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    device = device or best_device()
    folder = find_folder(name)
    fault = find_folder_fault(folder)
    if fault:
        raise ModelError(f"{name}: {fault}")
    quantisation = find_quantisation(folder)
    # A quantised model is put on its device as it is loaded; its other weights keep their dtype.
    place = {"device_map": device, "dtype": "auto"} if quantisation else {"dtype": dtype}
    try:
        processor = load_processor(name)
        model, report = transformers.AutoModelForImageTextToText.from_pretrained(
            name, trust_remote_code=False, **settings, **place
        )
        loaded = wrap((model if quantisation else model.to(device)).eval(), processor, folder)
    except Exception as error:
        # The library raises all kinds of exceptions at a folder that is not what it expects.
        if is_out_of_memory(error):
            raise
        raise ModelError(f"{name}: {explain_failure(error, quantisation)}") from error
    fault = find_loading_fault(loaded, report) or find_processor_fault(loaded)
    if fault:
        raise ModelError(f"{name}: {fault}")
    loaded.prefix_sharing = find_prefix_sharing(loaded, learns)
    loaded.shares_images = loaded.prefix_sharing == "always" and can_share_images(loaded)
    if loaded.prefix_sharing != "always":
        limits = {
            "never": "cannot continue a prefilled prompt: it computes whole rows instead",
            "without gradient": "cannot train through a prefilled prompt: it computes whole rows to train",
        }
        limit = limits[loaded.prefix_sharing]
        tell(f"{name}: this architecture {limit}, with the same results, slower")
    return loaded


def find_folder(name):
    """The folder of a model: the name itself, or what the hub has besides weights, downloaded once."""
    # A hub name is owner/model.
    if os.path.exists(name) or name.startswith((".", "/")) or name.count("/") > 1:
        return name
    try:
        return snapshot_download(name, ignore_patterns=WEIGHTS)
    except Exception as error:
        # Of the hub, of the network or of the disk.
        raise ModelError(f"{name}: {explain_failure(error)}") from error


def read_json(folder, file):
    """The JSON object of a model's folder; {} if there is none, which the library will explain."""
    try:
        with open(os.path.join(folder, file), encoding="utf-8") as f:
            found = json.load(f)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def find_folder_fault(folder):
    """Why a folder is no vision-language model, told by its files, or None."""
    adapter, config = read_json(folder, "adapter_config.json"), read_json(folder, "config.json")
    if adapter and not config:
        return (
            f"an adapter ({adapter.get('peft_type')}) of {adapter.get('base_model_name_or_path')}, not a "
            "whole model; merge the two (peft's merge_and_unload), save the result and give that"
        )
    if not has(folder, "config.json"):
        return "not a model (no config.json in it); give a folder saved by save_pretrained or a hub name"
    kind = str(config.get("model_type"))
    known = transformers.models.auto.modeling_auto
    sees = kind in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if kind in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not sees:
        return f"a text-only model ({kind}), which takes no image; give a vision-language model"
    return None


def find_quantisation(folder):
    """How the weights in this folder are quantised, as `awq`; None if they are not."""
    quantisation = read_json(folder, "config.json").get("quantization_config")
    return quantisation.get("quant_method") if isinstance(quantisation, dict) else None


def explain_failure(error, quantisation=None):
    """In one line, why the library did not load a model, and what to do."""
    if quantisation:
        advice = "install what that names, or give the unquantised model"
        return f"cannot load its quantised weights ({quantisation}): {in_one_line(error)}; {advice}"
    return (
        f"cannot load it as an image-text-to-text model: {in_one_line(error)}; "
        "give one saved by save_pretrained, in safetensors, that needs no code of its own"
    )


def load_processor(name):
    """The model's processor with its chat template, which older folders keep with the tokenizer."""
    processor = load_without_video(name)
    processor.chat_template = processor.chat_template or getattr(processor.tokenizer, "chat_template", None)
    return processor


def load_without_video(name):
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


def limit_pixels(loaded, least=None, most=None):
    """Let the model see images of at least `least` and at most `most` pixels; None leaves its own limit.

    Qwen's processors (and others of their kind) round a size to whole patches, so they get the limits
    themselves. For other models an image is resized before its processor sees it. `save` keeps neither.
    Raises RunError if no image can be both.
    """
    if least and most and least > most:
        raise RunError(f"--min-pixels {least} is above --max-pixels {most}: give a smaller one")
    processor = loaded.processor.image_processor
    size = dict(processor.size or {})
    if not hasattr(processor, "merge_size") or not size.get("longest_edge"):
        loaded.pixels = least, most
        return
    # Their `edges` are pixels. The limit that is given counts more than the processor's other one.
    shortest, longest = size["shortest_edge"], size["longest_edge"]
    shortest, longest = least or min(shortest, most or shortest), most or max(longest, least or longest)
    processor.size = type(processor.size)(**size | {"shortest_edge": shortest, "longest_edge": longest})


def best_device():
    """cuda if there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def best_dtype():
    """bf16 if the device computes in it, else fp32. Trained weights stay fp32; autocast computes in this."""
    # GPUs before Ampere (V100, T4) only emulate it, much slower than fp32.
    in_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if in_bf16 else torch.float32


def start_accelerator():
    """The Accelerator of a stage that trains, on the device that all stages compute on."""
    precision = "bf16" if best_dtype() == torch.bfloat16 else "no"
    # Otherwise accelerate would take a Mac's GPU, which has no float64.
    return Accelerator(mixed_precision=precision, cpu=best_device() == "cpu")


def wrap(model, processor, folder=None):
    """The VLM of a model and its processor: finds which tokens end a turn and which must never be sampled.

    `folder`: where they were loaded from.
    """
    tokenizer = processor.tokenizer
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    keep_tags_whole(tokenizer)
    names = special_names(processor)
    end_id = find_turn_end(processor, names)
    end_id = tokenizer.eos_token_id if end_id is None else end_id
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    stops = {end_id, tokenizer.eos_token_id, *stops}
    tokens = set(tokenizer.get_vocab().values())
    rows = set(range(model.get_output_embeddings().weight.shape[0]))
    banned = (rows & special_ids(model, tokenizer) | rows - tokens) - stops
    rule = find_logit_rule(model)
    context = find_context(model.config.get_text_config())
    token_ids = end_id, sorted(stops), sorted(banned)
    return VLM(model, processor, *token_ids, names, rule, context=context, source=folder)


def find_context(config):
    """The number of tokens that a text config has positions for; None if it does not say."""
    rope = getattr(config, "rope_parameters", None) or {}
    # Scaled positions (YaRN): not every config gives their number as its own.
    scaled = (rope.get("factor") or 0) * (rope.get("original_max_position_embeddings") or 0)
    return int(max(getattr(config, "max_position_embeddings", None) or 0, scaled)) or None


def keep_tags_whole(tokenizer):
    """Make the tags of the replies' form plain tokens, in memory, if the tokenizer has them as special ones.

    A special token is never sampled, is left out of decoded text, and is split up in the text of a record.
    """
    special = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
    if not any(TAG.fullmatch(str(token)) for token in special):
        return
    # The library can make a token special, but not plain again. So its state is dumped, changed and loaded.
    old = tokenizer.backend_tokenizer
    state = json.loads(old.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["special"] and not TAG.fullmatch(token["content"])
    tokenizer._tokenizer = type(old).from_str(json.dumps(state))
    tokenizer._tokenizer.encode_special_tokens = old.encode_special_tokens


def special_tokens(tokenizer):
    """The names of the tokenizer's special tokens, without the tags of the replies' form."""
    names = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {name for name in names | set(tokenizer.all_special_tokens) if not TAG.fullmatch(name)}


def special_ids(model, tokenizer):
    """The ids of all special tokens, image placeholders included."""
    ids = set(tokenizer.convert_tokens_to_ids(sorted(special_tokens(tokenizer))))
    for key, value in vars(model.config).items():
        if key.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            ids.add(value)
    return ids


def special_names(processor):
    """A pattern that finds the names of special tokens, the longest first."""
    names = special_tokens(processor.tokenizer)
    # The processor's image placeholder.
    names |= {v for k, v in vars(processor).items() if k.endswith("_token") and isinstance(v, str)}
    names = sorted((n for n in names if len(n) > 1), key=lambda n: (-len(n), n))
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def find_turn_end(processor, names):
    """The token with which the chat template ends a reply, or None: often not the tokenizer's own end.

    It is the first special token (`names`) after a reply, unless it opens a turn.
    """
    turns = [("user", "QUESTION"), ("assistant", "REPLY"), ("user", "QUESTION")]
    chat = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    try:
        asked = processor.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False)
        answered = processor.apply_chat_template(chat, tokenize=False)
    except Exception:
        # A template may raise anything, and some take no replies.
        return None
    before, _, after = answered.partition("REPLY")
    end = names.search(after.partition("QUESTION")[0])
    openings = [names.findall(part)[-1:] for part in (asked, before, before.partition("QUESTION")[0])]
    if end is None or [end[0]] in openings:
        return None
    return processor.tokenizer.convert_tokens_to_ids(end[0])


def save(loaded, folder):
    """Save in the Hugging Face format. Whatever loads the folder that the model came from loads this one.

    Raises ModelError if a weight is not finite, or the disk has no room for it.
    """
    if weight := training.find_not_finite(dict(loaded.model.named_parameters())):
        raise ModelError(
            f"{folder}: not saved, because {weight} is not finite; lower --lr, with another --out"
        )
    os.makedirs(folder, exist_ok=True)
    size = sum(p.nbytes for p in loaded.model.parameters()) / 2**20
    free = shutil.disk_usage(folder).free / 2**20
    if size > free:
        raise ModelError(
            f"{folder}: the model needs {size:.3f} MiB and {free:.3f} MiB are free; "
            "make room, the same command resumes from here"
        )
    if loaded.source and find_quantisation(loaded.source):
        # They cannot learn, so the source's are copied: the library cannot write every kind.
        return carry_over(loaded.source, folder, RUN_FILES)
    loaded.model.save_pretrained(folder)
    if loaded.source is None:
        loaded.processor.save_pretrained(folder)
    else:
        carry_over(loaded.source, folder, (*WEIGHTS, *RUN_FILES))


def carry_over(source, folder, but):
    """Copy what the source has and no stage changes: tokenizer, processors, templates, licence, README.

    They are not saved anew, because the processor in memory is not all of it (load_processor). `but`:
    patterns of names that are not copied.
    """
    templates = os.path.join("additional_chat_templates", "")
    for parent in ("", templates):
        for name in sorted(os.listdir(os.path.join(source, parent)) if has(source, parent) else ()):
            path = parent + name
            is_out = any(fnmatch(name, pattern) for pattern in (*but, ".*"))
            if os.path.isfile(os.path.join(source, path)) and not is_out and not has(folder, path):
                os.makedirs(os.path.join(folder, parent), exist_ok=True)
                shutil.copyfile(os.path.join(source, path), os.path.join(folder, path))


def has(folder, name):
    return os.path.exists(os.path.join(folder, name))


# ---------------------------------------------------------------------------------------------------------
# Checks at loading: what a model cannot do is reported in one line now, not after hours.


def find_loading_fault(loaded, report):
    """Why a model that loads would not compute what it claims to, or None. `report`: the library's own."""
    unset = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if unset:
        # They would start from random values.
        return (
            f"weights do not fit config.json: {unset[0]} and {len(unset) - 1} more are missing or of another "
            "shape; save or download it again"
        )
    if weight := training.find_not_finite(dict(loaded.model.named_parameters())):
        return f"{weight} is not finite; train it again with a lower --lr, or download it again"
    if not loaded.processor.chat_template:
        return (
            "no chat template (chat_template.jinja), so it cannot be asked anything; "
            "take the -Instruct or -it model"
        )
    if getattr(loaded.processor, "patch_size", 0) is None:
        strategy = "`vision_feature_select_strategy` and `num_additional_image_tokens`"
        return (
            f"its processor_config.json gives no `patch_size`; add it, with {strategy}, as config.json's "
            "vision tower has them"
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

    Of the classes whose config has such a number, some use it, others do not, and one multiplies by what
    others divide by. So the rule is measured: one token, with known numbers in place of the head's output.
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


def trial_images(count):
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
            inputs = encode_prompts(loaded, trial_images(1), TEXTS[:1])
            vlm.hidden_states(loaded, inputs, *encode_continuations(loaded, ["!"]))
    except Exception as error:
        # The two can disagree in many ways, each with its own exception.
        if is_out_of_memory(error):
            raise
        return (
            f"its processor does not fit the model: {in_one_line(error)}; give it its own processor's files"
        )
    return None


def is_close(loaded, a, b):
    """Are two computations of the same states equal up to the rounding of the model's dtype?"""
    tolerance = TOLERANCE if loaded.model.dtype == torch.float32 else HALF_TOLERANCE
    return bool((a - b).norm() <= tolerance * b.norm())


def find_prefix_sharing(loaded, learns=False):
    """VLM.prefix_sharing: "always", "without gradient" or "never". Tried against plain rows.

    A cache can fail in several ways: it cannot be repeated (some recurrent layers), it continues by one token
    only (Jamba) or from position 0 (Bamba), or the backward pass would read what has been overwritten
    (Qwen3.5).
    """
    found = "never"
    try:
        if continues_as_plain_rows(loaded):
            found = "without gradient"
            # In half precision most models only answer and score.
            may_learn = learns or loaded.model.dtype == torch.float32
            if not may_learn or learns_as_plain_rows(loaded):
                found = "always"
    except Exception as error:
        # The library raises all kinds of exceptions at what an architecture was not made for.
        if is_out_of_memory(error):
            raise
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
    inputs = encode_prompts(loaded, trial_images(2), TEXTS)
    plain = vlm.plain_hidden_states(loaded, encoding.repeat_prompts(loaded, inputs, 2), ids, mask)
    return is_close(loaded, shared_states(loaded, inputs, ids, mask)[real].float(), plain[real].float())


@torch.enable_grad()
def learns_as_plain_rows(loaded):
    """Tried without images: a large model's activations over an image's tokens may not fit into memory."""
    ids, mask, real = continuations_to_try(loaded)

    def words(group):
        rows = [text for text in TEXTS for _ in range(group)]
        inputs = loaded.tokenizer(rows, padding=True, padding_side="left", return_tensors="pt")
        tensors = {key: inputs[key].to(loaded.device) for key in ("input_ids", "attention_mask")}
        return encoding.Inputs(tensors, [])

    def gradient(states):
        # Of norms and biases: few numbers, in every layer.
        vectors = [p for p in loaded.model.parameters() if p.ndim == 1 and p.requires_grad]
        grads = torch.autograd.grad(states[real].float().sin().sum(), vectors, allow_unused=True)
        return torch.cat([g for g in grads if g is not None])

    shared = gradient(shared_states(loaded, words(1), ids, mask))
    return is_close(loaded, shared, gradient(vlm.plain_hidden_states(loaded, words(2), ids, mask)))


@torch.no_grad()
def can_share_images(loaded):
    """Whether prompts about one image give the states of plain rows: tried with three about two images."""
    # A sliding window would count the padding between image and question.
    if not vlm.has_plain_cache(loaded):
        return False
    black, white = two_images()
    images, texts, trial = [black, white, black], [*TEXTS, TEXTS[1]], replace(loaded, shares_images=True)
    ids, mask = encode_continuations(loaded, ["left", "x", "a cyst"])
    try:
        shared = vlm.hidden_states(loaded, encoding.encode_by_image(trial, images, texts), ids, mask)
        plain = vlm.hidden_states(loaded, encode_prompts(loaded, images, texts), ids, mask)
    except Exception as error:
        # As above: all kinds of exceptions.
        if is_out_of_memory(error):
            raise
        return False
    real = pad(mask, (1, 0), value=1).bool()
    return is_close(loaded, shared[real].float(), plain[real].float())


def two_images():
    """A black and a white one, of two sizes."""
    return [Image.new("RGB", (64, 64), "black"), Image.new("RGB", (96, 64), "white")]


@torch.no_grad()
def can_reuse_features(loaded):
    """Whether kept features give the states that pixels give: tried with two images of two sizes."""
    images = two_images()
    continuations = encode_continuations(loaded, ["left", "x"])
    reusing = replace(loaded, reuses_features=True)
    try:
        prompts = encoding.encode_images(reusing, encoding.preprocess(reusing, images, TEXTS))
        kept = vlm.hidden_states(loaded, encoding.collate_prompts(loaded, prompts), *continuations)
        plain = vlm.hidden_states(loaded, encode_prompts(loaded, images, TEXTS), *continuations)
    except Exception as error:
        # As above: all kinds of exceptions.
        if is_out_of_memory(error):
            raise
        return False
    return is_close(loaded, kept[:, 0].float(), plain[:, 0].float())


# ---------------------------------------------------------------------------------------------------------
# What learns.


def freeze(loaded, what):
    """`what` does not learn: "vision" (the tower), "images" (tower and projector) or "nothing".

    Raises ModelError if the rest cannot learn either, because it is quantised.
    """
    quantisation = loaded.source and find_quantisation(loaded.source)
    if quantisation:
        raise ModelError(
            f"{loaded.source}: its weights are quantised ({quantisation}) and cannot learn; "
            "give the unquantised model"
        )
    {"vision": freeze_vision, "images": freeze_images, "nothing": lambda _: None}[what](loaded)


def freeze_vision(loaded):
    """Freeze the vision tower; the rest learns. Raises ModelError if the model has none."""
    towers = ("vision_tower.", "vision_model.", "visual.")
    found = False
    for name, parameter in loaded.model.named_parameters():
        if "merger" not in name and any(part in name for part in towers):
            parameter.requires_grad_(False)
            found = True
    if not found:
        raise ModelError(f"{type(loaded.model).__name__}: no vision tower found by name; train it whole")


def freeze_images(loaded):
    """Freeze the vision tower and the projector, so that an image's features stay the same and can be kept.

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
        tell(
            f"{architecture}: this architecture does not take precomputed image features: its vision tower "
            "encodes the image at every pass, with the same results, slower"
        )


def frozen_copy(loaded):
    """A copy whose weights no optimiser changes: GRPO's reference. What is frozen already is shared."""
    shared = {id(p): p for p in loaded.model.parameters() if not p.requires_grad}
    return replace(loaded, model=copy.deepcopy(loaded.model, shared).eval().requires_grad_(False))
