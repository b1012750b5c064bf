"""vlm.py: a prompt read once and continued many times gives what the plain model gives, one row at a time.

Nine architectures (and a few more that cannot share a prefix), built small with random weights and saved as a
hub repository has them, go through `loading.load`. Expected values come from `model(...).logits`,
`model.generate` and `log_softmax`, never from vlm.py's own functions.
"""

import copy
import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from medgr2 import context, encoding, loading, vlm
from medgr2.errors import ModelError, RecordError
from medgr2.prompts import parse_response
from triton_ops import linear_logprob

TOY = Path(__file__).parent.parent / "toy" / "policy"

# ---------------------------------------------------------------------------------------------------------
# The models.

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
TOWER = dict(SIZES, image_size=16, patch_size=4)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_CHAT = (
    "{% for m in messages %}<|user|>{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else "
    "c['text'] }}{% endfor %}{% endfor %}<|assistant|>"
)
GEMMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<start_of_image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "<end_of_turn>\n"
    "{% endfor %}<start_of_turn>model\n"
)
IDEFICS_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}:{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}"
    "<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}Assistant:"
)


def build_tokenizer(special, add_bos=False, **names):
    """A byte-level BPE of about 300 tokens, special ones first; `add_bos` as Llama's and Gemma's do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        ["A cyst in the left kidney, mild. What does the scan show?"] * 3,
        trainers.BpeTrainer(
            vocab_size=290 + len(special),
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    if add_bos:
        bos = names["bos_token"]
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, special.index(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, additional_special_tokens=special, **names)


def save_model(model, folder, end, pad):
    """Weights so large that image, words and positions all count; two or three rows without a token."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = end, pad
    model.save_pretrained(folder)


def build_llava(folder, family="Qwen2", **more):
    """As LLaVA 1.5: its tokenizer begins with <s>, and its chat does not. `family`: of the decoder."""
    import transformers
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        SiglipImageProcessorPil,
        SiglipVisionConfig,
    )

    tokenizer = build_tokenizer(
        ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<image>", "<s>"],
        True,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        bos_token="<s>",
    )
    LlavaProcessor(
        SiglipImageProcessorPil(size={"height": 16, "width": 16}),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="full",
        chat_template=LLAVA_CHAT,
    ).save_pretrained(folder)
    text = getattr(transformers, f"{family}Config")(
        **SIZES,
        num_key_value_heads=1,
        vocab_size=len(tokenizer) + 3,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=5,
        **more,
    )
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=text,
        image_token_index=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=16,
        tie_word_embeddings=True,
    )
    save_model(LlavaForConditionalGeneration(config), folder, 1, 0)


def build_qwen(folder, family):
    """As on the hub: no processor_config.json (saving needs torchvision), and a video processor's file."""
    import transformers

    special = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    tokenizer = build_tokenizer(special, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer.save_pretrained(folder)
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=4, size={"shortest_edge": 64, "longest_edge": 1024}
    )
    images.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "video_preprocessor_config.json").write_text(
        json.dumps({"video_processor_type": "Qwen2VLVideoProcessor"})
    )
    text = dict(
        SIZES,
        num_key_value_heads=1,
        vocab_size=len(tokenizer) + 3,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 3, 3]},
    )
    tower = dict(depth=2, num_heads=2, patch_size=4)
    text, tower = {
        "Qwen2": (
            dict(text, eos_token_id=2, bos_token_id=None),
            dict(tower, embed_dim=32, hidden_size=32, mlp_ratio=2),
        ),
        "Qwen2_5_": (
            dict(text, eos_token_id=2, bos_token_id=None),
            dict(
                tower,
                hidden_size=32,
                intermediate_size=48,
                out_hidden_size=32,
                window_size=16,
                fullatt_block_indexes=[1],
            ),
        ),
        "Qwen3": (
            dict(text, head_dim=16),
            dict(
                tower,
                hidden_size=32,
                intermediate_size=48,
                out_hidden_size=32,
                deepstack_visual_indexes=[0],
                num_position_embeddings=16,
            ),
        ),
        "Qwen3_5": (
            dict(
                text,
                head_dim=16,
                eos_token_id=2,
                layer_types=["linear_attention", "full_attention"],
                linear_key_head_dim=16,
                linear_value_head_dim=16,
                linear_num_key_heads=2,
                linear_num_value_heads=2,
            ),
            dict(tower, hidden_size=32, intermediate_size=48, out_hidden_size=32, num_position_embeddings=16),
        ),
    }[family]
    family += "" if family == "Qwen3_5" else "VL"
    config = getattr(transformers, f"{family}Config")(
        text_config=text,
        vision_config=tower,
        vision_start_token_id=3,
        vision_end_token_id=4,
        image_token_id=5,
        video_token_id=6,
    )
    save_model(getattr(transformers, f"{family}ForConditionalGeneration")(config), folder, [2, 0], 0)


def build_idefics3(folder, family="Idefics3"):
    """SmolVLM is written as on the hub: to make its processor demands num2words, which only a video needs."""
    import transformers

    special = [
        "<|pad|>",
        "<end_of_utterance>",
        "<|im_start|>",
        "<image>",
        "<fake_token_around_image>",
        "<global-img>",
        *(f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)),
    ]
    tokenizer = build_tokenizer(
        special, pad_token="<|pad|>", eos_token="<end_of_utterance>", bos_token="<|im_start|>"
    )
    images = getattr(transformers, f"{family}ImageProcessorPil")(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
    )
    for part in (tokenizer, images):
        part.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(IDEFICS_CHAT)
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": f"{family}Processor", "image_seq_len": 4})
    )
    text = dict(
        SIZES,
        model_type="llama",
        num_key_value_heads=1,
        vocab_size=len(tokenizer) + 3,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=2,
    )
    config = getattr(transformers, f"{family}Config")(
        vision_config=TOWER, text_config=text, image_token_id=3, scale_factor=2
    )
    save_model(getattr(transformers, f"{family}ForConditionalGeneration")(config), folder, 1, 0)


def build_onevision(folder):
    """As LLaVA-OneVision: an image is seen whole and in tiles, so that each has its own number of tokens."""
    import transformers

    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<image>", "<video>"]
    tokenizer = build_tokenizer(special, pad_token="<|pad|>", eos_token="<|end|>")
    grid = [[16, 16], [16, 32], [32, 16]]
    images = transformers.LlavaOnevisionImageProcessorPil(
        size={"height": 16, "width": 16}, image_grid_pinpoints=grid
    )
    for part in (tokenizer, images):
        part.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(LLAVA_CHAT)
    (folder / "processor_config.json").write_text(
        json.dumps(
            {
                "processor_class": "LlavaOnevisionProcessor",
                "num_image_tokens": 16,
                "vision_feature_select_strategy": "full",
            }
        )
    )
    text = transformers.Qwen2Config(
        **SIZES,
        num_key_value_heads=1,
        vocab_size=len(tokenizer) + 3,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=text,
        image_token_index=4,
        video_token_index=5,
        image_grid_pinpoints=grid,
    )
    save_model(transformers.LlavaOnevisionForConditionalGeneration(config), folder, 1, 0)


def build_internvl(folder):
    import transformers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    tokenizer = build_tokenizer(
        special,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    images = transformers.GotOcr2ImageProcessorPil(
        size={"height": 16, "width": 16}, crop_to_patches=True, max_patches=3
    )
    for part in (tokenizer, images):
        part.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(
        CHATML.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>")
    )
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": "InternVLProcessor", "image_seq_length": 4})
    )
    text = transformers.Qwen2Config(
        **SIZES,
        num_key_value_heads=1,
        vocab_size=len(tokenizer) + 3,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=None,
    )
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**TOWER),
        text_config=text,
        image_token_id=5,
        image_seq_length=4,
    )
    save_model(transformers.InternVLForConditionalGeneration(config), folder, 2, 0)


def build_gemma3(folder):
    """Its tokenizer begins with <bos>, and so does its chat; half of its layers see eight tokens back."""
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessorPil,
        Gemma3Processor,
    )

    special = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<start_of_image>",
        "<end_of_image>",
        "<image_soft_token>",
    ]
    tokenizer = build_tokenizer(
        special,
        True,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    )
    Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 16, "width": 16}),
        tokenizer,
        image_seq_length=4,
        chat_template=GEMMA_CHAT,
    ).save_pretrained(folder)
    text = dict(
        SIZES,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        vocab_size=len(tokenizer) + 3,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    tower = dict(TOWER, model_type="siglip_vision_model", vision_use_head=False)
    config = Gemma3Config(
        vision_config=tower,
        text_config=text,
        mm_tokens_per_image=4,
        boi_token_index=6,
        eoi_token_index=7,
        image_token_index=8,
    )
    save_model(Gemma3ForConditionalGeneration(config), folder, [1, 5], 0)


BUILD = {
    "llava": build_llava,
    "idefics3": build_idefics3,
    "gemma3": build_gemma3,
    "smolvlm": lambda folder: build_idefics3(folder, "SmolVLM"),
    "llava_onevision": build_onevision,
    "internvl": build_internvl,
    "qwen2_vl": lambda folder: build_qwen(folder, "Qwen2"),
    "qwen2_5_vl": lambda folder: build_qwen(folder, "Qwen2_5_"),
    "qwen3_vl": lambda folder: build_qwen(folder, "Qwen3"),
}
STOPS = {
    "llava": [1],
    "idefics3": [1],
    "gemma3": [1, 5],
    "smolvlm": [1],
    "llava_onevision": [1],
    "internvl": [2],
    "qwen2_vl": [0, 2],
    "qwen2_5_vl": [0, 2],
    "qwen3_vl": [0, 2],
}
# The token with which a reply ends in the chat: Gemma's tokenizer names another one.
END = {name: 5 if name == "gemma3" else stops[-1] for name, stops in STOPS.items()}


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """architecture → its folder, built when it is first asked for."""
    folders = {}

    def build(name):
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            BUILD[name](folder)
            folders[name] = folder
        return folders[name]

    return build


@pytest.fixture(scope="session", params=list(BUILD))
def architecture(request):
    return request.param


@pytest.fixture(scope="session")
def vlm_(architecture, built):
    """Shared by all tests of an architecture, which leave its weights and gradients as they found them."""
    return loading.load(str(built(architecture)), "cpu")


@pytest.fixture
def llava(built):
    """One to spoil."""
    return loading.load(str(built("llava")), "cpu")


# ---------------------------------------------------------------------------------------------------------
# The plain way, one row at a time and unpadded.


def image(seed, width=16, height=16):
    pixels = torch.randint(
        0, 256, (height * width * 3,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    return Image.frombytes("RGB", (width, height), bytes(pixels.tolist()))


# 16, 48 and 20 patches where the resolution is dynamic
# Those whose decoder has sliding layers.
PLAIN_ROWS = ("gemma3",)
IMAGES = [image(1), image(2, 24, 32), image(3, 40, 8)]
TEXTS = ["What does the scan show?", "Which side is it, left or right? Think first, then answer.", "Hm"]
# two a prompt
ANSWERS = ["left", "a cyst in the kidney", "x", "", "mild.\n", "<answer>right</answer>"]


def plain_prompt(vlm_, image, text):
    """One prompt as the library itself encodes it."""
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
    return dict(
        vlm_.processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    )


def plain_logits(vlm_, image, text, ids):
    """(C+1, V): row c is the distribution of token c, row C that of the token after `ids`.

    A banned token has none.
    """
    inputs = plain_prompt(vlm_, image, text)
    width = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids[None]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for kind in {"token_type_ids", "mm_token_type_ids"} & set(inputs):
        inputs[kind] = torch.nn.functional.pad(inputs[kind], (0, len(ids)))
    logits = vlm_.model(**inputs, use_cache=False).logits[0, width - 1 :]
    return logits.index_fill(1, torch.tensor(vlm_.banned_ids, dtype=torch.long), -torch.inf)


def plain_logps(vlm_, images, texts, ids, mask, temperature=1.0):
    """Log-probs and entropies (N, C) of N continuations, row n of prompt n // (N / B), 0 at padding."""
    logps, entropy = torch.zeros(mask.shape), torch.zeros(mask.shape)
    group = len(ids) // len(images)
    for n, row in enumerate(ids):
        row = row[: mask[n].sum()]
        log_p = (
            plain_logits(vlm_, images[n // group], texts[n // group], row)[:-1] / temperature
        ).log_softmax(-1)
        logps[n, : len(row)] = log_p[range(len(row)), row]
        log_p = log_p[:, log_p[0] > -torch.inf]
        entropy[n, : len(row)] = -(log_p.exp() * log_p).sum(-1)
    return logps, entropy


def encoded(vlm_, group):
    """Three prompts of different lengths and image sizes, `group` answers of different lengths to each."""
    return encoding.encode_prompts(vlm_, IMAGES, TEXTS), *encoding.encode_continuations(
        vlm_, ANSWERS[: 3 * group]
    )


def largest(difference):
    return difference.abs().max().item()


# ---------------------------------------------------------------------------------------------------------
# Token log-probabilities.


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("group", [1, 2])
def test_log_probabilities_and_entropy_are_those_of_plain_rows(vlm_, group, temperature):
    prompts, ids, mask = encoded(vlm_, group)
    assert 0 < prompts["attention_mask"].sum(1).min() < prompts["input_ids"].shape[1] and not mask.all(), (
        "no padding"
    )
    with torch.no_grad():
        logps, entropy = vlm.token_logps(vlm_, prompts, ids, mask, temperature)
        plain, plain_entropy = plain_logps(vlm_, IMAGES, TEXTS, ids, mask, temperature)
    assert largest(logps - plain) < 1e-5 and largest(entropy - plain_entropy) < 1e-5
    assert (logps[mask == 0] == 0).all() and (entropy[mask == 0] == 0).all()


def test_bf16_gives_the_same_to_its_precision_in_fp32_statistics(vlm_, architecture, built):
    half = loading.load(str(built(architecture)), "cpu", torch.bfloat16)
    inputs = encoded(vlm_, 2)
    with torch.no_grad():
        plain = vlm.token_logps(vlm_, *inputs)[0]
        loaded = vlm.token_logps(half, *inputs)[0]
        with torch.autocast("cpu", torch.bfloat16):
            cast = vlm.token_logps(vlm_, *inputs)[0]
    for logps in (loaded, cast):
        assert (
            logps.dtype == torch.float32 and 0 < largest(logps - plain) and (logps - plain).abs().mean() < 0.1
        )
    assert vlm.sample(half, inputs[0], [1, 2, 3], 3)[0].shape == (3, 3)


def test_image_words_their_order_and_the_answer_so_far_all_count(vlm_):
    """Or else the models here could not tell right from wrong."""

    def score(image, text, answer):
        ids, mask = encoding.encode_continuations(vlm_, [answer])
        with torch.no_grad():
            return plain_logps(vlm_, [image], [text], ids, mask)[0][0, -3:]

    base = score(IMAGES[0], "left right", "a cyst")
    for other in (
        score(IMAGES[1], "left right", "a cyst"),
        score(IMAGES[0], "right left", "a cyst"),
        score(IMAGES[0], "left  right", "a cyst"),
        score(IMAGES[0], "left right", "b cyst"),
    ):
        assert largest(base - other) > 1e-2


def test_states_of_a_group_stand_where_states_of_a_single_pass_do(vlm_):
    prompts, ids, mask = encoded(vlm_, 2)
    images, texts = [i for i in IMAGES for _ in range(2)], [t for t in TEXTS for _ in range(2)]
    with torch.no_grad():
        shared = vlm.hidden_states(vlm_, prompts, ids, mask)  # (N, C+1, D)
        single = vlm.hidden_states(vlm_, encoding.encode_prompts(vlm_, images, texts), ids, mask)
    assert shared.shape == single.shape == (6, ids.shape[1] + 1, 32)
    # up to the state after the last token
    for a, b, count in zip(shared, single, mask.sum(1)):
        assert largest(a[: count + 1] - b[: count + 1]) < 1e-4


def test_gradients_through_the_shared_prompt_are_those_of_plain_rows(vlm_):
    prompts, ids, mask = encoded(vlm_, 2)
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    names, parameters = zip(*vlm_.model.named_parameters())

    def gradients(logps, entropy):
        loss = (weights * logps).sum() + 0.3 * entropy.sum()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]

    shared = gradients(*vlm.token_logps(vlm_, prompts, ids, mask))
    plain = gradients(*plain_logps(vlm_, IMAGES, TEXTS, ids, mask))
    size = max(g.norm() for g in plain)
    seen = set()
    for name, a, b in zip(names, shared, plain):
        # a key's bias has none in theory
        if b.norm() > 1e-3 * size:
            seen.add("tower" if "vision" in name or "visual" in name else "decoder")
            assert torch.cosine_similarity(a.flatten(), b.flatten(), 0) >= 1 - 1e-6, name
            assert abs(a.norm() / b.norm() - 1) < 1e-3, name
    assert seen == {"tower", "decoder"}


@pytest.mark.parametrize("size", [1, 2])
def test_a_group_in_parts_has_the_gradient_of_the_whole_and_encodes_each_prompt_once(vlm_, size):
    prompts = encoding.encode_prompts(vlm_, IMAGES, TEXTS)
    # Three for each of the three prompts.
    ids, mask = encoding.encode_continuations(vlm_, [*ANSWERS, "right", "?", "no"])
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    rows_computed = []
    hook = (
        vlm_.model.get_decoder()
        .layers[0]
        .register_forward_pre_hook(
            lambda layer, args, kwargs: rows_computed.append(
                len(args[0] if args else kwargs["hidden_states"])
            ),
            with_kwargs=True,
        )
    )

    def gradients(size):
        vlm_.model.zero_grad()
        seen = []
        for rows, states in vlm.hidden_states_in_parts(vlm_, prompts, ids, mask, size):
            logps = vlm.token_logps(vlm_, prompts, ids[rows], mask[rows], states=states)[0]
            (weights[rows] * logps).sum().backward()
            seen += torch.arange(len(ids))[rows].tolist()
        assert sorted(seen) == list(range(len(ids)))
        return {name: p.grad.clone() for name, p in vlm_.model.named_parameters() if p.grad is not None}

    try:
        whole, before = gradients(None), len(rows_computed)
        parts = gradients(size)
    finally:
        hook.remove()
        vlm_.model.zero_grad()
    B = len(TEXTS)
    assert rows_computed[:before] == [B, 3 * B]
    assert rows_computed[before:] == [B, *([B] * 3 if size == 1 else [2 * B, B])]
    assert whole.keys() == parts.keys()
    largest_norm = max(g.norm() for g in whole.values())
    for name, g in whole.items():
        assert (g - parts[name]).norm() <= 1e-5 * (g.norm() + largest_norm), name


@pytest.mark.parametrize("size", [None, 2, 1])
def test_checkpointed_layers_compute_twice_and_change_no_gradient_of_a_group(vlm_, architecture, size):
    prompts = encoding.encode_prompts(vlm_, IMAGES, TEXTS)
    # Three for each of the three prompts.
    ids, mask = encoding.encode_continuations(vlm_, [*ANSWERS, "right", "?", "no"])
    weights, widths = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)), []
    layer = vlm_.model.get_decoder().layers[0]
    hook = layer.input_layernorm.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))

    def gradients(size):
        vlm_.model.zero_grad()
        widths.clear()
        for rows, states in vlm.hidden_states_in_parts(vlm_, prompts, ids, mask, size):
            logps = vlm.token_logps(vlm_, prompts, ids[rows], mask[rows], states=states)[0]
            (weights[rows] * logps).sum().backward()
        return {name: p.grad.clone() for name, p in vlm_.model.named_parameters() if p.grad is not None}

    try:
        whole = gradients(None)
        with vlm.checkpointing(vlm_):
            checkpointed = gradients(size)
    finally:
        hook.remove()
        vlm_.model.zero_grad()
    assert not vlm_.is_checkpointing and not any(module.training for module in vlm_.model.modules())
    P, C = prompts["input_ids"].shape[1], ids.shape[1]
    parts = {None: 1, 2: 2, 1: 3}[size]
    # The prompt; each part, forward and backward; the prompt's backward at the end.
    # A model with sliding layers has no cache for this: plain rows.
    plain = [P + C] * 2 * parts
    assert widths == (plain if architecture in PLAIN_ROWS else [P, *[C] * 2 * parts, P])
    assert whole.keys() == checkpointed.keys()
    largest_norm = max(g.norm() for g in whole.values())
    for name, g in whole.items():
        assert (g - checkpointed[name]).norm() <= 1e-5 * (g.norm() + largest_norm), name


def test_what_does_not_fit_into_the_context_is_neither_answered_nor_scored(vlm_):
    prompts, ids, mask = encoded(vlm_, 2)
    width, new = prompts["input_ids"].shape[1], ids.shape[1]
    assert vlm_.context == vlm_.model.config.get_text_config().max_position_embeddings > width + new
    fits, short = replace(vlm_, context=width + new), replace(vlm_, context=width + new - 1)
    assert vlm.sample(fits, prompts, range(6), new, group=2)[0].shape[0] == 6
    with torch.no_grad():
        vlm.token_logps(fits, prompts, ids, mask)
    said = f"{width} tokens of prompt and image and {new} of the reply .* context of {width + new - 1}"
    for call in (
        lambda: vlm.sample(short, prompts, range(6), new, group=2),
        lambda: vlm.token_logps(short, prompts, ids, mask),
    ):
        with pytest.raises(RecordError, match=said):
            call()


def test_the_context_of_scaled_positions_is_the_scaled_one():
    from transformers import Qwen2Config

    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 1e4}
    for known, rope, most in ((1024, yarn, 2048), (4096, yarn, 4096), (1024, None, 1024)):
        config = Qwen2Config(**SIZES, max_position_embeddings=known, rope_parameters=rope)
        assert loading.find_context(config) == most
    assert loading.find_context(SimpleNamespace()) is None


def test_records_that_are_too_long_are_refused_or_left_out_and_counted(vlm_, tmp_path, capsys):
    rows = []
    for i, words in enumerate((1, 400, 1, 90)):
        image(i, 16 + 8 * i, 16).save(tmp_path / f"{i}.png")
        rows.append({"image": str(tmp_path / f"{i}.png"), "text": "a cyst " * words})
    tokens = [plain_prompt(vlm_, Image.open(r["image"]), r["text"])["input_ids"].shape[1] for r in rows]
    parts = (lambda r: r["image"]), (lambda r: r["text"]), (lambda r: 5)

    def kept(limit, skip):
        return context.leave_out_too_long(replace(vlm_, context=limit), rows, *parts, skip)

    assert kept(tokens[1] + 5, False) == rows and kept(None, False) == rows
    assert kept(tokens[1] + 4, True) == [rows[0], rows[2], rows[3]]
    assert kept(tokens[3] + 4, True) == [rows[0], rows[2]]
    assert "2 of 4 records are too long" in capsys.readouterr().out
    with pytest.raises(RecordError, match=f"1 of 4 records .* {tokens[1]} tokens .* --on-error skip"):
        kept(tokens[1] + 4, False)
    with pytest.raises(RecordError, match="4 of 4 records"):
        kept(3, True)


@pytest.mark.parametrize("group", [1, 2])
def test_an_answer_of_padding_alone_counts_for_nothing(vlm_, group):
    prompts, ids, mask = encoded(vlm_, group)
    mask[0] = 0
    logps, entropy = vlm.token_logps(vlm_, prompts, ids, mask)
    assert (logps[0] == 0).all() and (entropy[0] == 0).all() and (logps[1] != 0).any()
    assert not any(
        g.isnan().any()
        for g in torch.autograd.grad(logps.sum(), vlm_.model.parameters(), allow_unused=True)
        if g is not None
    )


def test_gradient_checkpointing_changes_no_gradient_of_single_answers(architecture, built):
    vlm_ = loading.load(str(built(architecture)), "cpu")
    prompts, ids, mask = encoded(vlm_, 1)
    passes = []
    vlm_.model.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))

    def gradients():
        vlm_.model.zero_grad()
        vlm.token_logps(vlm_, prompts, ids, mask)[0].sum().backward()
        return {name: p.grad.clone() for name, p in vlm_.model.named_parameters() if p.grad is not None}

    plain = gradients()
    with vlm.checkpointing(vlm_):
        checkpointed = gradients()
    assert len(passes) == 3, "checkpointing computes each layer once more in the backward pass"
    assert plain.keys() == checkpointed.keys()
    assert all(
        largest(plain[name] - checkpointed[name]) <= 1e-4 * (1 + largest(plain[name])) for name in plain
    )


# ---------------------------------------------------------------------------------------------------------
# Encoding.


def test_a_prompt_is_encoded_as_the_library_encodes_it_and_padded_on_the_left(vlm_):
    prompts = encoding.encode_prompts(vlm_, IMAGES, TEXTS)
    for row, mask, image, text in zip(prompts["input_ids"], prompts["attention_mask"], IMAGES, TEXTS):
        plain = plain_prompt(vlm_, image, text)["input_ids"][0]
        assert plain.tolist().count(vlm_.tokenizer.bos_token_id) == (vlm_.tokenizer.bos_token is not None)
        assert mask.tolist() == [0] * (len(mask) - len(plain)) + [1] * len(plain)
        assert row[-len(plain) :].equal(plain)


def test_an_answer_closes_with_a_counted_end_of_turn_and_padding_counts_for_nothing(vlm_, architecture):
    ids, mask = encoding.encode_continuations(vlm_, ANSWERS)
    for row, kept, answer in zip(ids, mask, ANSWERS):
        own = vlm_.tokenizer(answer, add_special_tokens=False)["input_ids"] + [END[architecture]]
        assert row[: len(own)].tolist() == own
        assert kept.tolist() == [1] * len(own) + [0] * (len(row) - len(own))
    assert mask.any(0).all(), "no column of padding alone"
    assert encoding.decode(vlm_, ids, mask) == ANSWERS


def test_without_an_end_only_the_text_is_encoded(vlm_):
    ids, mask = encoding.encode_continuations(vlm_, ["left", "a cyst"], end=False)
    assert vlm_.end_id not in ids[mask.bool()] and encoding.decode(vlm_, ids, mask) == ["left", "a cyst"]


def test_the_name_of_a_special_token_in_an_answer_is_plain_text(vlm_):
    names = "".join(
        vlm_.tokenizer.convert_ids_to_tokens(sorted({*vlm_.stop_ids, *vlm_.banned_ids} & set(range(12))))
    )
    ids, mask = encoding.encode_continuations(vlm_, [f"see {names}"], end=False)
    assert not set(ids[0].tolist()) & {*vlm_.banned_ids, *vlm_.stop_ids}
    assert encoding.decode(vlm_, ids, mask) == [f"see {names}"]
    # special tokens are special again
    test_a_prompt_is_encoded_as_the_library_encodes_it_and_padded_on_the_left(vlm_)


def test_the_name_of_a_special_token_in_a_prompt_is_plain_text(vlm_):
    names = vlm_.tokenizer.convert_ids_to_tokens(sorted({*vlm_.stop_ids, *vlm_.banned_ids} & set(range(12))))
    text = f"see {''.join(names)} {names[-1][:3]}{names[0]}{names[-1][3:]} {{{{ 7*7 }}}} {{% for x in y %}}"
    special = torch.tensor(vlm_.tokenizer.convert_tokens_to_ids(names))
    prompts, plain = (encoding.encode_prompts(vlm_, IMAGES[:1], [t]) for t in (text, "see"))
    found, expected = (p["input_ids"][torch.isin(p["input_ids"], special)] for p in (prompts, plain))
    assert len(names) >= 5 and found.equal(expected), "the template's own special tokens and no other"
    said = vlm_.tokenizer.decode(prompts["input_ids"][0])
    assert "{{ 7*7 }} {% for x in y %}" in said and all(f"{n[0]} {n[1:]}" in said for n in names)
    vlm.prefill(vlm_, prompts)


def test_of_images_smolvlm_s_own_processor_makes_what_is_made_in_its_place(built, monkeypatch):
    import transformers
    from transformers.models.smolvlm import processing_smolvlm

    folder = built("smolvlm")
    ours = loading.load_processor(str(folder))
    # what it asks for
    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    monkeypatch.setattr(
        transformers.SmolVLMProcessor,
        "get_attributes",
        classmethod(lambda _: ["image_processor", "tokenizer"]),
    )
    own = transformers.SmolVLMProcessor(ours.image_processor, ours.tokenizer, None, image_seq_len=4)
    chats = [f"<|im_start|>user:<image>{text}<end_of_utterance>\nAssistant:" for text in TEXTS]
    made, expected = (
        p(text=chats, images=[[i] for i in IMAGES], padding=True, padding_side="left", return_tensors="pt")
        for p in (ours, own)
    )
    assert (
        made.keys() == expected.keys()
        and all(made[k].equal(expected[k]) for k in made)
        and made["pixel_values"].shape[1] > 1
    )


# ---------------------------------------------------------------------------------------------------------
# Prompts about one image.


# The second image is asked about three times, in between the others.
ABOUT = [1, 0, 1, 2, 1]
QUESTIONS = ["What does the scan show?", "Hm", "Which side is it, left or right?", "Why?", "Is there a cyst?"]
REPLIES = ["left", "a cyst in the kidney", "x", "mild.\n", "<answer>right</answer>"]


def by_image(vlm_, group=1):
    """The questions as Inputs that share images, ids and mask of the replies, and their images."""
    if not vlm_.shares_images:
        pytest.skip("has sliding layers: nothing is shared")
    inputs = encoding.encode_by_image(vlm_, [IMAGES[i] for i in ABOUT], QUESTIONS)
    replies = [reply for reply in REPLIES for _ in range(group)]
    return inputs, *encoding.encode_continuations(vlm_, replies), [IMAGES[i] for i in ABOUT]


@pytest.fixture
def tokens_computed(vlm_):
    """The decoder's passes: (rows, tokens) each."""
    passes = []
    hook = (
        vlm_.model.get_decoder()
        .layers[0]
        .input_layernorm.register_forward_pre_hook(lambda _, args: passes.append(tuple(args[0].shape[:2])))
    )
    yield passes
    hook.remove()


@pytest.mark.parametrize("group", [1, 2])
def test_questions_about_one_image_have_the_log_probabilities_of_plain_rows(vlm_, tokens_computed, group):
    inputs, ids, mask, images = by_image(vlm_, group)
    with torch.no_grad():
        logps, entropy = vlm.token_logps(vlm_, inputs, ids, mask)
        computed = list(tokens_computed)
        plain = plain_logps(vlm_, images, QUESTIONS, ids, mask)
    assert largest(logps - plain[0]) < 1e-4 and largest(entropy - plain[1]) < 1e-4
    # What precedes the questions once per image, then each question once, then each reply.
    P, S, C = inputs["input_ids"].shape[1], inputs.questions.ids.shape[1], ids.shape[1]
    assert computed == ([(3, P), (5, S + C)] if group == 1 else [(3, P), (5, S), (10, C)])
    assert (inputs["input_ids"] == vlm_.model.config.image_token_id).any(1).all()
    assert not (inputs.questions.ids == vlm_.model.config.image_token_id).any()


@pytest.mark.parametrize("shares", ["images", "prompts", "nothing"])
def test_prompts_may_have_different_numbers_of_continuations(vlm_, shares):
    owner, asked = [0, 2, 2, 4, 4, 4], ([IMAGES[i] for i in ABOUT], QUESTIONS)
    able = replace(vlm_, prefix_sharing="never") if shares == "nothing" else vlm_
    inputs = by_image(vlm_)[0] if shares == "images" else encoding.encode_prompts(able, *asked)
    ids, mask = encoding.encode_continuations(vlm_, ANSWERS)
    with torch.no_grad():
        states = vlm.hidden_states(able, inputs, ids, mask, owner)
        logps, entropy = vlm.token_logps(able, inputs, ids, mask, states=states)
        own = [[part[b] for b in owner] for part in asked]
        plain = plain_logps(vlm_, *own, ids, mask)
    assert largest(logps - plain[0]) < 1e-4 and largest(entropy - plain[1]) < 1e-4


def test_questions_about_one_image_are_answered_as_if_asked_alone(vlm_):
    inputs, *_, images = by_image(vlm_)
    for settings in ({"seeds": [3, 1, 4, 1, 5]}, {"seeds": None, "temperature": 0}):
        together = kept(*vlm.sample(vlm_, inputs, max_new_tokens=12, **settings))
        for row, (picture, text) in enumerate(zip(images, QUESTIONS)):
            own = settings | {"seeds": settings["seeds"] and [settings["seeds"][row]]}
            alone = encoding.encode_prompts(vlm_, [picture], [text])
            assert kept(*vlm.sample(vlm_, alone, max_new_tokens=12, **own)) == [together[row]]


def take_gradient(vlm_):
    found = {name: p.grad for name, p in vlm_.model.named_parameters() if p.grad is not None}
    vlm_.model.zero_grad()
    return found


def gradient_by_rows(vlm_, inputs, ids, mask, weights, checkpointing):
    """Of the replies' weighted log-probabilities, as sft.py computes it."""
    vlm_.model.zero_grad()
    joined, index, targets = encoding.append_replies(inputs, ids, mask)
    assert targets.tolist() == ids[mask.bool()].tolist()
    with vlm.checkpointing(vlm_, checkpointing):
        for states in vlm.row_states(vlm_, joined):
            rows, weight, options = vlm.lm_head(vlm_, states.flatten(0, 1)[index])
            logps, _ = linear_logprob(rows, weight, targets, **options)
            (weights[mask.bool()] * logps).sum().backward()
    return take_gradient(vlm_)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_of_questions_about_one_image_is_that_of_plain_rows(
    vlm_, checkpointing, tokens_computed
):
    inputs, ids, mask, images = by_image(vlm_)
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))

    shared = gradient_by_rows(vlm_, inputs, ids, mask, weights, checkpointing)
    computed = list(tokens_computed)
    (weights * plain_logps(vlm_, images, QUESTIONS, ids, mask)[0]).sum().backward()
    plain = take_gradient(vlm_)
    # As wide as the longest question with its reply.
    P, width = inputs["input_ids"].shape[1], int((inputs.questions.mask.sum(1) + mask.sum(1)).max())
    assert width < inputs.questions.ids.shape[1] + ids.shape[1]
    assert computed == [(3, P), (5, width), *[(5, width), (3, P)] * checkpointing]
    assert shared.keys() == plain.keys()
    largest_norm = max(g.norm() for g in plain.values())
    for name, g in plain.items():
        assert (g - shared[name]).norm() <= 1e-5 * (g.norm() + largest_norm), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_with_replies_have_no_padding_but_that_to_the_longest_and_the_gradient_of_plain_rows(
    vlm_, checkpointing, tokens_computed
):
    inputs = encoding.encode_prompts(vlm_, IMAGES, TEXTS)
    # The longest prompt has not the longest reply.
    ids, mask = encoding.encode_continuations(vlm_, ["a cyst in the kidney", "x", "left"])
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))

    found = gradient_by_rows(vlm_, inputs, ids, mask, weights, checkpointing)
    computed = list(tokens_computed)
    (weights * plain_logps(vlm_, IMAGES, TEXTS, ids, mask)[0]).sum().backward()
    plain = take_gradient(vlm_)
    longest = int((inputs["attention_mask"].sum(1) + mask.sum(1)).max())
    assert longest < inputs["input_ids"].shape[1] + ids.shape[1]
    assert computed == [(3, longest)] * (1 + checkpointing) and found.keys() == plain.keys()
    largest_norm = max(g.norm() for g in plain.values())
    for name, g in plain.items():
        assert (g - found[name]).norm() <= 1e-5 * (g.norm() + largest_norm), name


def test_only_the_same_image_object_is_shared_and_only_if_the_model_can(vlm_, architecture):
    assert vlm_.shares_images == (architecture not in PLAIN_ROWS)
    different = [image.copy() for image in (IMAGES[0], IMAGES[0], IMAGES[1])]
    assert encoding.encode_by_image(vlm_, different, TEXTS).questions is None
    always = encoding.encode_by_image(vlm_, different, TEXTS, always=True)
    assert len(always["input_ids"]) == 3 and bool(always.questions) == vlm_.shares_images
    cannot = replace(vlm_, shares_images=False)
    plain = encoding.encode_by_image(cannot, [IMAGES[0]] * 3, TEXTS, always=True)
    assert plain.questions is None and len(plain["input_ids"]) == 3


def test_a_model_whose_shared_images_give_other_states_shares_none(vlm_, architecture, monkeypatch):
    if architecture in PLAIN_ROWS:
        pytest.skip("has sliding layers: nothing is shared")
    assert loading.can_share_images(vlm_)
    branch = vlm.Prefix.branch
    # Each question gets the other image.
    monkeypatch.setattr(vlm.Prefix, "branch", lambda prefix, images: branch(prefix, 1 - images))
    assert not loading.can_share_images(vlm_)
    monkeypatch.undo()
    # The first token of a question (Qwen's image ends with a token of its own) is taken for the image's.
    count = encoding.count_common_end
    monkeypatch.setattr(encoding, "count_common_end", lambda *args: count(*args) - 2)
    assert not loading.can_share_images(vlm_)


def test_questions_are_not_learned_in_parts(vlm_):
    inputs, ids, mask, _ = by_image(vlm_, 2)
    with pytest.raises(ValueError, match="learned from by row_states"):
        next(vlm.hidden_states_in_parts(vlm_, inputs, ids, mask))


def test_questions_that_do_not_fit_into_the_context_are_refused_by_their_own_length(vlm_):
    inputs, ids, mask, images = by_image(vlm_)
    longest = max(
        plain_prompt(vlm_, picture, text)["input_ids"].shape[1] for picture, text in zip(images, QUESTIONS)
    )
    new = ids.shape[1]
    with torch.no_grad():
        vlm.hidden_states(replace(vlm_, context=longest + new), inputs, ids, mask)
        with pytest.raises(
            RecordError, match=f"^{longest} tokens of prompt and image and {new} of the reply"
        ):
            vlm.hidden_states(replace(vlm_, context=longest + new - 1), inputs, ids, mask)


# ---------------------------------------------------------------------------------------------------------
# Sampling.


def kept(ids, mask, truncated=None):
    return [row[m.bool()].tolist() for row, m in zip(ids, mask)]


def test_a_continuation_is_truncated_unless_its_last_token_ends_the_turn(vlm_, group=8):
    prompts = encoding.encode_prompts(vlm_, IMAGES, TEXTS)
    some = replace(vlm_, stop_ids=list(range(0, vlm_.head.weight.shape[0], 3)), banned_ids=[])
    ids, mask, truncated = vlm.sample(some, prompts, range(3 * group), 2, group=group)
    last = [row[m.bool()][-1].item() for row, m in zip(ids, mask)]
    assert truncated.tolist() == [token % 3 != 0 for token in last] and 0 < truncated.sum() < len(last)


@pytest.mark.parametrize("ends", [False, True])
def test_greedy_sampling_is_generate_token_for_token(vlm_, ends):
    prompts = encoding.encode_prompts(vlm_, IMAGES, TEXTS)
    # what the first row says third now ends a turn
    if ends:
        ids, _, _ = vlm.sample(vlm_, prompts, None, 3, temperature=0)
        vlm_ = replace(vlm_, stop_ids=[*vlm_.stop_ids, ids[0, 2].item()])
    ids, mask, _ = vlm.sample(vlm_, prompts, None, 9, temperature=0)
    plain = vlm_.model.generate(
        **prompts,
        do_sample=False,
        max_new_tokens=9,
        suppress_tokens=vlm_.banned_ids,
        eos_token_id=vlm_.stop_ids,
        pad_token_id=0,
    )[:, prompts["input_ids"].shape[1] :]
    assert (ids * mask).equal(plain * mask) and ids.shape == plain.shape
    assert len({tuple(row) for row in kept(ids, mask)}) == 3 and len(set(ids.flatten().tolist())) > 5, (
        "models that babble"
    )
    assert not ends or mask[0].sum() <= 3 < mask.shape[1], "the first row ends before another"


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_sampled_token_is_the_inverse_cdf_of_the_plain_models_distribution(vlm_, temperature):
    seeds = [3, 1, 4, 1, 5, 9]
    ids, mask, _ = vlm.sample(
        vlm_, encoding.encode_prompts(vlm_, IMAGES, TEXTS), seeds, 5, temperature, group=2
    )
    assert ids.shape[0] == 6
    # row b * group + g continues prompt b
    for n, row in enumerate(kept(ids, mask)):
        uniform = torch.rand(5, generator=torch.Generator().manual_seed(seeds[n]))
        with torch.no_grad():
            logits = plain_logits(vlm_, IMAGES[n // 2], TEXTS[n // 2], torch.tensor(row))[:-1] / temperature
        cdf = logits.double().softmax(-1).cumsum(-1)
        assert row == torch.searchsorted(cdf, uniform[: len(row), None].double(), right=True)[:, 0].tolist()


def test_a_row_depends_neither_on_the_rows_beside_it_nor_on_their_order(vlm_):
    seeds = [11, 12, 13]
    together = kept(*vlm.sample(vlm_, encoding.encode_prompts(vlm_, IMAGES, TEXTS), seeds, 12))
    backwards = kept(
        *vlm.sample(vlm_, encoding.encode_prompts(vlm_, IMAGES[::-1], TEXTS[::-1]), seeds[::-1], 12)
    )
    alone = [
        kept(*vlm.sample(vlm_, encoding.encode_prompts(vlm_, [i], [t]), [s], 12))[0]
        for i, t, s in zip(IMAGES, TEXTS, seeds)
    ]
    other = kept(*vlm.sample(vlm_, encoding.encode_prompts(vlm_, IMAGES, TEXTS), [21, 22, 23], 12))
    assert together == backwards[::-1] == alone != other


def test_a_longer_limit_only_goes_on(vlm_):
    prompts = encoding.encode_prompts(vlm_, IMAGES, TEXTS)
    short, long = (kept(*vlm.sample(vlm_, prompts, [1, 2, 3], limit)) for limit in (4, 20))
    assert short == [row[:4] for row in long]


def push(vlm_, bonus):
    """Add bonus(call) (N or 1, V) to the head's logits at its first, second, ... call."""
    calls = iter(range(1000))
    return vlm_.head.register_forward_hook(lambda _, __, logits: logits + bonus(next(calls)))


def test_banned_tokens_are_never_sampled_however_likely(vlm_):
    prompts = encoding.encode_prompts(vlm_, IMAGES, TEXTS)
    bonus = torch.zeros(1, vlm_.head.weight.shape[0])
    bonus[0, vlm_.banned_ids] = 1e4
    hook = push(vlm_, lambda call: bonus)
    try:
        for temperature in (0, 1.0):
            ids, _, _ = vlm.sample(vlm_, prompts, range(6), 6, temperature, group=2)
            assert not set(ids.flatten().tolist()) & (set(vlm_.banned_ids) - {vlm_.tokenizer.pad_token_id})
            unbanned, _, _ = vlm.sample(
                replace(vlm_, banned_ids=[]), prompts, range(6), 1, temperature, group=2
            )
            assert set(unbanned.flatten().tolist()) <= set(vlm_.banned_ids), (
                "the push is too weak to test anything"
            )
    finally:
        hook.remove()


def test_each_stop_token_ends_its_row_and_no_other(vlm_):
    prompts = encoding.encode_prompts(vlm_, IMAGES, TEXTS)
    rows = vlm_.head.weight.shape[0]
    for stop in vlm_.stop_ids:

        def bonus(call):
            bonus = torch.zeros(3, rows)
            bonus[:, vlm_.stop_ids] = -1e4
            if call == 2:
                bonus[1, stop] = 1e5
            return bonus

        hook = push(vlm_, bonus)
        try:
            ids, mask, _ = vlm.sample(vlm_, prompts, [7, 8, 9], 6)
        finally:
            hook.remove()
        assert mask.tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0], [1] * 6]
        assert ids[1, 2] == stop and (ids[1, 3:] == vlm_.tokenizer.pad_token_id).all()
        assert not set(ids[[0, 2]].flatten().tolist()) & set(vlm_.stop_ids)
        texts = encoding.decode(vlm_, ids, mask)
        assert texts[1] == vlm_.tokenizer.decode(ids[1, :2]), "the stop is no part of the text"


def test_sampling_stops_when_every_row_has_ended(vlm_):
    bonus = torch.zeros(1, vlm_.head.weight.shape[0])
    bonus[0, vlm_.end_id] = 1e4
    hook = push(vlm_, lambda call: bonus if call else 0 * bonus)
    try:
        ids, mask, _ = vlm.sample(vlm_, encoding.encode_prompts(vlm_, IMAGES, TEXTS), None, 50, temperature=0)
    finally:
        hook.remove()
    assert ids.shape == (3, 2) and mask.all() and (ids[:, 1] == vlm_.end_id).all()


def test_pick_follows_the_distribution():
    logits = torch.randn(60, generator=torch.Generator().manual_seed(0)) * 2
    logits[[0, 7, 8, 59]] = -torch.inf
    count = 20_000
    # of evenly spread numbers each token gets its share but for one or two
    uniform = (torch.arange(count) + 0.5) / count
    for temperature in (1.0, 0.6):
        share = (
            vlm.sample_token(logits.expand(count, -1), temperature, uniform).bincount(minlength=60) / count
        )
        assert largest(share - (logits / temperature).softmax(-1)) < 2 / count


def test_sample_token_never_returns_a_token_of_probability_zero_at_either_end_of_the_uniform():
    logits = torch.zeros(4, 151_936)
    logits[:, :1000] = logits[:, -1000:] = -torch.inf
    ends = torch.tensor([0.0, 1e-30, 1 - 2**-24, 0.5])
    assert vlm.sample_token(logits, 1.0, ends).tolist()[:3] == [1000, 1000, 151_936 - 1001]
    logits[:, 75_000] = 1e4
    assert vlm.sample_token(logits, 1.0, ends).tolist() == [75_000] * 4


def test_sample_token_at_temperature_zero_is_the_largest_logit_whatever_the_uniform():
    logits = torch.tensor([[0.0, 3.0, 2.9], [5.0, -1.0, 4.9]])
    for uniform in (0.0, 0.999):
        assert vlm.sample_token(logits, 0, torch.full((2,), uniform)).tolist() == [1, 0]


# ---------------------------------------------------------------------------------------------------------
# Architectures with recurrent layers, of which some cannot continue a prompt.

MAMBA = dict(mamba_d_state=8, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_chunk_size=8)
# how to build it, what it can, and what the line at loading says
RECURRENT = {
    "lfm2": (
        lambda folder: build_llava(folder, "Lfm2", layer_types=["conv", "full_attention"]),
        "always",
        "",
    ),
    "qwen3_5": (
        lambda folder: build_qwen(folder, "Qwen3_5"),
        "without gradient",
        "cannot train through a prefilled prompt",
    ),
    "bamba": (
        lambda folder: build_llava(folder, "Bamba", attn_layer_indices=[1], **MAMBA),
        "never",
        "cannot continue a prefilled prompt",
    ),
    "jamba": (
        lambda folder: build_llava(
            folder,
            "Jamba",
            attn_layer_period=2,
            attn_layer_offset=1,
            use_mamba_kernels=False,
            num_experts=1,
            mamba_d_state=8,
        ),
        "never",
        "cannot continue a prefilled prompt",
    ),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_parts_of_a_group_leave_the_gradient_of_the_whole_with_recurrent_layers_too(name, tmp_path):
    RECURRENT[name][0](tmp_path)
    vlm_ = loading.load(str(tmp_path), "cpu")
    prompts, ids, mask = encoded(vlm_, 2)
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))

    def gradients(size):
        vlm_.model.zero_grad()
        for rows, states in vlm.hidden_states_in_parts(vlm_, prompts, ids, mask, size):
            logps = vlm.token_logps(vlm_, prompts, ids[rows], mask[rows], states=states)[0]
            (weights[rows] * logps).sum().backward()
        return torch.cat([p.grad.flatten() for p in vlm_.model.parameters() if p.grad is not None])

    whole, parts = gradients(None), gradients(1)
    assert whole.norm() > 0 and (whole - parts).norm() <= 1e-4 * whole.norm()


@pytest.mark.parametrize("name", RECURRENT)
def test_an_architecture_that_cannot_share_its_prefix_falls_back_to_plain_rows_and_says_so_once(
    name, tmp_path, capsys
):
    build, shares, line = RECURRENT[name]
    build(tmp_path)
    vlm_ = loading.load(str(tmp_path), "cpu")
    said = capsys.readouterr().out
    assert (
        vlm_.prefix_sharing == shares
        and said.count("\n") == bool(line)
        and line in said
        and (not line or str(tmp_path) in said)
    )
    passes = []
    hook = vlm_.model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: passes.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    inputs = encoded(vlm_, 2)
    with torch.no_grad():
        vlm.token_logps(vlm_, *inputs)
    assert [rows for rows, _ in passes] == ([6] if shares == "never" else [3, 6]), "rows of each pass"
    hook.remove()
    test_log_probabilities_and_entropy_are_those_of_plain_rows(vlm_, 2, 0.7)
    test_gradients_through_the_shared_prompt_are_those_of_plain_rows(vlm_)
    for ends in (False, True):
        test_greedy_sampling_is_generate_token_for_token(vlm_, ends)
    test_a_sampled_token_is_the_inverse_cdf_of_the_plain_models_distribution(vlm_, 1.0)
    loading.freeze_images(vlm_)
    test_prompts_that_were_looked_at_are_encoded_as_a_batch_and_may_stand_in_any_order_and_number(
        (vlm_, None)
    )
    assert vlm_.reuses_features and capsys.readouterr().out == ""


def test_a_model_that_reads_no_plain_row_of_prompt_and_answer_is_refused(built, monkeypatch):
    from transformers import LlavaModel

    real = LlavaModel.forward

    # as one whose image inputs are as wide as the prompt
    def forward(self, *args, attention_mask=None, **kwargs):
        assert kwargs["pixel_values"] is None or attention_mask.shape[1] == width, (
            "cross attention of another width"
        )
        return real(self, *args, attention_mask=attention_mask, **kwargs)

    width = plain_prompt(loading.load(str(built("llava")), "cpu"), image(1), "?")["input_ids"].shape[1]
    monkeypatch.setattr(LlavaModel, "forward", forward)
    with pytest.raises(
        ModelError, match="does not fit the model: cross attention of another width"
    ) as refused:
        loading.load(str(built("llava")), "cpu")
    assert "\n" not in str(refused.value)


def test_loading_holds_no_activations_of_an_image_for_a_backward_pass(architecture, built, monkeypatch):
    """A large model's, over hundreds of image tokens, would not fit: gradients are tried on a few words."""
    widths, real = [], vlm.prefill

    def read(vlm_, prompts, group=1):
        widths.append((torch.is_grad_enabled(), prompts["input_ids"].shape[1]))
        return real(vlm_, prompts, group)

    monkeypatch.setattr(vlm, "prefill", read)
    vlm_ = loading.load(str(built(architecture)), "cpu")
    words = max(len(vlm_.tokenizer(t)["input_ids"]) for t in ("?", "Which side?"))
    assert [w for grad, w in widths if grad] == [words] and all(w > words for grad, w in widths if not grad)


def test_a_model_that_continues_wrongly_or_not_at_all_is_found_out(vlm_, monkeypatch):
    assert loading.find_prefix_sharing(vlm_) == "always"
    real = vlm.decode_step

    def forgets(*args):
        return real(*args) * 1.01

    def detaches(*args):
        return real(*args).detach().requires_grad_()

    def raises(*args):
        raise NotImplementedError

    for wrong, found in ((forgets, "never"), (raises, "never"), (detaches, "without gradient")):
        monkeypatch.setattr(vlm, "decode_step", wrong)
        assert loading.find_prefix_sharing(vlm_) == found
        assert vlm_.prefix_sharing == "always" and not any(
            p.grad is not None for p in vlm_.model.parameters()
        )


# ---------------------------------------------------------------------------------------------------------
# Rows that have ended.


@pytest.mark.parametrize("greedy", [True, False])
def test_rows_that_have_ended_leave_the_batch_and_no_row_changes(vlm_, greedy, monkeypatch):
    images, texts, seeds, lengths = (
        [*IMAGES, *IMAGES[::-1]],
        [*TEXTS, *TEXTS],
        list(range(6)),
        torch.tensor([1, 4, 12, 3, 7, 2]),
    )
    real, widths = vlm.sample_token, []
    uniforms = torch.stack([torch.rand(20, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def ends(logits, temperature, uniform):
        """A row, told by its uniform number, ends after its `lengths` tokens and not before."""
        row = (uniforms[:, len(widths)] == uniform[:, None]).nonzero()[:, 1]  # (n,)
        widths.append(len(row))
        logits[:, vlm_.stop_ids] = -torch.inf
        return torch.where(
            len(widths) >= lengths[row], vlm_.end_id, real(logits, 0 if greedy else 1.0, uniform)
        )

    monkeypatch.setattr(vlm, "sample_token", ends)
    ids, mask, _ = vlm.sample(vlm_, encoding.encode_prompts(vlm_, images, texts), seeds, 20)
    assert (
        widths == [6, 6, 6, 3, 3, 3, 3, 1, 1, 1, 1, 1]
        and mask.sum(1).equal(lengths)
        and ids.shape == mask.shape == (6, 12)
    )
    assert (ids[mask == 0] == vlm_.tokenizer.pad_token_id).all()
    # a row alone leaves nothing
    for n, row in enumerate(kept(ids, mask)):
        widths.clear()
        assert [row] == kept(
            *vlm.sample(vlm_, encoding.encode_prompts(vlm_, [images[n]], [texts[n]]), [seeds[n]], 20)
        )


# ---------------------------------------------------------------------------------------------------------
# No trace of one call in another.


def test_sampling_and_scoring_leave_their_inputs_as_they_were(vlm_):
    for group in (1, 2):
        inputs = prompts, ids, mask = encoded(vlm_, group)
        before, seeds = copy.deepcopy(inputs), list(range(3 * group))
        with torch.no_grad():
            states = vlm.hidden_states(vlm_, prompts, ids, mask)
            copied = states.clone()
            vlm.token_logps(vlm_, prompts, ids, mask, 0.7)
            vlm.token_logps(vlm_, prompts, ids, mask, 0.7, states=states)
        vlm.sample(vlm_, prompts, seeds, 3, group=group)
        encoding.decode(vlm_, ids, mask)
        assert prompts.keys() == before[0].keys() and all(prompts[k].equal(before[0][k]) for k in prompts)
        assert (
            ids.equal(before[1])
            and mask.equal(before[2])
            and states.equal(copied)
            and seeds == list(range(3 * group))
        )


def test_nothing_of_a_former_batch_leaks_into_the_next(architecture, built):
    """Qwen's models keep the positions of the last batch that they read (`rope_deltas`)."""
    vlm_ = loading.load(str(built(architecture)), "cpu")
    prompts, ids, mask = encoded(vlm_, 2)
    single = encoding.encode_prompts(vlm_, IMAGES, TEXTS), ids[::2], mask[::2]
    other = encoding.encode_prompts(
        vlm_, [image(5, 80, 16), image(6, 8, 8)], ["What?", "Is there a cyst, and where is it?"]
    )

    @torch.no_grad()
    def results(read_before):
        read_before()
        shared = vlm.token_logps(vlm_, prompts, ids, mask)[0]
        read_before()
        alone = vlm.token_logps(vlm_, *single)[0]
        read_before()
        return shared, alone, vlm.sample(vlm_, prompts, range(6), 6, group=2)[0]

    fresh = results(lambda: None)
    for read_before in (
        lambda: vlm.sample(vlm_, other, [1, 2], 3),
        lambda: vlm_.model.generate(**other, max_new_tokens=2),
    ):
        assert all(a.equal(b) for a, b in zip(fresh, results(read_before)))


def test_a_prefix_keeps_its_own_positions_while_another_prompt_is_prefilled(vlm_):
    prompts, ids, mask = encoded(vlm_, 2)
    with torch.no_grad():
        expected = vlm.hidden_states(vlm_, prompts, ids, mask)[:, 1:]
        prefix, _ = vlm.prefill(vlm_, prompts, 2)
        vlm.prefill(vlm_, encoding.encode_prompts(vlm_, [image(5, 80, 16)] * 3, TEXTS), 2)
        states = vlm.decode_step(vlm_, prefix, ids, mask)
    assert states.equal(expected)


def test_a_prefix_with_reserved_space_writes_in_place_and_gives_the_states_of_a_cache_that_copies(vlm_):
    prompts, ids, mask = encoded(vlm_, 2)
    seen = {}
    with torch.no_grad():
        for reserved in (False, True):
            prefix, _ = vlm.prefill(vlm_, prompts, 2)
            full = [
                i for i, layer in enumerate(prefix.cache.layers) if type(layer).__name__ == "DynamicLayer"
            ]
            if reserved:
                prefix.reserve(ids.shape[1])
            states, places = [], []
            for c in range(ids.shape[1]):
                states.append(vlm.decode_step(vlm_, prefix, ids[:, c : c + 1], mask[:, c : c + 1]))
                places.append([prefix.cache.layers[i].keys.data_ptr() for i in full])
            assert (all(p == places[0] for p in places)) == reserved and places[0], "addresses of the keys"
            seen[reserved] = torch.cat(states, 1)
    assert seen[True].equal(seen[False])


def test_a_prompt_without_an_image_is_encoded_alike_before_and_after_one_with(vlm_):
    text = vlm_.tokenizer(
        ["What does the scan show?", "Hm"], padding=True, padding_side="left", return_tensors="pt"
    )
    text = encoding.Inputs({k: text[k] for k in ("input_ids", "attention_mask")}, [])
    ids, mask = encoding.encode_continuations(vlm_, ANSWERS[:4])
    with torch.no_grad():
        vlm.sample(vlm_, encoding.encode_prompts(vlm_, IMAGES[1:], TEXTS[1:]), [1, 2], 2)
        logps, _ = vlm.token_logps(vlm_, text, ids, mask)
        for n in range(4):
            prompt = text["input_ids"][n // 2][text["attention_mask"][n // 2].bool()]
            row = ids[n][mask[n].bool()]
            logits = vlm_.model(torch.cat([prompt, row])[None]).logits[0, len(prompt) - 1 : -1]
            logits[:, vlm_.banned_ids] = -torch.inf
            log_p = logits.log_softmax(-1)
            assert largest(log_p[range(len(row)), row] - logps[n, : len(row)]) < 1e-5


# ---------------------------------------------------------------------------------------------------------
# Kept features.


@pytest.fixture
def keeping(architecture, built):
    """A model whose images are frozen, and a list that each pass of its vision tower adds to."""
    vlm_, read = loading.load(str(built(architecture)), "cpu"), []
    loading.freeze_images(vlm_)
    base, prefix = vlm_.model.base_model, FROZEN[architecture][0].split(".")[1]
    getattr(base, prefix).register_forward_pre_hook(lambda *_, **__: read.append(1))
    return vlm_, read


def looked_at(vlm_, images=IMAGES, texts=TEXTS):
    return encoding.encode_images(vlm_, encoding.preprocess(vlm_, images, texts))


@pytest.mark.parametrize("group", [1, 2])
def test_a_prompt_that_was_looked_at_gives_the_log_probabilities_and_gradients_of_plain_rows(keeping, group):
    vlm_, read = keeping
    assert vlm_.reuses_features
    prompts = encoding.collate_prompts(vlm_, looked_at(vlm_))
    assert len(read) == 1
    ids, mask = encoding.encode_continuations(vlm_, ANSWERS[: 3 * group])
    sampled = vlm.sample(vlm_, prompts, range(3 * group), 6, group=group)
    logps, entropy = vlm.token_logps(vlm_, prompts, ids, mask, 0.7)
    learning = [p for p in vlm_.model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(logps.sum(), learning, allow_unused=True)
    assert len(read) == 1, "no image is read again"
    same = vlm.sample(vlm_, encoding.encode_prompts(vlm_, IMAGES, TEXTS), range(3 * group), 6, group=group)
    assert kept(*sampled) == kept(*same)
    want, spread = plain_logps(vlm_, IMAGES, TEXTS, ids, mask, 0.7)
    wanted = torch.autograd.grad(want.sum(), learning, allow_unused=True)
    assert largest(logps - want) < 1e-5 and largest(entropy - spread) < 1e-5

    def flat(grads):
        return torch.cat([g.flatten() for g in grads if g is not None]).double()

    assert torch.nn.functional.cosine_similarity(flat(grads), flat(wanted), dim=0) > 1 - 1e-6


def test_prompts_that_were_looked_at_are_encoded_as_a_batch_and_may_stand_in_any_order_and_number(keeping):
    vlm_, _ = keeping
    looked = looked_at(vlm_)
    for order in ([0, 1, 2], [2, 0], [1], [2, 2, 1]):
        prompts = encoding.collate_prompts(vlm_, [looked[k] for k in order])
        plain = encoding.encode_prompts(vlm_, [IMAGES[k] for k in order], [TEXTS[k] for k in order])
        assert prompts.keys() - {"mm_encoder_outputs"} == {k for k in plain if not k.startswith("pixel_")}
        assert all(prompts[k].equal(plain[k]) for k in prompts.keys() - {"mm_encoder_outputs"})
        inputs = encoding.encode_continuations(vlm_, ANSWERS[: len(order)])
        with torch.no_grad():
            assert (
                largest(vlm.token_logps(vlm_, prompts, *inputs)[0] - vlm.token_logps(vlm_, plain, *inputs)[0])
                < 1e-5
            )
            doubled = vlm.token_logps(
                vlm_, encoding.repeat_prompts(vlm_, prompts, 2), *(x.repeat_interleave(2, 0) for x in inputs)
            )[0]
            assert largest(doubled[1::2] - vlm.token_logps(vlm_, plain, *inputs)[0]) < 1e-5


def test_while_the_projector_learns_nothing_is_kept(architecture, built):
    vlm_ = loading.load(str(built(architecture)), "cpu")
    loading.freeze_vision(vlm_)
    looked = looked_at(vlm_)
    prompts, plain = encoding.collate_prompts(vlm_, looked), encoding.encode_prompts(vlm_, IMAGES, TEXTS)
    assert (
        [p.inputs for p in looked] == [None] * 3
        and prompts.keys() == plain.keys()
        and all(prompts[k].equal(plain[k]) for k in plain)
    )


@pytest.mark.parametrize("spoil", ["refuses", "ignores", "confuses"])
def test_a_model_that_takes_no_kept_features_encodes_each_image_again_and_says_so(
    spoil, built, monkeypatch, capsys
):
    from transformers import LlavaModel

    real, vlm_ = LlavaModel.forward, loading.load(str(built("llava")), "cpu")

    def forward(self, *args, mm_encoder_outputs=None, **kwargs):
        # as a library of before they were taken
        if mm_encoder_outputs and spoil == "refuses":
            raise TypeError("unexpected keyword argument")
        if mm_encoder_outputs and spoil == "confuses":
            mm_encoder_outputs = {
                "image": SimpleNamespace(pooler_output=mm_encoder_outputs["image"].pooler_output[::-1])
            }
        return real(
            self, *args, mm_encoder_outputs=None if spoil == "ignores" else mm_encoder_outputs, **kwargs
        )

    monkeypatch.setattr(LlavaModel, "forward", forward)
    loading.freeze_images(vlm_)
    said = capsys.readouterr().out
    assert not vlm_.reuses_features and said.count("\n") == 1 and "precomputed image features" in said
    looked = looked_at(vlm_)
    ids, mask = encoding.encode_continuations(vlm_, ANSWERS)
    with torch.no_grad():
        got = vlm.token_logps(vlm_, encoding.collate_prompts(vlm_, looked), ids, mask)[0]
        assert largest(got - plain_logps(vlm_, IMAGES, TEXTS, ids, mask)[0]) < 1e-5


# ---------------------------------------------------------------------------------------------------------
# Weights.

# The prefix of the vision tower's weights, and which of them still learn.
FROZEN = {
    "llava": ("model.vision_tower.", ()),
    "gemma3": ("model.vision_tower.", ()),
    "idefics3": ("model.vision_model.", ()),
    "smolvlm": ("model.vision_model.", ()),
    "llava_onevision": ("model.vision_tower.", ()),
    "internvl": ("model.vision_tower.", ()),
    "qwen2_vl": ("model.visual.", ("model.visual.merger.",)),
    "qwen2_5_vl": ("model.visual.", ("model.visual.merger.",)),
    "qwen3_vl": ("model.visual.", ("model.visual.merger.", "model.visual.deepstack_merger_list.")),
}


def test_freezing_vision_freezes_the_tower_and_nothing_else(architecture, built):
    vlm_ = loading.load(str(built(architecture)), "cpu")
    loading.freeze_vision(vlm_)
    vlm.token_logps(vlm_, *encoded(vlm_, 2))[0].sum().backward()
    tower, learning = FROZEN[architecture]
    names = [name for name, _ in vlm_.model.named_parameters()]
    assert all(any(name.startswith(part) for name in names) for part in (tower, *learning)), (
        "no such parameters"
    )
    for name, parameter in vlm_.model.named_parameters():
        assert parameter.requires_grad == (not name.startswith(tower) or name.startswith(learning)), name
        assert parameter.requires_grad or parameter.grad is None
    bridge = [
        p
        for name, p in vlm_.model.named_parameters()
        if any(part in name for part in ("projector", "connector", "merger"))
    ]
    assert bridge and all(p.grad is not None and p.grad.any() for p in bridge)


def test_freezing_images_freezes_the_projector_too_and_nothing_of_the_language_model(architecture, built):
    vlm_ = loading.load(str(built(architecture)), "cpu")
    loading.freeze_images(vlm_)
    tower, _ = FROZEN[architecture]
    bridge = ("model.multi_modal_projector.", "model.connector.", "model.image_newline", "model.visual.")
    for name, parameter in vlm_.model.named_parameters():
        assert parameter.requires_grad == (not name.startswith((tower, *bridge))), name


def test_freezing_a_tower_that_has_an_unknown_name_is_an_error():
    with pytest.raises(ModelError, match="Linear: no vision tower"):
        loading.freeze_vision(SimpleNamespace(model=torch.nn.Linear(2, 2)))


def test_a_frozen_copy_shares_what_is_frozen_already_and_nothing_that_learns(architecture, built):
    vlm_ = loading.load(str(built(architecture)), "cpu")
    loading.freeze_images(vlm_)
    twin = dict(loading.frozen_copy(vlm_).model.named_parameters())
    for name, parameter in vlm_.model.named_parameters():
        assert (twin[name].data_ptr() == parameter.data_ptr()) == (not parameter.requires_grad), name


def test_freezing_images_of_a_model_that_has_nothing_but_its_language_model_is_an_error(llava, monkeypatch):
    # the library's answer where it knows no better
    monkeypatch.setattr(type(llava.model), "get_decoder", lambda self: self)
    with pytest.raises(
        ModelError, match="LlavaForConditionalGeneration: nothing found beside the language model"
    ):
        loading.freeze_images(llava)
    assert all(p.requires_grad for p in llava.model.parameters())


def test_a_frozen_copy_computes_the_same_shares_no_storage_and_cannot_learn(vlm_):
    before = [p.requires_grad for p in vlm_.model.parameters()]
    vlm_.model.train()
    twin = loading.frozen_copy(vlm_)
    vlm_.model.eval()
    tensors = [[*v.model.parameters(), *v.model.buffers()] for v in (vlm_, twin)]
    assert not {t.data_ptr() for t in tensors[0]} & {t.data_ptr() for t in tensors[1]}
    assert not any(p.requires_grad for p in twin.model.parameters()) and not twin.model.training
    assert [p.requires_grad for p in vlm_.model.parameters()] == before
    prompts, ids, mask = encoded(vlm_, 2)
    logps, _ = vlm.token_logps(twin, prompts, ids, mask)
    assert not logps.requires_grad and logps.equal(vlm.token_logps(vlm_, prompts, ids, mask)[0].detach())


def test_a_saved_model_loads_with_the_same_logits_inputs_and_tokens(vlm_, tmp_path):
    loading.save(vlm_, tmp_path / "saved")
    again = loading.load(str(tmp_path / "saved"), "cpu")
    before, after = (encoding.encode_prompts(v, IMAGES, TEXTS) for v in (vlm_, again))
    assert before.keys() == after.keys() and all(before[k].equal(after[k]) for k in before)
    with torch.no_grad():
        assert vlm_.model(**before).logits.equal(again.model(**after).logits)
    assert (again.end_id, again.stop_ids, again.banned_ids) == (vlm_.end_id, vlm_.stop_ids, vlm_.banned_ids)
    assert not again.model.training and again.model.dtype == torch.float32


def found_elsewhere(folder):
    """What plain transformers makes of a folder: its processor's settings, or why it makes none."""
    import transformers

    try:
        processor = transformers.AutoProcessor.from_pretrained(folder)
    except Exception as error:
        return str(error).replace(str(folder), "FOLDER")
    return type(processor), processor.to_dict(), processor.chat_template, processor.tokenizer.get_vocab()


def test_what_loads_the_source_loads_a_tuned_folder(architecture, built, tmp_path):
    check_tuned_folder(built(architecture), STOPS[architecture], tmp_path)


@pytest.mark.parametrize("name", RECURRENT)
def test_what_loads_the_source_of_a_recurrent_model_loads_a_tuned_folder(name, tmp_path):
    RECURRENT[name][0](tmp_path / "built")
    check_tuned_folder(tmp_path / "built", [0, 2] if name == "qwen3_5" else [1], tmp_path)


def check_tuned_folder(built, stops, tmp_path):
    import transformers

    source = shutil.copytree(built, tmp_path / "source")
    put = {"README.md": "# A model", "LICENSE": "Its terms", "additional_chat_templates/rag.jinja": "{{ a }}"}
    (source / "additional_chat_templates").mkdir()
    for name, content in put.items():
        (source / name).write_text(content)
    # Not a part of the model: weights in another format, and what a run wrote.
    for name in (
        "consolidated.safetensors",
        "pytorch_model.bin",
        "metrics.json",
        "marks.json",
        "rollouts.jsonl",
    ):
        (source / name).write_text("{}")
    vlm_ = loading.load(str(source), "cpu")
    with torch.no_grad():
        vlm_.head.weight += 1
    loading.save(vlm_, tmp_path / "tuned")
    assert found_elsewhere(tmp_path / "tuned") == found_elsewhere(source)
    weights = ("config.json", "generation_config.json", "model.safetensors")
    for path in built.iterdir():
        assert path.name in weights or (tmp_path / "tuned" / path.name).read_bytes() == path.read_bytes()
    assert all((tmp_path / "tuned" / name).read_text() == content for name, content in put.items())
    own = {path.name for path in built.iterdir()}
    assert {path.name for path in (tmp_path / "tuned").iterdir()} == own | {n.split("/")[0] for n in put}
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "tuned")
    assert again.get_output_embeddings().weight.equal(vlm_.head.weight)
    assert json.loads((tmp_path / "tuned" / "generation_config.json").read_text())["eos_token_id"] in (
        stops,
        stops[::-1],
        stops[0],
    )


# ---------------------------------------------------------------------------------------------------------
# What ends a turn, what must never be sampled, what cannot be loaded.


def test_stops_end_a_turn_and_every_other_special_or_nameless_token_is_banned(architecture, vlm_):
    rows, tokens = vlm_.head.weight.shape[0], len(vlm_.tokenizer)
    special = [i for i in range(tokens) if vlm_.tokenizer.decode([i], skip_special_tokens=True) == ""]
    assert rows == tokens + 3 and 5 <= len(special) <= 10
    assert vlm_.stop_ids == STOPS[architecture] and vlm_.end_id in vlm_.stop_ids
    assert vlm_.banned_ids == sorted({*special, *range(tokens, rows)} - set(STOPS[architecture]))


TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


def add_tags(folder):
    """Make the tags special tokens of the model in `folder`: they take its last rows, and two new ones."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": TAGS}, replace_extra_special_tokens=False)
    tokenizer.save_pretrained(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    return tokenizer.convert_tokens_to_ids(TAGS)


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl"])
def test_tags_of_the_form_that_are_special_tokens_are_sampled_decoded_and_encoded_whole(
    name, built, tmp_path
):
    folder = shutil.copytree(built(name), tmp_path / "tags")
    tags = add_tags(folder)
    vlm_ = loading.load(str(folder), "cpu")
    response = "<think>a cyst</think><answer>left</answer>"
    ids, mask = encoding.encode_continuations(vlm_, [response])
    assert [i for i in ids[0].tolist() if i in tags] == tags and not set(tags) & set(vlm_.banned_ids)
    assert encoding.decode(vlm_, ids, mask) == [response] and parse_response(response).well_formed
    # As the library encodes a prompt that shows the form, and other special tokens are still plain text.
    text = "Reply as <think>reasoning</think><answer>answer</answer>"
    ours, plain = encoding.encode_prompts(vlm_, IMAGES[:1], [text]), plain_prompt(vlm_, IMAGES[0], text)
    assert ours["input_ids"].equal(plain["input_ids"]) and set(tags) <= set(ours["input_ids"][0].tolist())
    test_the_name_of_a_special_token_in_an_answer_is_plain_text(vlm_)
    # A model that says nothing else says them.
    bonus = torch.zeros(1, len(vlm_.head.weight))
    hook = push(vlm_, lambda call: bonus.index_fill(1, torch.tensor(tags[call % 4]), 1e5))
    sampled = encoding.decode(vlm_, *vlm.sample(vlm_, ours, [1], 4)[:2])
    hook.remove()
    assert sampled == ["".join(TAGS)]
    loading.save(vlm_, tmp_path / "saved")
    saved, own = ((f / "tokenizer.json").read_bytes() for f in (tmp_path / "saved", folder))
    assert saved == own, "the tokenizer on disk is the source's"


@pytest.mark.parametrize("opened", ["<think>", "<think>\n"])
def test_a_think_tag_that_the_template_opens_is_left_to_the_reply(opened, built, tmp_path):
    folder = shutil.copytree(built("qwen2_5_vl"), tmp_path / "thinking")
    template = (folder / "chat_template.jinja").read_text()
    opening = template.replace("assistant\n{% endif %}", f"assistant\n{opened}{{% endif %}}")
    assert opening != template
    (folder / "chat_template.jinja").write_text(opening)
    thinking, plain = (loading.load(str(f), "cpu") for f in (folder, built("qwen2_5_vl")))
    # A tag in the text of a user stays.
    texts = ["What?", "Reply as <think>"]
    ours, theirs = (encoding.encode_prompts(v, IMAGES[:2], texts)["input_ids"] for v in (thinking, plain))
    assert ours.equal(theirs)
    shown = thinking.tokenizer.decode(plain_prompt(thinking, IMAGES[0], "?")["input_ids"][0])
    assert shown.endswith(opened), "the template opens no tag"
    loading.save(thinking, tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == opening


@pytest.mark.parametrize(
    "template, end",
    [
        (CHATML, "<|im_end|>"),
        # With a system prompt, whose end stands before the question.
        ("<|im_start|>system\nHelp.<|im_end|>\n" + CHATML, "<|im_end|>"),
        # No end: a token opens each turn, and another one stands where the toy's <|assistant|> opens a reply.
        (CHATML.replace("<|im_end|>", ""), None),
        (CHATML.split("{% if add")[0], None),
        # It refuses a reply.
        ("{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}" + CHATML, None),
    ],
)
def test_the_end_of_a_reply_is_the_chat_template_s_own(template, end, built, tmp_path):
    """As in a base model tuned to chat: its tokenizer and generation config name the end of a document."""
    folder = shutil.copytree(built("qwen2_5_vl"), tmp_path / "tuned")
    (folder / "chat_template.jinja").write_text(template)
    for name, value in (("tokenizer_config.json", "<|endoftext|>"), ("generation_config.json", 0)):
        config = json.loads((folder / name).read_text())
        config["eos_token" if "tokenizer" in name else "eos_token_id"] = value
        (folder / name).write_text(json.dumps(config))
    vlm_ = loading.load(str(folder), "cpu")
    wanted = (2, [0, 2]) if end else (0, [0])
    assert (vlm_.end_id, vlm_.stop_ids) == wanted and (2 in vlm_.banned_ids) == (end is None)


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.json"])
def test_a_chat_template_in_the_place_of_older_folders_is_used_and_carried_over(place, built, tmp_path):
    folder = shutil.copytree(built("qwen2_5_vl"), tmp_path / "older")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / place).read_text()) if (folder / place).exists() else {}
    (folder / place).write_text(json.dumps(config | {"chat_template": template}))
    loading.save(loading.load(str(folder), "cpu"), tmp_path / "tuned")
    tuned, plain = (loading.load(str(f), "cpu") for f in (tmp_path / "tuned", built("qwen2_5_vl")))
    ours, theirs = (encoding.encode_prompts(v, IMAGES, TEXTS)["input_ids"] for v in (tuned, plain))
    assert ours.equal(theirs)


def write_adapter(folder):
    for path in folder.iterdir():
        path.unlink()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "owner/base", "r": 8}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))


def quantise(method):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
        (folder / "config.json").write_text(json.dumps(config))

    return change


def leave_out_the_patch_size(folder):
    config = json.loads((folder / "processor_config.json").read_text())
    del config["patch_size"]
    (folder / "processor_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change, why",
    [
        (write_adapter, r"an adapter \(LORA\) of owner/base.*merge"),
        (leave_out_the_patch_size, "no `patch_size`"),
        # As long as what reads it is not installed.
        (quantise("gptq"), r"quantised weights \(gptq\).*optimum.*unquantised"),
        (quantise("awq"), r"quantised weights \(awq\).*gptqmodel.*unquantised"),
    ],
)
def test_a_folder_that_is_no_whole_model_is_told_in_one_line_with_its_cause(change, why, built, tmp_path):
    folder = shutil.copytree(built("llava"), tmp_path / "folder")
    change(folder)
    with pytest.raises(ModelError, match=why) as refused:
        loading.load(str(folder), "cpu")
    assert str(refused.value).startswith(f"{folder}: ") and "\n" not in str(refused.value)


def test_a_quantised_model_is_not_trained(built, tmp_path):
    folder = shutil.copytree(built("llava"), tmp_path / "folder")
    # A method that the library does not know: it warns and loads the weights as they are.
    quantise("of its own")(folder)
    vlm_ = loading.load(str(folder), "cpu")
    with pytest.raises(ModelError, match=r"quantised \(of its own\) and cannot learn"):
        loading.freeze(vlm_, "vision")


def test_a_vocabulary_with_holes_bans_the_holes_and_not_its_last_tokens(llava):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"a": 10, "b": 11, "c": 100, "<|end|>": 101}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "a")), eos_token="<|end|>"
    )
    banned = loading.wrap(llava.model, SimpleNamespace(tokenizer=tokenizer)).banned_ids
    assert not {10, 11, 100, 101} & set(banned) and {9, 12, 99, 102} <= set(banned)


def test_a_tokenizer_without_padding_pads_with_its_end(llava):
    llava.tokenizer.pad_token = None
    again = loading.wrap(llava.model, llava.processor)
    assert again.tokenizer.pad_token_id == again.end_id == 1 and 1 not in again.banned_ids


def spoilt(folder, name):
    """Do one thing wrong to the model in `folder`."""
    if name.startswith("no "):
        return (folder / name[3:]).unlink()
    if name == "half its weights":
        weights = (folder / "model.safetensors").read_bytes()
        return (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    config = (folder / "config.json").read_text()
    if name != "broken config.json":
        config = json.loads(config)
        config["text_config"] |= {
            "a width in words": {"hidden_size": "large"},
            "one more layer": {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
            "another width": {"intermediate_size": 64},
        }[name]
        config = json.dumps(config)
    (folder / "config.json").write_text(config[:-9] if name == "broken config.json" else config)


@pytest.mark.parametrize(
    "name, why",
    [
        ("no config.json", "no config.json in it"),
        ("no model.safetensors", "no file named model.safetensors"),
        ("no tokenizer.json", "tokenizer"),
        ("no processor_config.json", "processor"),
        ("no chat_template.jinja", "no chat template"),
        ("half its weights", "deserializing"),
        ("broken config.json", "not a valid JSON"),
        ("a width in words", "hidden_size"),
        ("one more layer", r"layers\.2\..* and 11 more are missing"),
        ("another width", r"mlp.* and 5 more are missing or of another shape"),
    ],
)
def test_a_spoilt_folder_is_refused_in_one_line_that_names_it(name, why, built, tmp_path):
    folder = shutil.copytree(built("llava"), tmp_path / "spoilt")
    spoilt(folder, name)
    with pytest.raises(ModelError, match=why) as refused:
        loading.load(str(folder), "cpu")
    assert (
        str(refused.value).startswith(f"{folder}: ")
        and "\n" not in str(refused.value)
        and len(str(refused.value)) < 500
    )


# ---------------------------------------------------------------------------------------------------------
# Logits that are more than weight times state.


@pytest.mark.parametrize(
    "family, number, rule",
    [
        ("Gemma2", {"final_logit_softcapping": 30.0}, (1.0, 30.0)),
        ("Granite", {"logits_scaling": 8.0}, (8.0, None)),
        ("Cohere", {"logit_scale": 0.0625}, (16.0, None)),
        ("HyperCLOVAX", {"logits_scaling": 0.125}, (8.0, None)),
        # its class knows nothing of such a number
        ("Qwen2", {"final_logit_softcapping": 30.0}, (1.0, None)),
        ("Qwen2", {}, (1.0, None)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_asked_what_it_makes_of_its_head_s_output(family, number, rule, dtype):
    import transformers

    config = getattr(transformers, f"{family}Config")(
        **SIZES,
        num_key_value_heads=1,
        vocab_size=50,
        head_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **number,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().to(dtype)
    before = model(input_ids=torch.tensor([[3]])).logits
    assert loading.find_logit_rule(model) == rule
    # and is left as it was
    assert torch.equal(model(input_ids=torch.tensor([[3]])).logits, before)


@pytest.mark.parametrize(
    "ways, loads", [({"final_logit_softcapping": 30.0}, True), ({"logit_scale": 3.0}, False)]
)
def test_a_number_that_the_class_ignores_does_no_harm_and_one_it_uses_in_another_way_is_refused(
    ways, loads, built, tmp_path, monkeypatch
):
    from transformers import LlavaForConditionalGeneration

    folder = shutil.copytree(built("llava"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= ways
    (folder / "config.json").write_text(json.dumps(config))
    real = LlavaForConditionalGeneration.forward

    def forward(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        out.logits = out.logits + 3
        return out

    if loads:
        assert loading.load(str(folder), "cpu").logit_rule == (1.0, None)
        return
    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", forward)
    with pytest.raises(ModelError, match="neither capped nor scaled as config.json says") as refused:
        loading.load(str(folder), "cpu")
    assert "\n" not in str(refused.value)


def test_capped_and_scaled_logits_and_a_bias_reach_the_log_probabilities(llava):
    llava = replace(llava, logit_rule=(0.5, 3.0))
    llava.head.bias = torch.nn.Parameter(torch.linspace(-1, 1, len(llava.head.weight)))
    prompts, ids, mask = encoded(llava, 1)
    with torch.no_grad():
        logps, entropy = vlm.token_logps(llava, prompts, ids, mask, 0.7)
        for n, row in enumerate(ids):
            row = row[: mask[n].sum()]
            logits = 3 * torch.tanh(plain_logits(llava, IMAGES[n], TEXTS[n], row)[:-1] / 3) / 0.5 / 0.7
            logits[:, llava.banned_ids] = -torch.inf
            log_p = logits.log_softmax(-1)
            assert largest(logps[n, : len(row)] - log_p[range(len(row)), row]) < 1e-5
            log_p = log_p[:, log_p[0] > -torch.inf]
            assert largest(entropy[n, : len(row)] + (log_p.exp() * log_p).sum(-1)) < 1e-5


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_logits_that_are_not_finite_are_one_line_in_sampling_and_in_scoring(value, llava, tmp_path):
    """Also if the weights are finite: 3e38 overflows as soon as it is multiplied."""
    prompts = encoding.encode_prompts(llava, IMAGES[:2], TEXTS[:2])
    ids, mask = encoding.encode_continuations(llava, ["left", "right"])
    list(llava.model.get_decoder().parameters())[-1].data.fill_(value)
    for temperature in (0, 1.0):
        with pytest.raises(ModelError, match="its logits are not finite; if it is being trained, lower --lr"):
            vlm.sample(llava, prompts, range(2), 3, temperature)
    with torch.no_grad(), pytest.raises(ModelError, match="its logits are not finite"):
        vlm.token_logps(llava, prompts, ids, mask)
    if value != value:
        with pytest.raises(ModelError, match="not saved, because .*norm.weight is not finite; lower --lr"):
            loading.save(llava, str(tmp_path / "model"))
        assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("rule", [(1.0, None), (0.5, 3.0), (16.0, None)])
@pytest.mark.parametrize("name", ["the toy", "llava", "gemma3"])
def test_log_probabilities_of_samples_are_over_the_allowed_tokens_only(name, rule, bf16, built):
    folder = TOY if name == "the toy" else built(name)
    vlm_ = replace(loading.load(str(folder), "cpu"), logit_rule=rule)
    divisor, softcap = rule
    rows = len(vlm_.head.weight)
    allowed = [i for i in range(rows) if i not in set(vlm_.banned_ids)]
    # The banned tokens' logits are by far the largest.
    bias = torch.linspace(-1, 1, rows)
    bias[vlm_.banned_ids] = 50.0
    vlm_.head.bias = torch.nn.Parameter(bias)
    prompts = encoding.encode_prompts(vlm_, IMAGES, TEXTS)
    ids, mask, _ = vlm.sample(vlm_, prompts, range(6), 6, 1.0, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logps, entropy = vlm.token_logps(vlm_, prompts, ids, mask)
        unbanned, _ = vlm.token_logps(replace(vlm_, banned_ids=[]), prompts, ids, mask)
    assert (logps - unbanned)[mask.bool()].min() > 0.1, "the bias is too weak to test anything"
    for n, row in enumerate(kept(ids, mask)):
        with torch.no_grad():
            logits = plain_logits(
                replace(vlm_, banned_ids=[]), IMAGES[n // 2], TEXTS[n // 2], torch.tensor(row)
            )
        logits = (softcap * torch.tanh(logits / softcap) if softcap else logits)[:-1] / divisor
        wanted = torch.distributions.Categorical(logits=logits[:, allowed])
        places = torch.tensor([allowed.index(token) for token in row])
        differences = torch.stack(
            [logps[n, : len(row)] - wanted.log_prob(places), entropy[n, : len(row)] - wanted.entropy()]
        )
        assert differences.abs().mean() < (0.2 if bf16 else 1e-4)


def test_capped_and_scaled_logits_are_what_is_sampled_from(llava):
    prompts, seeds = encoding.encode_prompts(llava, IMAGES, TEXTS), list(range(12))

    def draw(vlm_, temperature):
        return vlm.sample(vlm_, prompts, seeds, 6, temperature, 4)[0].tolist()

    plain = draw(llava, 1.0)
    assert draw(replace(llava, logit_rule=(3.0, None)), 1.0) == draw(llava, 3.0) != plain
    capped = draw(replace(llava, logit_rule=(1.0, 1.5)), 1.0)
    llava.head.register_forward_hook(lambda module, inputs, output: 1.5 * torch.tanh(output / 1.5))
    assert capped == draw(llava, 1.0) != plain


def test_a_model_of_text_alone_is_refused_in_one_line_that_names_it(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    build_tokenizer(["<|end|>"], eos_token="<|end|>").save_pretrained(tmp_path)
    Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=1, vocab_size=300)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"a text-only model \(qwen2\), which takes no image") as refused:
        loading.load(str(tmp_path), "cpu")
    assert str(refused.value).startswith(f"{tmp_path}: ") and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no/such/folder", "/no/such/folder", "./nowhere"])
def test_a_name_that_is_nowhere_is_refused_in_one_line_that_names_it(name, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: asked.append(a) or [])
    with pytest.raises(ModelError) as refused:
        loading.load(name, "cpu")
    assert str(refused.value).startswith(f"{name}: ") and "\n" not in str(refused.value) and not asked
    assert ("no config.json" in str(refused.value)) == (name != "nobody/no-such-model"), (
        "a path is no hub name"
    )
