"""Models from and to disk: processor and weights, what a model can do (tried at loading), what of it learns."""

import copy
import os
import re
import shutil
import textwrap
from dataclasses import replace

import torch
from PIL import Image

from medgr2.errors import ModelError
from medgr2.vlm import (
    VLM,
    apply_logit_rule,
    collate_prompts,
    decode_step,
    encode_continuations,
    encode_images,
    encode_prompts,
    hidden_states,
    prefill,
    preprocess,
)


def load_processor(name):
    """The model's processor, without its video part: that alone would demand torchvision."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    # left open, it asks on the terminal
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    # its own asks for num2words, to spell how many frames a video has; of images both make the same
    if config.model_type == "smolvlm":
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
    # a hub name is owner/model
    local = os.path.exists(name) or name.startswith((".", "/")) or name.count("/") > 1
    if local and not os.path.isfile(os.path.join(name, "config.json")):
        raise ModelError(
            f"{name}: not a model (no config.json in it); give a folder saved by save_pretrained or a hub name"
        )
    try:
        processor = load_processor(name)
        model, report = transformers.AutoModelForImageTextToText.from_pretrained(
            name,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        vlm = wrap(model.to(device or best_device()).eval(), processor)
    except Exception as e:
        # the library raises whatever it likes at a folder that is not what it expects
        raise ModelError(
            f"{name}: cannot load it as an image-text-to-text model: {in_one_line(e)}; "
            "give one saved by save_pretrained, in safetensors, that needs no code of its own"
        ) from e
    wrong = find_loading_fault(vlm, report) or find_processor_fault(vlm)
    if wrong:
        raise ModelError(f"{name}: {wrong}")
    vlm.shares = find_prefix_sharing(vlm)
    if vlm.shares != "always":
        print(
            f"{name}: this architecture can {'not' if vlm.shares == 'never' else 'only without gradient'} continue a prompt read once: "
            "plain rows instead, the same results, slower",
            flush=True,
        )
    return vlm


def in_one_line(error):
    return textwrap.shorten(str(error), 250, placeholder=" ...") or type(error).__name__


def wrap(model, processor):
    """A VLM of a model and its processor: finds out which tokens end a turn and which must never be sampled."""
    tokenizer = processor.tokenizer
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    stops = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id} | set(
        stops if isinstance(stops, list) else [] if stops is None else [stops]
    )
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special} | set(
        tokenizer.all_special_ids
    )
    special |= {
        v
        for k, v in vars(model.config).items()
        if k.endswith(("_token_id", "_token_index")) and isinstance(v, int)
    }
    rows = set(range(model.get_output_embeddings().weight.shape[0]))
    banned = (rows & special | rows - set(tokenizer.get_vocab().values())) - stops
    names = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special} | set(
        tokenizer.all_special_tokens
    )
    # its image placeholder
    names |= {v for k, v in vars(processor).items() if k.endswith("_token") and isinstance(v, str)}
    names = sorted((n for n in names if len(n) > 1), key=lambda n: (-len(n), n))
    special_names = re.compile("|".join(map(re.escape, names)) or "(?!)")
    return VLM(
        model,
        processor,
        tokenizer.eos_token_id,
        sorted(stops),
        sorted(banned),
        special_names,
        find_logit_rule(model),
    )


def save(vlm, folder):
    """Save in the Hugging Face format: config, safetensors, tokenizer, image processor, chat template.

    Raises ModelError where the disk has no room for it.
    """
    os.makedirs(folder, exist_ok=True)
    size, free = sum(p.nbytes for p in vlm.model.parameters()), shutil.disk_usage(folder).free
    if size > free:
        raise ModelError(
            f"{folder}: the model needs {size / 2**20:.3f} MiB and {free / 2**20:.3f} MiB are free; "
            "make room, the same command goes on from here"
        )
    vlm.model.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------
# What is tried at loading.


def find_loading_fault(vlm, report):
    """Why a model that loads would not compute what it claims to, or None. `report`: the library's own, of its loading."""
    unset = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    # they would start from random values
    if unset:
        return (
            f"weights do not fit config.json: {unset[0]} and {len(unset) - 1} more are missing or of another shape; "
            "save or download it again"
        )
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
    cap, *scales = (
        getattr(text, k, None) for k in ("final_logit_softcapping", "logit_scale", "logits_scaling")
    )
    rules = [
        (1.0, None),
        *((1.0, cap) for _ in [0] if cap),
        *((d, None) for s in scales if s for d in (s, 1 / s)),
    ]
    if len(rules) == 1:
        return rules[0]
    head = model.get_output_embeddings()
    probe = torch.linspace(-50, 50, len(head.weight), device=head.weight.device)  # (V,)
    hook = head.register_forward_hook(lambda module, inputs, output: probe.to(output.dtype).expand_as(output))
    try:
        seen = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=probe.device)).logits[0, -1].float()
    finally:
        hook.remove()
    # bf16 has 3 digits
    return next(
        (r for r in rules if torch.allclose(seen, apply_logit_rule(probe, r), rtol=0.02, atol=0.02)), None
    )


def find_processor_fault(vlm):
    """Why the model cannot take what its processor gives, or None: tried with one blank image and a word, in a plain row."""
    last, rows = max(vlm.tokenizer.get_vocab().values()), vlm.model.get_input_embeddings().weight.shape[0]
    if last >= rows:
        return f"its vocabulary does not fit: token {last} of the tokenizer, {rows} rows of the embedding; give it its own tokenizer"
    try:
        with torch.no_grad():
            hidden_states(
                vlm,
                encode_prompts(vlm, [Image.new("RGB", (64, 64))], ["?"]),
                *encode_continuations(vlm, ["!"]),
            )
    except Exception as e:
        # raised wherever the two disagree
        return f"its processor does not fit the model: {in_one_line(e)}; give it its own processor's files"


def find_prefix_sharing(vlm):
    """VLM.shares: tried with two prompts, one of them padded, and two continuations of each, against plain rows.

    A cache fails in several ways: it cannot be repeated (as some recurrent layers' cannot), or is continued by one token alone
    (Jamba), or from position 0 (Bamba), or the backward pass would read what has been overwritten (Qwen3.5). That last is tried
    without images: the activations of a large model over an image's tokens may be more than there is memory for.
    """
    texts, (ids, mask) = (
        ["?", "Which side?"],
        encode_continuations(vlm, ["left", "x", "", "a cyst"]),
    )  # (4, C) each
    real = torch.nn.functional.pad(mask, (1, 0), value=1).bool()  # (4, C+1)
    # else it answers and scores, and does not learn
    exact = vlm.model.dtype == torch.float32
    close = lambda a, b: (a - b).norm() <= (1e-3 if exact else 0.1) * b.norm()  # noqa: E731
    plain = lambda rows: hidden_states(vlm, rows, ids, mask)[real].float()  # noqa: E731; of 4 prompts for 4 continuations

    def shared(prompts):
        cache, seen, last = prefill(vlm, prompts, 2)
        # a token alone, as `sample` goes on
        first = decode_step(vlm, cache, torch.cat([seen, mask[:, :1]], 1), ids[:, :1])
        # several at once
        others = decode_step(vlm, cache, torch.cat([seen, mask], 1), ids[:, 1:])
        return torch.cat([last[:, None], first, others], 1)[real].float()

    def words(group):
        inputs = vlm.tokenizer(
            [t for t in texts for _ in range(group)], padding=True, padding_side="left", return_tensors="pt"
        )
        return {k: inputs[k].to(vlm.device) for k in ("input_ids", "attention_mask")}

    def slopes(states):
        # and biases: few numbers, in every layer
        norms = [p for p in vlm.model.parameters() if p.ndim == 1 and p.requires_grad]
        return torch.cat(
            [g for g in torch.autograd.grad(states.sin().sum(), norms, allow_unused=True) if g is not None]
        )

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
    except Exception:
        # the library raises whatever it likes where a thing was not meant to be done
        pass
    return found


# ---------------------------------------------------------------------------------------------------------
# What learns.


def freeze_vision(vlm):
    """Leave the vision tower as it is; the projector and the language model go on learning."""
    tower = [
        parameter
        for name, parameter in vlm.model.named_parameters()
        if "merger" not in name
        and any(part in name for part in ("vision_tower.", "vision_model.", "visual."))
    ]
    if not tower:
        raise ModelError(f"{type(vlm.model).__name__}: no vision tower found by name; train it whole")
    for parameter in tower:
        parameter.requires_grad_(False)


def freeze_images(vlm):
    """Leave the vision tower and the projector as they are: an image's features stay the same, and `look` keeps them."""
    learning = {id(p) for part in (vlm.model.get_decoder(), vlm.head) for p in part.parameters()}
    if all(id(p) in learning for p in vlm.model.parameters()):
        raise ModelError(
            f"{type(vlm.model).__name__}: nothing found beside the language model that could make an image's features; train it whole"
        )
    for parameter in vlm.model.parameters():
        parameter.requires_grad_(id(parameter) in learning)
    vlm.keeps = can_reuse_features(vlm)
    if not vlm.keeps:
        print(
            f"{type(vlm.model).__name__}: this architecture takes no features that were computed before: its vision tower reads an "
            "image at every pass, the same results, slower",
            flush=True,
        )


@torch.no_grad()
def can_reuse_features(vlm):
    """Whether kept features give the states that pixels give: tried with two images of two sizes, and two texts."""
    images, texts = (
        [Image.new("RGB", (64, 64), "black"), Image.new("RGB", (96, 64), "white")],
        ["?", "Which side?"],
    )
    answers = encode_continuations(vlm, ["left", "x"])
    try:
        looking = replace(vlm, keeps=True)
        kept = collate_prompts(vlm, encode_images(looking, images, texts, preprocess(looking, images, texts)))
        kept, plain = (
            hidden_states(vlm, p, *answers)[:, 0].float() for p in (kept, encode_prompts(vlm, images, texts))
        )
    except Exception:
        # the library raises whatever it likes where a thing was not meant to be done
        return False
    return bool((kept - plain).norm() <= (1e-3 if vlm.model.dtype == torch.float32 else 0.1) * plain.norm())


def frozen_copy(vlm):
    """The same model with weights of its own that no optimiser moves, GRPO's reference; those that are frozen already it shares."""
    shared = {id(p): p for p in vlm.model.parameters() if not p.requires_grad}
    return replace(vlm, model=copy.deepcopy(vlm.model, shared).eval().requires_grad_(False))
