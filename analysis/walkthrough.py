"""One image through the cycle: a page in Markdown that shows what each stage made of it, beside the code.

It has the prompts about the image and the replies, the parsed record and its score, the four levels that the
reward model learns from, a group of GRPO rollouts with rewards and advantages, and a test question answered
before and after. Each piece is beside a few lines of the function that made it, quoted from its file.

Reads   a finished folder of cycle.sh; the files named in SOURCES; walkthrough_template.md, which has the text
Writes  the page, and its images in the folder figures beside it

    python -m analysis.walkthrough --run runs/toy --out docs/walkthrough.md
"""

import ast
import json
import os
import shlex
import statistics
import string

from medgr2 import cli, levels, prompts, records, runs
from medgr2.errors import RunError
from medgr2.images import open_image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TEMPLATE = os.path.join(ROOT, "analysis", "walkthrough_template.md")
# What the page quotes: file, function, how the first quoted line begins, number of lines.
SOURCES = {
    "prompt": ("medgr2/prompts.py", "generator_prompt", "return (", 5),
    "draft": ("generate.py", "build_drafts", '"id":', 5),
    "parse": ("medgr2/prompts.py", "parse_candidate", 'candidate = {"question"', 2),
    "score": ("reward.py", "RewardModel.__call__", "out = ", 3),
    "select": ("reward.py", "select_candidates", "if threshold is not None", 2),
    "levels": ("medgr2/levels.py", "build_levels", "for make in", 3),
    "reference": ("medgr2/prompts.py", "reference_response", 'if "report"', 3),
    "reward": ("grpo.py", "score_groups", "R_bar, lowest =", 4),
    "advantage": ("grpo.py", "compute_advantages", "centred = ", 1),
    "match": ("medgr2/prompts.py", "is_match", "return ", 1),
}
# The image is the first one that the first of these is true of. The next one serves if no image fits.
RULES = (
    "an accepted candidate that GRPO trained on, a candidate that was not accepted, and a rejected reply",
    "an accepted candidate that GRPO trained on, and a candidate that was not accepted or a rejected reply",
    "an accepted candidate (no image also has another outcome and rollouts)",
)
# The test question is the first one that fits the most of these, each only with all before it.
TEST_RULES = ("the first one", " that was corrected", ", of the same task", " and modality")
# Images are enlarged to at most so many pixels.
LARGEST = 384


# ---------------------------------------------------------------------------------------------------------
# Reading.


def read_json(*path):
    return runs.read_json(os.path.join(*path), "give a finished folder of cycle.sh")


def read_rows(*path):
    """The records of a file; none if it is empty."""
    path = os.path.join(*path)
    return list(records.read_records(path, root=records.ANYWHERE)) if os.path.getsize(path) else []


def find_input(path, folder, args):
    """Where an input of the run in `folder` is now, also if the whole cycle was moved."""
    moved = os.path.normpath(os.path.join(folder, os.path.relpath(path, args["out"])))
    return moved if os.path.exists(moved) else path


def held_out_levels(folder):
    """[(record, {level: response})]: what reward.py held out, drawn again as reward.py drew it.

    Raises RunError if these are not as many responses as the run measured.
    """
    args, measured = read_json(folder, "args.json")["args"], read_json(folder, "metrics.json")["levels"]
    rows = [row for path in args["data"] for row in read_rows(find_input(path, folder, args))]
    rows = [row for row in rows if "answer" in row or "report" in row]
    held = records.split_records(rows, (1 - args["holdout"], 0, args["holdout"]), args["seed"])["test"]
    drawn = levels.build_levels(held, 1, args["seed"])
    names = [level for _, responses in drawn for level, _ in responses]
    if any(names.count(level) != found["n"] for level, found in measured.items()):
        raise RunError(f"{folder}: its held-out responses cannot be drawn again; run cycle.sh with this code")
    return [(record, dict(responses)) for record, responses in drawn]


# ---------------------------------------------------------------------------------------------------------
# Choosing.


def choose_candidate(candidates, rejected, accepted, trained_on):
    """(accepted candidate of the image that the page follows, rule). Raises RunError if there is none."""
    found = {}
    for image in dict.fromkeys(row["parent"] for row in candidates):
        own = [row for row in candidates if row["parent"] == image]
        chosen = [row for row in own if row["id"] in accepted]
        trained = [row for row in chosen if row["id"] in trained_on]
        others = len(chosen) < len(own), any(row["parent"] == image for row in rejected)
        if trained and all(others):
            found.setdefault(0, trained[0])
        elif trained and any(others):
            found.setdefault(1, trained[0])
        elif chosen:
            found.setdefault(2, chosen[0])
    if not found:
        raise RunError("no candidate is accepted; give another run")
    return found[min(found)], RULES[min(found)]


def choose_test_item(before, after, candidate):
    """(row before, row after, rule) of the question that fits the most of TEST_RULES."""
    found = {}
    for row, later in zip(before, after, strict=True):
        fits = [later["correct"] and not row["correct"]]
        fits += [row.get(field) == candidate.get(field) for field in ("task", "modality")]
        found.setdefault(fits.index(False) if False in fits else len(fits), (row, later))
    return *found[max(found)], "".join(TEST_RULES[: max(found) + 1])


# ---------------------------------------------------------------------------------------------------------
# Markdown.


def fence(text, language="text"):
    """A block of code that may hold any text."""
    marks = "```"
    while marks in text:
        marks += "`"
    return f"{marks}{language}\n{text}\n{marks}"


def code(text):
    """Any text as code in a cell of a table."""
    text = " ".join(str(text).split()).replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def table(headers, rows):
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def find_function(tree, name):
    """The node of a function, or of `Class.method`; None if there is none."""
    for part in name.split("."):
        named = [node for node in getattr(tree, "body", ()) if getattr(node, "name", None) == part]
        tree = named[0] if named else None
    return tree


def quote(file, name, start, count, page):
    """A link from the page to a function, and `count` of its lines. Raises RunError if they are gone."""
    with open(os.path.join(ROOT, file), encoding="utf-8") as f:
        text = f.read()
    node = find_function(ast.parse(text), name)
    lines = text.splitlines()[node.lineno - 1 : node.end_lineno] if node else []
    first = [i for i, line in enumerate(lines) if line.strip().startswith(start)]
    if not first:
        raise RunError(f"{file}: no function {name} with a line `{start}`; correct analysis/walkthrough.py")
    link = os.path.relpath(os.path.join(ROOT, file), os.path.dirname(os.path.abspath(page)))
    return f"[{file}: {name}]({link})\n\n" + fence("\n".join(lines[first[0] : first[0] + count]), "python")


def figure(record, name, page):
    """A record's image, saved beside the page and enlarged without smoothing."""
    from PIL import Image

    image = open_image(record["image"])
    factor = max(1, LARGEST // max(image.size))
    link = f"figures/{os.path.splitext(os.path.basename(page))[0]}{name}.png"
    path = os.path.join(os.path.dirname(os.path.abspath(page)), link)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    size = image.width * factor, image.height * factor
    image.resize(size, Image.Resampling.NEAREST).save(path + ".tmp", "PNG")
    os.replace(path + ".tmp", path)
    return f"![{image.width}×{image.height} pixels, enlarged {factor} times]({link})"


# ---------------------------------------------------------------------------------------------------------
# What the template is filled with.


def describe_run(top, candidate):
    """The command that made the run, and what the toy clinic drew."""
    folder = os.path.join(top, "cycle1", "candidates")
    meta = read_json(folder, "args.json")
    args, out = meta["args"], os.path.dirname(os.path.dirname(meta["args"]["out"]))
    with open(os.path.join(top, "settings"), encoding="utf-8") as f:
        settings = dict(line.strip().split("=", 1) for line in f)
    flags = [f"{k}={shlex.quote(v)}" for k, v in settings.items() if v and k.endswith("_FLAGS")]
    command = [f"OUT={shlex.quote(out)} SEED={args['seed']}", *flags, "bash cycle.sh"]
    commit = (meta["git"]["commit"] or "unknown")[:10]
    found = {"command": " ".join(command), "seed": args["seed"], "commit": commit}
    truth = os.path.join(os.path.dirname(find_input(args["images"], folder, args)), "truth.jsonl")
    if not os.path.exists(truth):
        return found | {"facts": ""}
    with open(truth, encoding="utf-8") as f:
        facts = next(row["facts"] for row in map(json.loads, f) if row["id"] == candidate["parent"])
    drawn = ", ".join(f"{name} {value}" for name, value in facts.items())
    return found | {"facts": f"The toy clinic drew it: {drawn}. No stage reads these facts."}


def show_replies(asked):
    """The prompts and the replies of each paradigm; `asked`: the image's records, rejected ones included."""
    kinds, texts, replies = {row["paradigm"]: row["task"] for row in asked}, [], []
    for paradigm in prompts.PARADIGMS:
        text = prompts.generator_prompt(paradigm, kinds.get(paradigm))
        texts.append(f"*{paradigm}*:\n\n{fence(text)}")
    for row in asked:
        outcome = f"rejected: {row['reason']}" if "reason" in row else "kept"
        text = row["text"] if "reason" in row else prompts.format_candidate(row)
        replies.append(f"*{row['paradigm']}*, {row['task']} ({outcome}):\n\n{fence(text)}")
    return {"prompts": "\n\n".join(texts), "replies": "\n\n".join(replies)}


def show_scores(parent, scored, accepted):
    rows = []
    for row in scored:
        if row["parent"] == parent:
            cell = [r for r in scored if all(r.get(k) == row.get(k) for k in ("task", "modality"))]
            best = [r["reward"]["overall"] for r in cell if r["id"] in accepted]
            outcome = "accepted" if row["id"] in accepted else "not accepted"
            share = f"{len(best)} of {len(cell)}", min(best, default="")
            rows.append([row["paradigm"], code(row["answer"]), *row["reward"].values(), outcome, *share])
    headers = ["paradigm", "answer", "R", "relevant", "coherent", "faithful", "outcome"]
    return {"scores": table([*headers, "accepted of these", "lowest R accepted"], rows)}


def show_levels(folder, page):
    measured, rows = read_json(folder, "metrics.json")["levels"], []
    # The first question that has all levels, or as many as there are.
    record, responses = max(held_out_levels(folder), key=lambda pair: ("answer" in pair[0], len(pair[1])))
    for name, found in measured.items():
        target, mean = levels.LEVELS[name][0], f"{found['mean']:.2f}"
        rows.append([name, code(responses.get(name, "")), target, mean, found["n"]])
    prompt = prompts.policy_prompt(record) if "answer" in record else prompts.report_prompt()
    shown = {"level_image": figure(record, "_levels", page), "level_question": fence(prompt)}
    headers = ["level", "response", "target R", "mean R of the level", "responses"]
    return shown | {"level_id": record["id"], "levels": table(headers, rows)}


def show_rollouts(folder, candidate, rollouts):
    args, rows = read_json(folder, "args.json")["args"], []
    if (args["reward_scale"], args["scale_rewards"]) != ("unit", "none"):
        raise RunError(f"{folder}: the page explains only --reward-scale unit and --scale-rewards none")
    # The first group of the candidate, else the first to a question with an answer, else the first.
    first = min(rollouts, key=lambda row: (row["record"] != candidate["id"], "answer" not in row))
    group = [row for row in rollouts if (row["record"], row["step"]) == (first["record"], first["step"])]
    rewards = [row["rollout_reward"] for row in group]
    mean = statistics.mean(rewards)
    for row, reward in zip(group, rewards):
        parsed = prompts.parse_response(row["response"], row.get("options"))
        R = row["rollout_scores"]["overall"]
        match = int(row["correct"]) if "answer" in row else round((R + 6) / 16, 4)
        outcome = R, "yes" if parsed.well_formed else "no", match
        recomputed = f"{reward - mean:.3f}"
        rows.append([code(row["response"]), *outcome, reward, row["advantage"], recomputed])
    headers = ["response", "R", "well-formed", "match", "reward", "advantage", "recomputed"]
    found = {"G": len(group), "step": first["step"], "rollout_id": first["record"]}
    found |= {"rollouts": table(headers, rows)}
    found |= {"alpha": args["alpha"], "beta": args["beta"], "mean": f"{mean:.4f}"}
    prompt, response = prompts.policy_prompt(candidate), prompts.reference_response(candidate)
    return found | {"policy_prompt": fence(prompt), "reference": fence(response)}


def show_answers(top, candidate, page):
    cycles = [name for name in os.listdir(top) if os.path.exists(os.path.join(top, name, "eval_grpo"))]
    last_cycle = max(cycles, key=lambda name: int(name.removeprefix("cycle")))
    names = "eval_base", f"{last_cycle}/eval_grpo"
    before, after = (read_rows(top, name, "predictions.jsonl") for name in names)
    first, last, rule = choose_test_item(before, after, candidate)
    rows = []
    for name, row in zip(names, (first, last)):
        correct = "yes" if row["correct"] else "no"
        rows.append([name, code(row["response"]), code(row["prediction"]), correct])
    changes = [later["correct"] - row["correct"] for row, later in zip(before, after)]
    found = {"corrected": changes.count(1), "introduced": changes.count(-1), "questions": len(before)}
    for key, evaluated in (("accuracy_before", before), ("accuracy_after", after)):
        found[key] = f"{sum(row['correct'] for row in evaluated) / len(evaluated):.3f}"
    found |= {"test_id": first["id"], "test_rule": rule, "test_answer": first["answer"]}
    found |= {
        "test_question": fence(prompts.policy_prompt(first)),
        "test_image": figure(first, "_test", page),
    }
    return found | {"answers": table(["run", "response", "prediction", "correct"], rows)}


def fill_template(top, page):
    """The text of the page. Saves its images."""
    values = {f"code_{key}": quote(*source, page) for key, source in SOURCES.items()}
    folder = os.path.join(top, "cycle1")
    candidates = read_rows(folder, "candidates", "candidates.jsonl")
    rejected = read_rows(folder, "candidates", "rejected.jsonl")
    scored = read_rows(folder, "scored", "scored.jsonl")
    accepted = {row["id"] for row in read_rows(folder, "scored", "accepted.jsonl")}
    rollouts = read_rows(folder, "grpo", "rollouts.jsonl")
    trained_on = {row["record"] for row in rollouts}
    candidate, rule = choose_candidate(candidates, rejected, accepted, trained_on)
    parent = candidate["parent"]
    stored = records.with_relative_image(candidate, os.path.join(folder, "candidates"))
    values |= {"record": fence(json.dumps(stored, ensure_ascii=False, indent=1), "json")}
    values |= {"image_id": parent, "rule": rule, "image": figure(candidate, "", page)}
    values |= describe_run(top, candidate)
    values |= show_replies([row for row in candidates + rejected if row["parent"] == parent])
    values |= show_scores(parent, scored, accepted)
    values |= show_levels(os.path.join(folder, "reward"), page)
    values |= show_rollouts(os.path.join(folder, "grpo"), candidate, rollouts)
    values |= show_answers(top, candidate, page)
    with open(TEMPLATE, encoding="utf-8") as f:
        return string.Template(f.read()).substitute(values)


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("--run", required=True, help="finished folder of cycle.sh")
    p.add_argument("--out", required=True, help="page to write (.md)")
    return p.parse_args()


def main(args):
    for needed in ("settings", "eval_base/metrics.json", "cycle1/eval_grpo/metrics.json"):
        if not os.path.exists(os.path.join(args.run, needed)):
            raise RunError(f"{args.run}: no {needed} in it; give a finished folder of cycle.sh")
    text = fill_template(args.run, args.out)
    with open(args.out + ".tmp", "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(args.out + ".tmp", args.out)
    print(f"{args.out} is written")


if __name__ == "__main__":
    cli.run_main(main, parse_args())
