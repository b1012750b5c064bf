"""What benchmarks/real_images.sh needs besides the stages: the parts of the data, base models, and marks.

    python benchmarks/real_images.py split --data DATA --out runs/real/data
        DATA has train.jsonl and test.jsonl, records with `dataset` and `group` (patient, source photograph or
        cluster of near-copies; those of the two files differ). The training groups are divided at random into
        SHARES. Groups with an image near a test image (medgr2/leakage.py) are left out.
    python benchmarks/real_images.py held-out --data runs/real/data --modality M --task T --out OUT
        Expert questions and images of others than this modality, and questions of other tasks.
    python benchmarks/real_images.py models --data runs/real/data --out runs/real/models
        Three LLaVAs, trained from scratch (toy/pretrain.py). A vision tower learns to choose among a
        question's options without its text; then projector and decoder learn their role:
          generator  the questions of shown.jsonl, as candidates
          backbone   the questions of shown.jsonl, around a tower of its own: it errs on other images
          policy     those of KNOWN modalities, around the generator's tower
        So the policy's tower has seen the labels of all shown images, its decoder only those of KNOWN.
    python benchmarks/real_images.py marks --scored CYCLE/scored --truth runs/real/data/truth.jsonl --out FILE
        A candidate is right if its answer is that of a record about its image and of its task; an answer of
        yes or no, of a record with its question. Without such a record it is not judged.

    python benchmarks/real_images.py baselines --eval RUN/eval --train plenty.jsonl --out RUN
        What is right without the image, as evaluations. RUN/eval_majority: of the options, the one that is
        most often the answer in the training questions of its data set and task. RUN/eval_position: the
        option at their most frequent position. RUN/eval_blind, if the evaluation had --blind.

The images are not the project's: nothing here may be committed but numbers.
"""

import os
import random
import sys
from collections import Counter, defaultdict
from operator import itemgetter

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "toy")]
from medgr2 import cli, leakage, measures, records, runs
from medgr2.errors import require
from medgr2.images import open_image
from medgr2.prompts import (
    format_candidate,
    generator_prompt,
    is_match,
    normalise,
    policy_prompt,
    reference_response,
)

# Parts of the training groups. shown: the base models'; expert: the policy's expert questions, a tenth; val:
# the watch's; truth: their images, without questions, are generated from.
SHARES = {"shown": 0.5, "expert": 0.1, "val": 0.05, "truth": 0.35}
# Test questions of each data set that ask for what all its images have in common: no more are needed.
MOST_TRIVIAL = 20
# The modalities that the policy's decoder has learned from.
KNOWN = ("X-Ray", "Microscopy")
# Pixels of a side, hidden size of the tower and of the decoders, tokens of the vocabulary.
SIZE, TOWER_WIDTH, WIDTH, TOKENS = 96, 128, 128, 2048
# Steps and batch of the tower, and of each decoder; decoder layers.
TOWER_STEPS, TOWER_BATCH = 1500, 64
ROLES = {
    "policy": dict(layers=3, steps=300),
    "generator": dict(layers=3, steps=2500),
    "backbone": dict(layers=4, steps=1500),
}
BATCH = 16


# ---------------------------------------------------------------------------------------------------------
# The parts of the data.


def divide(rows, shares, seed):
    """{name: rows}: every group is in one part, and the shares count groups."""
    groups = sorted({row["group"] for row in rows})
    random.Random(runs.seed_of(seed, "groups")).shuffle(groups)
    part_of, start, total = {}, 0, 0.0
    for name, share in shares.items():
        total += share
        end = round(total * len(groups))
        part_of |= dict.fromkeys(groups[start:end], name)
        start = end
    parts = {name: [] for name in shares}
    for row in rows:
        parts[part_of[row["group"]]].append(row)
    return parts


def is_headline(row):
    """Does the answer differ within a data set? Modality and most anatomy questions have one answer each."""
    return row["task"] in ("Disease Diagnosis", "Lesion Grading") or (
        row["dataset"] == "Blood Cell" and row["task"] == "Anatomy Identification"
    )


def thin_out(rows, seed):
    """All headline questions, and of the others MOST_TRIVIAL of each data set and task."""
    cells = defaultdict(list)
    for row in rows:
        if not is_headline(row):
            cells[row["dataset"], row["task"]].append(row["id"])
    rng = random.Random(runs.seed_of(seed, "thin out"))
    kept = {name for cell in cells.values() for name in rng.sample(cell, min(len(cell), MOST_TRIVIAL))}
    return [row for row in rows if is_headline(row) or row["id"] in kept]


def find_near_copies(train, test):
    """The groups of training records with an image equal or near to a test image (medgr2/leakage.py)."""
    findings, _ = leakage.audit(leakage.read_side([test]), leakage.read_side([train]), leakage.NEAR_BITS)
    near = {f["image"] for f in findings if f["kind"] in (*leakage.LEAKS, leakage.NEAR)}
    return {r["group"] for r in records.read_records(train) if r["image"] in near}


def split(args):
    train, test = (os.path.join(args.data, f"{name}.jsonl") for name in ("train", "test"))
    rows = list(records.read_records(train, (*records.QUESTION, "dataset", "group", "task")))
    near = find_near_copies(train, test)
    kept = [row for row in rows if row["group"] not in near]
    print(
        f"{len(rows) - len(kept)} of {len(rows)} training questions are in groups near a test image: left out"
    )
    parts = divide(kept, SHARES, args.seed)
    asked = list(records.read_records(test, (*records.QUESTION, "dataset", "group", "task")))
    parts["test"] = [row | {"headline": is_headline(row)} for row in thin_out(asked, args.seed)]
    shared = {row["group"] for row in kept} & {row["group"] for row in parts["test"]}
    require(not shared, f"{test}: groups of the training file are in it, such as {min(shared, default='')}")
    parts["plenty"] = [row for name in ("shown", "expert", "truth") for row in parts[name]]
    # What is generated from has no question and no answer.
    fields = ("id", "image", "modality", "source", "dataset")
    images = {row["image"]: {name: row[name] for name in fields} for row in reversed(parts["truth"])}
    parts["images"] = list(images.values())
    for name, part in parts.items():
        records.write_records(os.path.join(args.out, f"{name}.jsonl"), part)
        print(f"{name}: {len(part)} records of {len({row['image'] for row in part})} images")


def leave_out(args):
    for name in ("expert", "images"):
        rows = records.read_records(os.path.join(args.data, f"{name}.jsonl"), root=records.ANYWHERE)
        kept = [row for row in rows if row["modality"] != args.modality and row.get("task") != args.task]
        print(f"{name}: {records.write_records(os.path.join(args.out, f'{name}.jsonl'), kept)} records")


# ---------------------------------------------------------------------------------------------------------
# The base models.


def says_yes_or_no(text):
    return normalise(text).split(" ")[0].rstrip(".,") in ("yes", "no")


def option_class(row, option):
    """What an option means: the same text may mean another thing in another data set, task or question."""
    question = normalise(row["question"]) if says_yes_or_no(option) else ""
    return row["dataset"], row["task"], normalise(option), question


def pixels_of(processor, rows):
    """{image path: (3, H, W) pixels, as the processor scales them}."""
    found = {}
    for path in sorted({row["image"] for row in rows}):
        pixels = processor.image_processor(open_image(path), return_tensors="pt")["pixel_values"]
        found[path] = pixels[0]
    return found


def augment(pixels, rng):
    """(B, 3, H, W) images, each shifted by up to a twelfth of a side, perhaps mirrored, made brighter."""
    import torch

    most, changed = pixels.shape[-1] // 12, []
    for image in pixels:
        image = torch.roll(image, (rng.randint(-most, most), rng.randint(-most, most)), (1, 2))
        image = image.flip(2) if rng.random() < 0.5 else image
        changed.append(image * rng.uniform(0.8, 1.2) + rng.uniform(-0.1, 0.1))
    return torch.stack(changed)


def pretrain_tower(tower, processor, shown, val, seed, steps):
    """Phase 1: a head on the mean of the patch states chooses among the options. It is not kept."""
    import pretrain
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.utils.rnn import pad_sequence

    classes = sorted({option_class(row, option) for row in shown + val for option in row["options"]})
    index = {name: i for i, name in enumerate(classes)}
    head = torch.nn.Linear(TOWER_WIDTH, len(classes))
    pixels, rng = pixels_of(processor, shown + val), random.Random(f"{seed} tower")

    def option_logits(rows, change):
        x = change(torch.stack([pixels[row["image"]] for row in rows]))
        logits = head(tower(pixel_values=x).last_hidden_state.mean(1))  # (B, classes)
        own = [torch.tensor([index[option_class(row, o)] for o in row["options"]]) for row in rows]
        # The question's own options; -1 is none.
        own = pad_sequence(own, batch_first=True, padding_value=-1)  # (B, options)
        logits = logits.gather(1, own.clamp(min=0)).masked_fill(own < 0, -torch.inf)
        return logits, torch.tensor([row["options"].index(row["answer"]) for row in rows])

    # Questions whose answer is that of their data set teach little.
    hard = [row for row in shown if row["task"] != "Modality Recognition"]

    def loss_at(step):
        return cross_entropy(*option_logits(rng.choices(hard, k=TOWER_BATCH), lambda x: augment(x, rng)))

    pretrain.train([*tower.parameters(), *head.parameters()], steps, 1e-3, loss_at, "tower")
    by_task = defaultdict(list)
    with torch.no_grad():
        logits, answers = option_logits(val, lambda x: x)
    for row, is_right in zip(val, (logits.argmax(1) == answers).tolist()):
        by_task[row["task"]].append(is_right)
    for task, right in sorted(by_task.items()):
        print(f"tower: {task} {sum(right) / len(right):.3f} of {len(right)} right in val.jsonl")


def shuffled(row, rng):
    """The question with its options in another order."""
    return row | {"options": rng.sample(row["options"], len(row["options"]))}


def example(role, row, rng):
    """(prompt, response) of a role."""
    row = shuffled(row, rng)
    if role == "generator":
        return generator_prompt("direct", row["task"]), format_candidate(row)
    return policy_prompt(row), reference_response(row)


def pretrain_language(vlm_, role, rows, steps, seed):
    """Phase 2: the mean loss per token of the responses, for projector and decoder."""
    import pretrain

    from medgr2 import encoding, vlm

    rng = random.Random(f"{seed} {role}")

    def loss_at(step):
        batch = rng.sample(rows, BATCH)
        prompts, responses = zip(*(example(role, row, rng) for row in batch))
        ids, mask = encoding.encode_continuations(vlm_, responses)
        inputs = encoding.encode_prompts(vlm_, [open_image(row["image"]) for row in batch], prompts)
        logps, _ = vlm.token_logps(vlm_, inputs, ids, mask)
        return -logps.sum() / mask.sum()

    pretrain.train([p for p in vlm_.model.parameters() if p.requires_grad], steps, 1.5e-3, loss_at, role)


def models(args):
    import pretrain
    import torch
    from safetensors.torch import load_file, save_file

    from medgr2 import loading

    parts = {}
    for name in ("shown", "val", "plenty"):
        parts[name] = list(
            records.read_records(os.path.join(args.data, f"{name}.jsonl"), root=args.image_root)
        )
    # All texts of the training questions: which option is right is not among them.
    texts = []
    for row in parts["plenty"]:
        texts += [policy_prompt(row), generator_prompt("direct", row["task"]), "<think></think>"]
    processor, towers = pretrain.build_processor(texts, TOKENS, SIZE), {}
    for seed, roles in ((0, ("generator", "policy")), (1, ("backbone",))):
        torch.manual_seed(seed)
        tower = pretrain.build_model(processor, 1, WIDTH, SIZE, TOWER_WIDTH).model.vision_tower
        file = os.path.join(args.out, f"tower{seed}.safetensors")
        if os.path.exists(file):
            tower.load_state_dict(load_file(file))
        else:
            steps = args.steps[0] if args.steps else TOWER_STEPS
            pretrain_tower(tower, processor, parts["shown"], parts["val"], seed, steps)
            os.makedirs(args.out, exist_ok=True)
            save_file(tower.state_dict(), file + ".part")
            os.replace(file + ".part", file)
        towers |= dict.fromkeys(roles, tower)
    for role, settings in ROLES.items():
        if os.path.exists(os.path.join(args.out, role)):
            continue
        torch.manual_seed(args.seed)
        model = pretrain.build_model(processor, settings["layers"], WIDTH, SIZE, TOWER_WIDTH)
        vlm_ = loading.wrap(model, processor)
        vlm_.model.model.vision_tower.load_state_dict(towers[role].state_dict())
        loading.freeze_vision(vlm_)
        rows = parts["shown"]
        if role == "policy":
            rows = [row for row in rows if row["modality"] in KNOWN]
        pretrain_language(vlm_, role, rows, args.steps[1] if args.steps else settings["steps"], args.seed)
        # Renamed when complete: a folder that is there is not made again.
        loading.save(vlm_, os.path.join(args.out, f"{role}.part"))
        os.replace(os.path.join(args.out, f"{role}.part"), os.path.join(args.out, role))
        print(f"{role}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


# ---------------------------------------------------------------------------------------------------------
# Marks.


def judge(candidate, known):
    """Is the candidate's answer right? None if no record about its image tells."""
    told = [row for row in known if row["task"] == candidate["task"]]
    if says_yes_or_no(candidate["answer"]):
        told = [row for row in told if normalise(row["question"]) == normalise(candidate["question"])]
    else:
        told = [row for row in told if not says_yes_or_no(row["answer"])]
    return any(is_match(candidate["answer"], row["answer"]) for row in told) if told else None


def measure(rows, right):
    """Of candidates: how many, of how many the answer is known, the share of right ones, AUROC of R."""
    judged = [row for row in rows if right[row["id"]] is not None]
    marks = [right[row["id"]] for row in judged]
    return {
        "candidates": len(rows),
        "judged": len(judged),
        "right": sum(marks) / len(marks) if marks else None,
        "auroc": measures.auroc([row["reward"]["overall"] for row in judged], marks) if marks else None,
    }


def marks(args):
    known = defaultdict(list)
    for row in records.read_records(args.truth, records.QUESTION, records.ANYWHERE):
        known[os.path.realpath(row["image"])].append(row)
    found = {}
    for name in ("scored", "accepted", "random"):
        path = os.path.join(args.scored, f"{name}.jsonl")
        rows = list(records.read_records(path, ("answer", "task", "reward"), records.ANYWHERE))
        right = {row["id"]: judge(row, known[os.path.realpath(row["image"])]) for row in rows}
        found[name] = measure(rows, right)
        for task in sorted({row["task"] for row in rows}):
            found[name].setdefault("by_task", {})[task] = measure(
                [r for r in rows if r["task"] == task], right
            )
    runs.write_json(args.out, found)
    for name, part in found.items():
        print(f"{name}: {part['right']:.3f} right of {part['judged']} judged, {part['candidates']} in all")


# ---------------------------------------------------------------------------------------------------------
# Baselines.


def baselines(args):
    answers, positions = Counter(), Counter()
    for row in records.read_records(args.train, (*records.QUESTION, "dataset", "task"), records.ANYWHERE):
        answers[row["dataset"], row["task"], normalise(row["answer"])] += 1
        positions[row["options"].index(row["answer"])] += 1
    asked = list(
        records.read_records(os.path.join(args.eval, "predictions.jsonl"), ("options",), records.ANYWHERE)
    )

    def majority(row):
        cell = row["dataset"], row["task"]
        return max(row["options"], key=lambda option: answers[*cell, normalise(option)])

    def position(row):
        return max(enumerate(row["options"]), key=lambda place: positions[place[0]])[1]

    answer_with = {"majority": majority, "position": position}
    if "blind" in asked[0]:
        answer_with["blind"] = itemgetter("blind")
    for name, answer in answer_with.items():
        said = [
            row | {"prediction": answer(row), "correct": is_match(answer(row), row["answer"])}
            for row in asked
        ]
        records.write_records(os.path.join(args.out, f"eval_{name}", "predictions.jsonl"), said)


# ---------------------------------------------------------------------------------------------------------


def parse_args():
    p = cli.Parser(description=__doc__)
    commands = p.add_subparsers(dest="command", required=True)
    s = commands.add_parser("split", help="divide the data")
    s.add_argument("--data", required=True, help="folder with train.jsonl, test.jsonl and their images")
    s.add_argument("--out", required=True, help="folder for the parts")
    m = commands.add_parser("models", help="train the base models")
    m.add_argument("--data", required=True, help="folder that split wrote")
    m.add_argument("--image-root", required=True, help="folder of all images")
    m.add_argument("--out", required=True, help="folder for the models, each under its role")
    m.add_argument("--steps", type=int, nargs=2, metavar="N", help="steps of phases 1 and 2, if not the own")
    for command in (s, m):
        command.add_argument("--seed", type=int, default=0, help="of the parts, or of the weights")
    k = commands.add_parser("marks", help="judge candidates by held labels")
    k.add_argument("--scored", required=True, help="output folder of reward.py score")
    k.add_argument("--truth", required=True, help="truth.jsonl")
    k.add_argument("--out", required=True, help="JSON file to write")
    o = commands.add_parser("held-out", help="the expert questions and images without a modality and a task")
    o.add_argument("--data", required=True, help="folder that split wrote")
    o.add_argument("--modality", required=True)
    o.add_argument("--task", required=True)
    o.add_argument("--out", required=True, help="folder for the files")
    b = commands.add_parser("baselines", help="what is right without the image")
    b.add_argument("--eval", required=True, help="output folder of eval.py")
    b.add_argument("--train", required=True, help="training questions")
    b.add_argument("--out", required=True, help="folder for the evaluations")
    return p.parse_args()


def main(args):
    steps = {"split": split, "held-out": leave_out, "models": models, "marks": marks, "baselines": baselines}
    steps[args.command](args)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
