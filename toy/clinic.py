"""The toy clinic: draws small medical-looking images and writes records about them.

Each image is drawn from five facts: modality (8), anatomy (4), finding (5, one of them none), degree (3) and
side (2). Questions, options, rationales and reports follow from the facts. So every record is true, and what
a model says can be checked. Any modality may show any anatomy (a dermoscopy of the brain is nonsense on
purpose): no fact can be guessed from another, so a model can know it only from the image.

What a sign means depends on the modality, as in medicine. The modalities form three families. In each, a
finding has another shape; the same degree is larger in the magnifying families; an organ has another outline
in the optical one; and radiographs show the patient's right on the left. A model that was taught one family
reads the others wrongly, although it sees them well. The rationale names the sign, then draws the conclusion.

Writes into --out:
    expert.jsonl             question records; few, because experts' time is scarce
    reports.jsonl            image-report pairs
    unlabelled/images.jsonl  images without text, for the generator
    unlabelled/truth.jsonl   their facts, for toy/mark.py; no stage reads it
    val.jsonl, test.jsonl    question records on other images
    plenty.jsonl             with --plenty: many more expert questions, for the ceiling
    heldout/                 the same files of another clinic whose training files lack one modality and one
                             task; val and test have them, to measure transfer

    python toy/clinic.py --out runs/toy/data --seed 0
"""

import os
import random
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from medgr2 import cli, records, runs
from medgr2.prompts import MODALITIES, PARADIGMS, TASKS

# Height and width in pixels.
SIZE = 64
ANATOMIES = ("brain", "chest", "abdomen", "knee")
FINDINGS = ("mass", "cyst", "calcification", "fissure", "no finding")
DEGREES = ("mild", "moderate", "severe")
SIDES = ("left", "right")
# The modalities of a family share the meaning of signs.
FAMILIES = {
    "radiographic": ("CT", "X-Ray"),
    "acoustic": ("MRI", "Ultrasound", "OCT"),
    "optical": ("Dermoscopy", "Fundus Photography", "Microscopy"),
}
FAMILY_OF = {modality: family for family, modalities in FAMILIES.items() for modality in modalities}
# The shape of each finding, in the order of FINDINGS.
SHAPES = {
    "radiographic": ("disc", "ring", "dots", "line", "nothing"),
    "acoustic": ("ring", "dots", "line", "disc", "nothing"),
    "optical": ("dots", "line", "disc", "ring", "nothing"),
}
# The outline of each anatomy, in the order of ANATOMIES.
OUTLINES = {
    "radiographic": ("round", "lobes", "wide", "shaft"),
    "acoustic": ("round", "lobes", "wide", "shaft"),
    "optical": ("lobes", "wide", "shaft", "round"),
}
# The index in SIZES of the mildest degree; the others follow.
MILDEST = {"radiographic": 0, "acoustic": 1, "optical": 1}
# Radius in pixels by name.
SIZES = {"tiny": 3.4, "small": 5.2, "medium": 7.8, "large": 11.6}
# The words for what is seen.
CLUES = {
    "disc": "a solid round spot",
    "ring": "a hollow ring",
    "dots": "a cluster of dots",
    "line": "a long thin line",
    "nothing": "nothing unusual",
    "round": "one round outline",
    "lobes": "two long lobes",
    "wide": "one wide outline",
    "shaft": "an upright shaft",
    "CT": "a bright rim on black",
    "MRI": "a soft glow on black",
    "X-Ray": "a grey film with bars",
    "Ultrasound": "a speckled fan",
    "Dermoscopy": "skin with hairs",
    "Fundus Photography": "an orange disc",
    "Microscopy": "violet cells",
    "OCT": "stacked bands",
}
QUESTIONS = {
    "Modality Recognition": ("Which modality is this image?", "How was this image acquired?"),
    "Anatomy Identification": ("Which anatomy is shown?", "Which part of the body is this?"),
    "Disease Diagnosis": ("Which finding is present?", "What is the most likely diagnosis?"),
    "Lesion Grading": ("How severe is the lesion?", "What is the grade of the lesion?"),
    "Other Biological Attributes": ("On which side is the lesion?", "Which side is affected?"),
}


def draw_facts(rng, modalities=MODALITIES):
    """One image's facts. `degree` and `side` are None if there is no finding."""
    finding = rng.choice(FINDINGS)
    is_empty = finding == "no finding"
    return {
        "modality": rng.choice(modalities),
        "anatomy": rng.choice(ANATOMIES),
        "finding": finding,
        "degree": None if is_empty else rng.choice(DEGREES),
        "side": None if is_empty else rng.choice(SIDES),
    }


def shape_of(modality, finding):
    """The shape that a finding has in this modality."""
    return SHAPES[FAMILY_OF[modality]][FINDINGS.index(finding)]


def outline_of(modality, anatomy):
    """The outline that an anatomy has in this modality."""
    return OUTLINES[FAMILY_OF[modality]][ANATOMIES.index(anatomy)]


def size_of(modality, degree):
    """The name of the size that a lesion of this degree has in this modality."""
    return list(SIZES)[MILDEST[FAMILY_OF[modality]] + DEGREES.index(degree)]


def image_side(modality, side):
    """The side of the image on which the patient's `side` is seen. Radiographs are mirrored."""
    return SIDES[1 - SIDES.index(side)] if FAMILY_OF[modality] == "radiographic" else side


# ---------------------------------------------------------------------------------------------------------
# From facts to pixels.


def organ_mask(outline, rng):
    """Where the organ is: (SIZE, SIZE) floats in [0, 1], soft at the edge, with random place and scale."""
    import numpy as np

    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(float)
    x, y = x - SIZE / 2 - rng.uniform(-2, 2), y - SIZE / 2 - rng.uniform(-2, 2)
    s = rng.uniform(0.95, 1.05)
    if outline == "round":
        r = np.hypot(x / (23 * s), y / (25 * s))
    elif outline == "lobes":
        right, left = np.hypot((x - 13) / (11 * s), y / (25 * s)), np.hypot((x + 13) / (11 * s), y / (25 * s))
        r = np.minimum(right, left)
    elif outline == "wide":
        r = (np.abs(x / (29 * s)) ** 4 + np.abs(y / (17 * s)) ** 4) ** 0.25
    else:
        # A shaft, wider in the middle.
        width = 10 * s + 9 * np.exp(-((y / 8) ** 2))
        r = np.maximum(np.abs(x) / width, np.abs(y) / 30)
    return 1 / (1 + np.exp((r - 1) * 12))


def lesion_mask(facts, rng):
    """Where the lesion is: (SIZE, SIZE) floats in [0, 1], all 0 if there is no finding."""
    import numpy as np

    if facts["finding"] == "no finding":
        return np.zeros((SIZE, SIZE))
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(float)
    shape = shape_of(facts["modality"], facts["finding"])
    radius = SIZES[size_of(facts["modality"], facts["degree"])] * rng.uniform(0.95, 1.05)
    direction = -1 if image_side(facts["modality"], facts["side"]) == "left" else 1
    cx = SIZE / 2 + direction * rng.uniform(10, 16)
    cy = SIZE / 2 + rng.uniform(-9, 9)
    d = np.hypot(x - cx, y - cy)
    if shape == "disc":
        return 1 / (1 + np.exp((d - radius) * 2))
    if shape == "ring":
        return np.exp(-(((d - radius) / 1.1) ** 2))
    if shape == "line":
        angle, length = rng.uniform(-0.5, 0.5), radius * 1.6
        along = (x - cx) * np.sin(angle) + (y - cy) * np.cos(angle)
        across = (x - cx) * np.cos(angle) - (y - cy) * np.sin(angle)
        return np.exp(-((across / 1.1) ** 2)) / (1 + np.exp((np.abs(along) - length) * 2))
    # Dots that fill the disc.
    mask = np.zeros((SIZE, SIZE))
    for k in range(int(3 + radius)):
        a, r = 2.4 * k + rng.uniform(-0.3, 0.3), radius * ((k + 0.5) / (3 + radius)) ** 0.5
        squared_distance = (x - cx - r * np.cos(a)) ** 2 + (y - cy - r * np.sin(a)) ** 2
        mask = np.maximum(mask, np.exp(-(squared_distance / 1.2)))
    return mask


def draw(facts, rng):
    """Draw the facts as a PIL RGB image, SIZE × SIZE; `rng` (random.Random) moves, scales and adds noise."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(rng.getrandbits(32))
    organ = organ_mask(outline_of(facts["modality"], facts["anatomy"]), rng)
    lesion = lesion_mask(facts, rng)
    grain = noise.normal(size=(SIZE, SIZE))
    image = render(facts["modality"], organ, lesion, grain, rng)
    image = 128 + (image - 128) * rng.uniform(0.85, 1.1) + rng.uniform(-10, 10)
    image = np.clip(np.broadcast_to(image, (3, SIZE, SIZE)), 0, 255).astype("uint8")
    return Image.fromarray(image.transpose(1, 2, 0))


def render(modality, organ, lesion, grain, rng):
    """The image in the style of a modality: (3, SIZE, SIZE) floats. Masks and noise are (SIZE, SIZE)."""
    import numpy as np

    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(float)

    def tint(ground, tissue, spot):
        """Three RGB colours, blended by the two masks."""
        base = np.array(ground)[:, None, None] * (1 - organ) + np.array(tissue)[:, None, None] * organ
        return base * (1 - lesion) + np.array(spot)[:, None, None] * lesion

    if modality == "CT":
        edge = np.clip(4 * organ * (1 - organ), 0, 1)
        return tint((8,) * 3, (95,) * 3, (200,) * 3) + 150 * edge + 6 * grain
    if modality == "MRI":
        glow = 1 - 0.35 * np.hypot(x - 32, y - 32) / 45
        return tint((4,) * 3, (140,) * 3, (245,) * 3) * glow + 5 * grain
    if modality == "X-Ray":
        bars = np.sin(y * 2 * np.pi / 12 + rng.uniform(0, 6)) > 0.6
        return tint((150,) * 3, (90,) * 3, (225,) * 3) + 25 * bars + 6 * grain
    if modality == "Ultrasound":
        fan = np.abs(x - 32) < 8 + 0.6 * y
        return (tint((70,) * 3, (110,) * 3, (235,) * 3) * (1 + 0.2 * grain)) * fan
    if modality == "Dermoscopy":
        image = tint((226, 178, 150), (190, 130, 105), (70, 35, 25)) + 5 * grain
        for _ in range(4):
            a, b = rng.uniform(0, SIZE), rng.uniform(-0.6, 0.6)
            image = np.where(np.abs(x - a - b * y) < 0.8, image * 0.55, image)
        return image
    if modality == "Fundus Photography":
        disc = np.hypot(x - 32, y - 32) < 31
        return tint((190, 80, 25), (225, 125, 50), (255, 240, 150)) * disc + 5 * grain
    if modality == "Microscopy":
        cells = np.sin(x * 0.9 + rng.uniform(0, 6)) * np.sin(y * 0.9 + rng.uniform(0, 6)) > 0.35
        return tint((235, 215, 235), (205, 150, 205), (80, 20, 110)) - 22 * cells + 5 * grain
    # OCT.
    bands = 30 * np.sin(y * 2 * np.pi / 9 + 0.06 * x + rng.uniform(0, 6))
    return tint((20, 30, 45), (95, 110, 130), (225, 235, 245)) + bands + 10 * grain


# ---------------------------------------------------------------------------------------------------------
# From facts to words.


def report_text(facts):
    """The image's report: every fact, in two short sentences."""
    lesion = "No finding."
    if facts["side"] is not None:
        lesion = f"A {facts['degree']} {facts['finding']} on the {facts['side']} side."
    return f"{facts['modality']} of the {facts['anatomy']}. {lesion}"


def truth(facts, task):
    """(answer, all options) of a question of this task about an image of these facts."""
    return {
        "Modality Recognition": (facts["modality"], MODALITIES),
        "Anatomy Identification": (facts["anatomy"], ANATOMIES),
        "Disease Diagnosis": (facts["finding"], FINDINGS),
        "Lesion Grading": (facts["degree"] or "no lesion", DEGREES + ("no lesion",)),
        "Other Biological Attributes": (facts["side"] or "no lesion", SIDES + ("no lesion",)),
    }[task]


def clue(facts, task, answer):
    """What can be seen in the image if `answer` is true."""
    if answer == "no lesion":
        answer = "no finding"
    if answer in FINDINGS:
        return CLUES[shape_of(facts["modality"], answer)]
    if task == "Lesion Grading":
        return f"a {size_of(facts['modality'], answer)} sign"
    if task == "Other Biological Attributes":
        return f"a sign on the image's {image_side(facts['modality'], answer)}"
    if answer in ANATOMIES:
        return CLUES[outline_of(facts["modality"], answer)]
    return CLUES[answer]


def rationale(facts, task, rng, paradigm="stepwise"):
    """Why the answer is right, in the style of one of the paper's paradigms."""
    answer, options = truth(facts, task)
    seen = clue(facts, task, answer)
    if paradigm == "direct":
        return f"{seen}: {answer}."
    if paradigm == "stepwise":
        return f"{facts['modality']} of the {facts['anatomy']}. I see {seen}. So {answer}."
    other = rng.choice([o for o in options if o != answer])
    would_see = clue(facts, task, other)
    return f"{other} or {answer}? For {other} I would see {would_see}, but I see {seen}. So {answer}."


def question(facts, task, rng, paradigm="stepwise"):
    """A question record about an image (without `id` and `image`), its options in random order."""
    answer, options = truth(facts, task)
    wrong = rng.sample([o for o in options if o != answer], min(3, len(options) - 1))
    return {
        "question": rng.choice(QUESTIONS[task]),
        "options": rng.sample([answer, *wrong], len(wrong) + 1),
        "rationale": rationale(facts, task, rng, paradigm),
        "answer": answer,
        "modality": facts["modality"],
        "task": task,
        "source": "expert",
    }


# ---------------------------------------------------------------------------------------------------------
# From words and pixels to files.


def image_rows(folder, split, n, seed, modalities=MODALITIES):
    """Draw n images into folder/images; yields (row with id, image and modality, facts, rng) per image."""
    os.makedirs(os.path.join(folder, "images"), exist_ok=True)
    for i in range(n):
        # An image depends only on its own number.
        rng = random.Random(f"{seed} {split} {i}")
        facts = draw_facts(rng, modalities)
        path = os.path.abspath(os.path.join(folder, "images", f"{split}{i:05d}.png"))
        draw(facts, rng).save(path)
        yield {"id": f"{split}{i:05d}", "image": path, "modality": facts["modality"]}, facts, rng


def question_rows(folder, split, n, seed, per_image, tasks=TASKS, modalities=MODALITIES):
    """Question records on n images, of `per_image` different tasks each."""
    for row, facts, rng in image_rows(folder, split, n, seed, modalities):
        for k, task in enumerate(rng.sample(tasks, min(per_image, len(tasks)))):
            # Experts do not all reason alike.
            paradigm = rng.choice(list(PARADIGMS))
            yield row | question(facts, task, rng, paradigm) | {"id": f"{row['id']}-{k}"}


def write_clinic(folder, sizes, seed, modalities=MODALITIES, tasks=TASKS):
    """Write the files of one clinic. Its training files have only these modalities and tasks.

    `sizes`: images in expert, reports, unlabelled, val, test. Returns {file: number of records}.
    """
    os.makedirs(os.path.join(folder, "unlabelled"), exist_ok=True)
    expert, reports, unlabelled, val, test = sizes
    images = list(image_rows(os.path.join(folder, "unlabelled"), "unlabelled", unlabelled, seed, modalities))
    written = {
        "expert.jsonl": question_rows(folder, "expert", expert, seed, 3, tasks, modalities),
        "reports.jsonl": (
            row | {"report": report_text(facts), "source": "expert"}
            for row, facts, _ in image_rows(folder, "report", reports, seed, modalities)
        ),
        "unlabelled/images.jsonl": (row for row, _, _ in images),
        "unlabelled/truth.jsonl": ({"id": row["id"], "facts": facts} for row, facts, _ in images),
        "val.jsonl": question_rows(folder, "val", val, seed, 2),
        "test.jsonl": question_rows(folder, "test", test, seed, 2),
    }
    return {name: records.write_records(os.path.join(folder, name), rows) for name, rows in written.items()}


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("--out", required=True, help="folder to write; if it exists, nothing is done")
    p.add_argument("--seed", type=int, default=0, help="another seed gives another clinic")
    sizes = (100, 200, 360, 200, 800)
    what = "images in expert, reports, unlabelled, val, test"
    p.add_argument("--sizes", type=int, nargs=5, default=sizes, metavar="N", help=what)
    p.add_argument("--plenty", type=int, default=0, help="images in plenty.jsonl, three questions about each")
    what = "missing from the training files of heldout/"
    p.add_argument("--heldout-modality", default="OCT", choices=MODALITIES, help=what)
    p.add_argument("--heldout-task", default="Lesion Grading", choices=TASKS, help=what)
    return p.parse_args()


def main(args):
    if os.path.exists(args.out):
        return print(f"{args.out} exists already")
    part = args.out.rstrip("/") + ".part"
    # Another process may still be drawing this clinic.
    lock = runs.take_lock(part)
    # What a killed call left. Drawing it again takes seconds.
    runs.clear(part)
    counts = write_clinic(part, args.sizes, args.seed)
    if args.plenty:
        path = os.path.join(part, "plenty.jsonl")
        counts["plenty.jsonl"] = records.write_records(
            path, question_rows(part, "plenty", args.plenty, args.seed, 3)
        )
    modalities = [modality for modality in MODALITIES if modality != args.heldout_modality]
    tasks = [task for task in TASKS if task != args.heldout_task]
    write_clinic(os.path.join(part, "heldout"), args.sizes, args.seed + 1, modalities, tasks)
    os.replace(part, args.out)
    os.remove(os.path.join(args.out, "lock"))
    lock.close()
    shown = ", ".join(f"{n} in {name}" for name, n in counts.items())
    print(f"{args.out}: {shown}; heldout/ likewise")


if __name__ == "__main__":
    cli.run_main(main, parse_args())
