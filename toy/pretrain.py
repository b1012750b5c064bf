"""How the toy's three committed models were made, from scratch: a generator, a policy and a reward backbone.

Each is a LLaVA (SigLIP tower, linear projector, Qwen2 decoder) of one to two million parameters with its own
tokenizer, saved in the Hugging Face format. There are two phases, on images drawn for them:
  1. one vision tower for all three learns to name what is seen: modality, outline, shape, size and side (a
     VLM usually starts from a pre-trained CLIP tower). It does not learn what a sign means;
  2. projector and decoder learn the data of their role, and the tower stays as it is:
       policy     reports and questions in one family of modalities (KNOWN), so that it has much left to learn
       generator  candidates of all paradigms and modalities, of which a fraction (ERRORS) has a wrong answer:
                  it sees well and errs by chance, so that tuning on right candidates can improve it
       backbone   reports and questions of all modalities: it knows more than the policy

    python toy/pretrain.py --out toy                        all three, about 45 minutes on one CPU core
    python toy/pretrain.py --out toy --roles policy         one of them
    python toy/pretrain.py --out runs/large --roles policy --tower toy/policy --width 512 --layers 4
                                                            a policy eleven times the size
"""

import json
import os
import random
import sys
import time
from collections import defaultdict

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import clinic

from medgr2 import cli
from medgr2.prompts import (
    MODALITIES,
    PARADIGMS,
    TASKS,
    format_candidate,
    generator_prompt,
    is_match,
    parse_candidate,
    parse_response,
    policy_prompt,
    reference_response,
    report_prompt,
)

# What phase 1 teaches the tower to see.
SIGNS = {
    "modality": MODALITIES,
    "outline": clinic.OUTLINES["radiographic"],
    "shape": tuple(dict.fromkeys(shape for shapes in clinic.SHAPES.values() for shape in shapes)),
    "size": tuple(clinic.SIZES),
    "side": clinic.SIDES,
}
# The fact that a task asks for, and its values.
ASKED = {
    "Modality Recognition": ("modality", MODALITIES),
    "Anatomy Identification": ("anatomy", clinic.ANATOMIES),
    "Disease Diagnosis": ("finding", clinic.FINDINGS),
    "Lesion Grading": ("degree", clinic.DEGREES + (None,)),
    "Other Biological Attributes": ("side", clinic.SIDES + (None,)),
}
# The modalities that the policy is trained on.
KNOWN = clinic.FAMILIES["radiographic"]
# Fraction of the generator's training examples with a wrong answer.
ERRORS = 0.3
# Decoder layers, steps of phase 2 and the fraction of reports in it.
ROLES = {
    "policy": dict(layers=3, steps=400, reports=0.5),
    "generator": dict(layers=3, steps=1000, reports=0.0),
    "backbone": dict(layers=4, steps=1200, reports=0.3),
}
TOWER_LAYERS, TOWER_STEPS = 3, 3000
# Hidden size of the tower and, by default, of the decoder.
WIDTH = 128
CHAT = (
    "{% for m in messages %}<|user|>{% for c in m['content'] %}"
    "{{ '<image>' if c['type'] == 'image' else c['text'] }}"
    "{% endfor %}<|assistant|>{% endfor %}"
)
SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<image>"]


def signs_of(facts):
    """What can be seen: {sign: name}, None if there is no lesion."""
    modality, is_empty = facts["modality"], facts["finding"] == "no finding"
    return {
        "modality": modality,
        "outline": clinic.outline_of(modality, facts["anatomy"]),
        "shape": clinic.shape_of(modality, facts["finding"]),
        "size": None if is_empty else clinic.size_of(modality, facts["degree"]),
        "side": None if is_empty else clinic.image_side(modality, facts["side"]),
    }


def mistaken(facts, task, rng):
    """The facts with a wrong value of the one that the task asks for."""
    fact, values = ASKED[task]
    return facts | {fact: rng.choice([value for value in values if value != facts[fact]])}


def examples(role, rng, n, report_fraction):
    """n training examples of a role: lists of PIL images, prompts and responses."""
    images, prompts, responses = [], [], []
    for _ in range(n):
        facts, task = clinic.draw_facts(rng, KNOWN if role == "policy" else MODALITIES), rng.choice(TASKS)
        images.append(clinic.draw(facts, rng))
        paradigm = rng.choice(list(PARADIGMS))
        if rng.random() < report_fraction:
            prompt, response = report_prompt(), clinic.report_text(facts)
        elif role == "generator":
            if rng.random() < ERRORS:
                facts = mistaken(facts, task, rng)
            prompt = generator_prompt(paradigm, task)
            response = format_candidate(clinic.question(facts, task, rng, paradigm))
        else:
            row = clinic.question(facts, task, rng, "stepwise" if role == "policy" else paradigm)
            prompt, response = policy_prompt(row), reference_response(row)
        prompts.append(prompt)
        responses.append(response)
    return images, prompts, responses


def example_texts():
    """Texts of all roles, for the tokenizer."""
    texts = []
    for role in ROLES:
        _, prompts, responses = examples(role, random.Random("tokenizer"), 2000, 0.3)
        texts += prompts + responses
    return texts


def build_processor(texts, tokens=768, size=clinic.SIZE):
    """A byte-level BPE of so many tokens, trained on the texts, and a SigLIP image processor (pixels)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast, SiglipImageProcessorPil

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tags = [f"<{slash}{tag}>" for tag in ("question", "options", "think", "answer") for slash in ("", "/")]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=tokens,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in tags])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL_TOKENS[2:],
    )
    images = SiglipImageProcessorPil(size={"height": size, "width": size})
    return LlavaProcessor(
        images, fast, patch_size=16, vision_feature_select_strategy="full", chat_template=CHAT
    )


def build_model(processor, decoder_layers, width=WIDTH, size=clinic.SIZE, tower_width=WIDTH):
    """A LLaVA with random weights for images of this size in pixels."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

    tokenizer = processor.tokenizer
    vision = SiglipVisionConfig(
        hidden_size=tower_width,
        intermediate_size=2 * tower_width,
        num_hidden_layers=TOWER_LAYERS,
        num_attention_heads=4,
        image_size=size,
        patch_size=16,
        vision_use_head=False,
    )
    text = Qwen2Config(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=decoder_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=(size // 16) ** 2,
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def train(parameters, steps, lr, loss_at, name):
    """AdamW, cosine schedule with warm-up, gradients clipped to 1; prints the mean loss ten times."""
    import torch

    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    total, start, every = 0.0, time.time(), max(1, steps // 10)
    for step in range(steps):
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if (step + 1) % every == 0:
            loss, seconds = total / every, time.time() - start
            print(f"{name} {step + 1}/{steps} loss {loss:.3f} {seconds:.0f} s", flush=True)
            total = 0.0


def pretrain_tower(tower, steps, seed, n=40_000):
    """Phase 1: five heads on the mean of the patch states name what is seen. They are not kept."""
    import torch
    from torch.nn.functional import cross_entropy

    heads = torch.nn.ModuleList(torch.nn.Linear(WIDTH, len(names)) for names in SIGNS.values())
    pixels, labels = draw_signs(n + 2000, random.Random(f"{seed} tower"))
    batches = torch.Generator().manual_seed(0)

    def logits(rows):
        # As the SigLIP image processor scales them.
        inputs = pixels[rows].permute(0, 3, 1, 2) / 127.5 - 1
        mean = tower(pixel_values=inputs).last_hidden_state.mean(1)  # (B, 128)
        return [head(mean) for head in heads]

    def loss_at(step):
        rows = torch.randint(0, n, (256,), generator=batches)
        return sum(cross_entropy(x, y, ignore_index=-100) for x, y in zip(logits(rows), labels[rows].T))

    train([*tower.parameters(), *heads.parameters()], steps, 2e-3, loss_at, "tower")
    held_out = torch.arange(n, n + 2000)
    with torch.no_grad():
        for name, x, y in zip(SIGNS, logits(held_out), labels[held_out].T):
            print(f"tower: {name} {(x.argmax(1) == y)[y >= 0].float().mean():.3f} right on new images")


def draw_signs(n, rng):
    """n images as bytes (n, 64, 64, 3), and the index of each sign (n, 5), -100 for one that is not there."""
    import numpy as np
    import torch

    facts = [clinic.draw_facts(rng) for _ in range(n)]
    pixels = torch.stack([torch.from_numpy(np.array(clinic.draw(f, rng))) for f in facts])
    signs = [signs_of(f) for f in facts]
    labels = [[names.index(s[k]) if s[k] else -100 for k, names in SIGNS.items()] for s in signs]
    return pixels, torch.tensor(labels)


def pretrain_language(vlm_, role, steps, report_fraction, seed, lr):
    """Phase 2: the mean loss per token of the responses, for the whole model."""
    from medgr2 import encoding, vlm

    def loss_at(step):
        rng = random.Random(f"{seed} {role} {step}")
        images, prompts, responses = examples(role, rng, 64, report_fraction)
        ids, mask = encoding.encode_continuations(vlm_, responses)
        logps, _ = vlm.token_logps(vlm_, encoding.encode_prompts(vlm_, images, prompts), ids, mask)
        return -logps.sum() / mask.sum()

    train([p for p in vlm_.model.parameters() if p.requires_grad], steps, lr, loss_at, role)


def measure(vlm_, role, n=400):
    """Accuracy by modality and task: of greedy answers, or of the generator's candidates at temperature 1."""
    from medgr2 import encoding, vlm

    rng, items, images = random.Random("marks"), [], []
    for i in range(n):
        facts, task = clinic.draw_facts(rng), rng.choice(TASKS)
        items.append((facts, task, clinic.question(facts, task, rng), list(PARADIGMS)[i % len(PARADIGMS)]))
        images.append(clinic.draw(facts, rng))
    generates = role == "generator"
    prompts = [generator_prompt(p, task) if generates else policy_prompt(row) for _, task, row, p in items]
    outcomes = defaultdict(list)
    for k in range(0, n, 100):
        part = slice(k, k + 100)
        ids, mask, _ = vlm.sample(
            vlm_,
            encoding.encode_prompts(vlm_, images[part], prompts[part]),
            range(k, k + 100),
            128,
            temperature=1.0 if generates else 0.0,
        )
        for text, (facts, task, row, paradigm) in zip(encoding.decode(vlm_, ids, mask), items[part]):
            outcome = check_candidate(text, facts, task) if generates else check_answer(text, row)
            for cell in ("all", facts["modality"], task, *([paradigm] if generates else [])):
                outcomes[cell].append(outcome)
    return {cell: fractions(found) for cell, found in outcomes.items()}


def check_candidate(text, facts, task):
    """Is the candidate's answer right? None if the reply is malformed."""
    candidate, _ = parse_candidate(text)
    return None if candidate is None else candidate["answer"] == clinic.truth(facts, task)[0]


def check_answer(text, row):
    return is_match(parse_response(text, row["options"]).prediction, row["answer"])


def fractions(outcomes):
    """Fractions: the outcomes that are not None (well-formed replies), and of those the right ones."""
    formed = [outcome for outcome in outcomes if outcome is not None]
    n = len(outcomes)
    return {"n": n, "well_formed": len(formed) / n, "right": sum(formed) / max(1, len(formed))}


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("--out", required=True, help="folder to save the models in, each under its role")
    p.add_argument("--roles", nargs="+", choices=ROLES, default=list(ROLES), help="which models")
    p.add_argument("--tower", help="model whose tower to take instead of phase 1")
    p.add_argument("--width", type=int, default=WIDTH, help="of the decoder, a multiple of 8")
    p.add_argument("--layers", type=cli.number(int, 1), help="of the decoder, if not the role's own")
    p.add_argument("--seed", type=int, default=0, help="of the weights and of all images")
    p.add_argument(
        "--steps", type=int, nargs=2, metavar="N", help="steps of phases 1 and 2, if not the role's own"
    )
    args = p.parse_args()
    # Four heads of an even size.
    if args.width < 8 or args.width % 8:
        p.error(f"--width {args.width}: give a multiple of 8")
    return args


def pretrain(role, tower, steps, layers, width, seed, out):
    """Phase 2: train one model around the tower, save it, and measure it (marks.json)."""
    import torch

    from medgr2 import loading

    torch.manual_seed(seed)
    processor = build_processor(example_texts())
    vlm_ = loading.wrap(build_model(processor, layers, width), processor)
    vlm_.model.model.vision_tower.load_state_dict(tower.state_dict())
    # At this learning rate the tower would unlearn most of what it learned in phase 1.
    loading.freeze_vision(vlm_)
    # A wider decoder needs a smaller rate.
    pretrain_language(vlm_, role, steps, ROLES[role]["reports"], seed, 2e-3 * WIDTH / width)
    # Committed in 16 bits, loaded in 32.
    vlm_.model.half()
    loading.save(vlm_, out)
    found = measure(loading.load(out), role)
    result = {"role": role, "seed": seed, "steps": steps, "marks": found}
    with open(os.path.join(out, "marks.json"), "w") as f:
        json.dump(result, f, indent=1)
    for cell, m in found.items():
        print(f"{cell:28} n {m['n']:4}  well-formed {m['well_formed']:.2f}  right {m['right']:.3f}")


def main(args):
    import torch

    from medgr2 import loading

    torch.manual_seed(args.seed)
    if args.tower:
        tower = loading.load(args.tower).model.model.vision_tower
    else:
        tower = build_model(build_processor(example_texts()), 1).model.vision_tower
        pretrain_tower(tower, args.steps[0] if args.steps else TOWER_STEPS, args.seed)
    for role in args.roles:
        steps = args.steps[1] if args.steps else ROLES[role]["steps"]
        layers = args.layers or ROLES[role]["layers"]
        pretrain(role, tower, steps, layers, args.width, args.seed, os.path.join(args.out, role))


if __name__ == "__main__":
    cli.run_main(main, parse_args())
