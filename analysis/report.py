"""The report: one page that shows a run, `report.html`, self-contained, for any browser, offline.

It holds a figure of the accuracy after each stage of each cycle, for all questions or one task, the tables
of metrics.json files, figures, the curves of metrics.jsonl files, and items to page through: image, question,
options, rationale, answer, rewards and each run's response, with filters and a search. An evaluated question
is one item with the responses of all runs that answered it, so that runs can be compared on it. The name of a
run, or of a task or modality, in a table leads to its items.

The page can do no harm. Records are untrusted text: they travel as JSON and are shown as text only, never as
HTML. The page's Content-Security-Policy names the hash of its own script and style and forbids everything
else, the network included. Figures are embedded as images, in which scripts never run.

Reads   a cycle's folder as cycle.sh leaves it (--run), and any files of the same kinds, each [LABEL=]FILE;
        the args.json beside a metrics file and the accepted.jsonl beside a scored.jsonl, if they exist
Writes  the page, the same bytes for the same input; report_template.html has its HTML, CSS and JavaScript

    python -m analysis.report --run runs/toy --out runs/toy/report.html
    python -m analysis.report --predictions a=runs/a/predictions.jsonl b=runs/b/predictions.jsonl --out a.html
"""

import base64
import glob
import hashlib
import heapq
import io
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor

from medgr2 import cli, records, runs
from medgr2.errors import RecordError, RunError
from medgr2.images import hash_image, open_image, require_file
from medgr2.prompts import is_match

TEMPLATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "report_template.html")
KINDS = ("metrics", "predictions", "scored", "figures")
# Most points of a curve: more would not be visible.
POINTS = 200
# The policies of a cycle's folder, in order, with the names that they have in the table of cycle.sh.
START = {
    "base": "base",
    "sft_expert": "SFT on expert data",
    "ceiling": "ceiling: SFT on plenty of expert data",
}
# And those of the folder of each cycle. With FILTER=random `sft` has the name of `sft_random`.
POLICIES = {
    "sft": "SFT on accepted",
    "grpo": "+ GRPO",
    "sft_first": "SFT on accepted of cycle 1",
    "sft_random": "SFT on random",
    "sft_more": "+ as many SFT steps",
}
# Its other runs: those before the policies and the one after them.
BEFORE, AFTER = {"reward": "reward model", "scored": "candidates"}, {"generator": "generator"}
# Metrics whose curves are shown first; the others are folded away.
MAIN_CURVES = "reward reward_model match watch_accuracy watch_reward loss kl entropy length".split()
# Fields of a record, and of a response, that an item keeps.
RECORD_FIELDS = "id question options rationale answer modality task source paradigm reward".split()
RESPONSE_FIELDS = ("response", "prediction", "reason", "rollout_scores")


# ---------------------------------------------------------------------------------------------------------
# Which files: {kind: [(label, path)]}.


def parse_label(value, by_name=False):
    """(label, path) of [LABEL=]FILE. Without LABEL, the file's name or the last two folders of its path."""
    label, equals, path = value.rpartition("=")
    folder, name = os.path.split(os.path.abspath(path))
    if not equals:
        label = name if by_name else "/".join(folder.split(os.sep)[-2:])
    return label, path


def name_runs(folder):
    """{folder of a run, below `folder`: its name} of a cycle, as its table has it, in the order of stages."""
    named = {}

    def add(prefix, policies, path="", evaluated=True):
        for run, name in policies.items():
            named[f"{path}{run}"] = prefix + name
            if evaluated:
                named[f"{path}eval_{run}"] = prefix + name

    add("", START)
    settings = os.path.join(folder, "settings")
    is_random = os.path.isfile(settings) and "FILTER=random" in read_lines(settings)
    policies = POLICIES | {"sft": POLICIES["sft_random"]} if is_random else POLICIES
    for c in range(1, count_cycles(folder) + 1):
        named[f"cycle{c}"] = f"cycle {c}: candidates"
        add(f"cycle {c}: ", BEFORE, f"cycle{c}/", evaluated=False)
        add(f"cycle {c}: ", policies, f"cycle{c}/")
        add(f"cycle {c}: ", AFTER, f"cycle{c}/", evaluated=False)
    return named


def count_cycles(folder):
    return len(glob.glob(os.path.join(glob.escape(folder), "cycle[0-9]*")))


def read_lines(path):
    with open(path, encoding="utf-8") as file:
        return file.read().splitlines()


def find_cycle_files(folder):
    """What cycle.sh leaves in `folder`, in the order of its stages. Raises RunError if that is nothing."""
    named = name_runs(folder)

    def existing(file, *kinds):
        """(name, path) of each run that has the file, of these kinds of run only."""
        found = [(name, run, os.path.join(folder, run, file)) for run, name in named.items()]
        kept = [(n, path) for n, run, path in found if os.path.basename(run).startswith(kinds or "")]
        return [(name, path) for name, path in kept if os.path.isfile(path)]

    figures = sorted(glob.glob(os.path.join(glob.escape(folder), "**", "*.svg"), recursive=True))
    files = {
        "metrics": [
            *existing("metrics.json", "eval", "reward", "scored"),
            *existing("marks.json"),
            *existing("metrics.jsonl"),
        ],
        "predictions": existing("predictions.jsonl"),
        "scored": existing("scored.jsonl"),
        "figures": [(os.path.relpath(path, folder), path) for path in figures],
    }
    if not any(files.values()):
        what = "give the OUT of cycle.sh, or files by --predictions, --metrics, ..."
        raise RunError(f"{folder}: no cycle's folder; {what}")
    return files


def gather_files(run, given):
    """The files of the cycle's folder `run`, if any, then those in `given`: {kind: [[LABEL=]FILE]}.

    Raises RunError if there are none, or if two files of predictions, or of scores, have the same label.
    """
    files = find_cycle_files(run) if run else {kind: [] for kind in KINDS}
    for kind, values in given.items():
        files[kind] += [parse_label(value, by_name=kind == "figures") for value in values]
    for kind in ("predictions", "scored"):
        labels = [label for label, _ in files[kind]]
        for label in labels:
            if labels.count(label) > 1:
                raise RunError(f"--{kind}: two files are called {label}; give LABEL=FILE")
    if not any(files.values()):
        what = "give --run FOLDER, or files by --predictions, --scored, --metrics, --figures"
        raise RunError(f"nothing to report; {what}")
    return files


def read_json(path, lines=False):
    """The JSON object of a file, or of each of its lines. Raises RunError if it is none.

    NaN and infinities, which a page cannot hold, become None.
    """
    require_file(path)
    try:
        with open(path, encoding="utf-8") as file:
            texts = [line for line in file if line.strip()] if lines else [file.read()]
        values = [json.loads(text, parse_constant=lambda name: None) for text in texts]
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: {error}; give a file that a stage wrote") from None
    if not all(isinstance(value, dict) for value in values):
        raise RunError(f"{path}: not a JSON object; give a file that a stage wrote")
    return values if lines else values[0]


def script_of(path):
    """The script that wrote a metrics file, by the args.json beside it; without one, the file's own name."""
    args = os.path.join(os.path.dirname(path), "args.json")
    return str(read_json(args).get("script", "")) if os.path.isfile(args) else os.path.basename(path)


# ---------------------------------------------------------------------------------------------------------
# Tables and curves.


def all_keys(dicts):
    """The keys of all dicts, in the order in which they are met."""
    return list(dict.fromkeys(key for d in dicts for key in d))


def shown_measure(group):
    """The measure shown for a group: the one that has an interval, else the first fraction, else ""."""
    names = list(group)
    if "low" in names[1:]:
        return names[names.index("low") - 1]
    return next((name for name in names if isinstance(group[name], float)), "")


def format_cell(value, low=None, high=None):
    """[text] of a number, text or group, or [text, interval] if it has an interval; else [""]."""
    if isinstance(value, dict):
        return format_cell(value.get(shown_measure(value)), value.get("low"), value.get("high"))
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return [""]
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return [text] if None in (low, high) else [text, f"{low:.3f} to {high:.3f}"]


def format_columns(result):
    """{column: cell} of a metrics.json's own numbers; `low` and `high` join the number before them."""
    columns, before = {}, None
    for name, value in result.items():
        if name in ("low", "high") and before:
            columns[before] = format_cell(result[before], result.get("low"), result.get("high"))
        elif isinstance(value, (int, float, str)):
            columns[name], before = format_cell(value), name
    return columns


def find_groups(result):
    """{name: group} of a metrics.json: what it has by modality, by level, ...

    A group that is a group of groups is also taken apart, as `outer: inner`, but no deeper.
    """
    found = {}
    for field, group in result.items():
        if isinstance(group, dict):
            found[field] = group
            for name, inner in group.items():
                if isinstance(inner, dict) and any(isinstance(value, dict) for value in inner.values()):
                    found[f"{field}: {name}"] = inner
    return found


def make_tables(files):
    """Tables: of each script's results, a row per file; of each group in them, a column per file."""
    by_script = {}
    for label, path in files:
        by_script.setdefault(script_of(path), []).append((label, read_json(path)))
    tables = []
    for script, results in by_script.items():
        tables += [make_overall_table(script, results), *make_group_tables(script, results)]
    return tables


def make_overall_table(script, results):
    """The table of a script's own numbers; `results`: [(label, metrics.json)]."""
    rows = [format_columns(result) for _, result in results]
    # Columns with an interval first.
    columns = sorted(all_keys(rows), key=lambda c: all(len(row.get(c, "")) < 2 for row in rows))
    lines = [[[label], *(row.get(c, [""]) for c in columns)] for (label, _), row in zip(results, rows)]
    return {"title": script, "columns": columns, "rows": lines}


def make_group_tables(script, results):
    """Yield a table for each group of a script's results, but for groups with nothing that can be shown."""
    grouped = [(label, find_groups(result)) for label, result in results]
    for field in all_keys(groups for _, groups in grouped):
        having = [(label, groups[field]) for label, groups in grouped if field in groups]
        rows, measures = [], {}
        for name in all_keys(group for _, group in having):
            cells = [format_cell(group.get(name)) for _, group in having]
            if any(cell != [""] for cell in cells):
                rows.append([[name], *cells])
        for _, group in having:
            measures |= {shown_measure(value): None for value in group.values() if isinstance(value, dict)}
        if rows:
            title = " ".join([f"{script}: {field}", *filter(None, measures)])
            yield {"title": title, "field": field, "columns": [label for label, _ in having], "rows": rows}


def make_headline(folder):
    """The accuracy of a cycle's policies, or None without a cycle: {"groups", "cycles", "levels", "lines"}.

    groups: "" (all questions), then the tasks. A point is [cycle, {group: [accuracy, low, high]}]. lines:
    [{"name", "points"}], one for each stage; levels: the same, with one point, for what comes before.
    """
    levels, lines = {}, {}
    for run, name in name_runs(folder).items():
        path = os.path.join(folder, run, "metrics.json")
        if os.path.basename(run).startswith("eval") and os.path.isfile(path):
            result, (cycle, _, stage) = read_json(path), name.rpartition(": ")
            groups = {"": result} | result.get("task", {})
            point = {
                group: [r.get(key) for key in ("accuracy", "low", "high")] for group, r in groups.items()
            }
            if name in START.values():
                levels[name] = [[0, point]]
            else:
                lines.setdefault(stage, []).append([int(cycle.removeprefix("cycle ")), point])
    if not lines:
        return None
    points = [point for own in (levels | lines).values() for _, point in own]
    return {
        "groups": all_keys(points),
        "cycles": count_cycles(folder),
        "levels": [{"name": name, "points": own} for name, own in levels.items()],
        "lines": [{"name": name, "points": own} for name, own in lines.items()],
    }


def make_curves(files):
    """[{"title", "metric", "main", "lines": [{"label", "x", "y"}]}]: one for each metric of each script."""
    panels = {}
    for label, path in files:
        rows, script = read_json(path, lines=True), script_of(path)
        for metric in all_keys(rows):
            points = [(row.get("step", i), row.get(metric)) for i, row in enumerate(rows)]
            points = thin_out([(x, y) for x, y in points if type(y) in (int, float)])
            if metric != "step" and len(points) > 1:
                x, y = zip(*points)
                panels.setdefault((script, metric), []).append({"label": label, "x": x, "y": y})
    # The sort is stable: scripts stay in order.
    rank = {metric: i for i, metric in enumerate(MAIN_CURVES)}
    order = sorted(panels, key=lambda panel: rank.get(panel[1], len(rank)))
    return [
        {"title": script, "metric": metric, "main": metric in rank, "lines": panels[script, metric]}
        for script, metric in order
    ]


def thin_out(points):
    """At most POINTS of the points, evenly spaced, first and last included."""
    if len(points) <= POINTS:
        return points
    return [points[i * (len(points) - 1) // (POINTS - 1)] for i in range(POINTS)]


# ---------------------------------------------------------------------------------------------------------
# Items: {RECORD_FIELDS, "set", "path" of the image, then "responses" or "accepted"}.


class Draw:
    """At most `limit` of all items, drawn by `seed`, in the order of the files; of the others only a number.

    An item's random number follows from its key, and the lowest numbers win: so an item of several files is
    drawn in all of them or in none.
    """

    def __init__(self, limit, seed):
        self.limit, self.seed, self.items = limit, seed, {}
        # The numbers of all items, and those of the drawn ones, the highest first.
        self.numbers, self.highest = set(), []

    def get(self, key, item):
        """The drawn item with this key, which is `item` if it is new; None if it is not drawn."""
        if key not in self.items:
            number = runs.seed_of(self.seed, *key)
            self.numbers.add(number)
            self.items[key] = item
            heapq.heappush(self.highest, (-number, key))
            if len(self.items) > self.limit:
                del self.items[heapq.heappop(self.highest)[1]]
        return self.items.get(key)


def make_item(row, name):
    return {field: row[field] for field in RECORD_FIELDS if field in row} | {
        "set": name,
        "path": row.get("image"),
    }


def read_evaluated(draw, files, root=None):
    """An item per question, with the response of each file that has it: the same id, image and texts."""
    for label, path in files:
        for row in records.read_answered(path, ("id", "question", "prediction"), root):
            key = (row["id"], row["question"], row["answer"], row.get("image_hash", row.get("image")))
            item = draw.get(key, make_item(row, "evaluated") | {"responses": []})
            if item is None:
                continue
            correct = row.get("correct", is_match(row["prediction"], row["answer"]))
            response = {field: row[field] for field in RESPONSE_FIELDS if row.get(field) is not None}
            item["responses"].append({"run": label, "correct": bool(correct), **response})


def read_scored(draw, files, root=None):
    """An item per scored candidate, `accepted` if the accepted.jsonl beside the file, if any, has its id."""
    for label, path in files:
        accepted, beside = None, os.path.join(os.path.dirname(path), "accepted.jsonl")
        if os.path.isfile(beside):
            accepted = {row["id"] for row in records.read_records(beside, root=records.ANYWHERE)}
        rows = records.read_records(path, ("id", "question", "answer", "reward"), root)
        for number, row in enumerate(rows):
            item = make_item(row, label)
            if accepted is not None:
                item["accepted"] = row["id"] in accepted
            draw.get((label, number), item)


def thumbnail(path, side):
    """A data URL of the image, made to fit `side` x `side` pixels, WebP; None if it cannot be read."""
    try:
        image = open_image(path)
    except RecordError:
        return None
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=75)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def embed_images(items, side):
    """(items with an index "image" for "path"; data URLs; unreadable files). Equal files share an image."""
    paths = list(dict.fromkeys(item["path"] for item in items if item["path"]))
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda path: hash_image(path) if os.path.isfile(path) else None, paths)
        digest_of, first = dict(zip(paths, digests)), {}
        for path, digest in digest_of.items():
            if digest:
                first.setdefault(digest, path)
        thumbnails = pool.map(lambda path: thumbnail(path, side), first.values())
        urls = {digest: url for digest, url in zip(first, thumbnails) if url}
    index = {digest: i for i, digest in enumerate(urls)}
    embedded = []
    for item in items:
        kept = {field: value for field, value in item.items() if field != "path"}
        embedded.append(kept | {"image": index.get(digest_of.get(item["path"]))})
    return embedded, list(urls.values()), [path for path in paths if digest_of[path] not in index]


# ---------------------------------------------------------------------------------------------------------
# The page.


def embed_figure(path):
    """A figure as a data URL. Raises RunError if it is not an SVG or PNG file."""
    kind = {".svg": "svg+xml", ".png": "png"}.get(os.path.splitext(path)[1].lower())
    if not kind or not os.path.isfile(path):
        raise RunError(f"{path}: no figure; give an SVG or PNG file")
    with open(path, "rb") as file:
        return f"data:image/{kind};base64," + base64.b64encode(file.read()).decode()


def render_page(data):
    """The template with `data` and a policy that lets nothing run or load but what the template holds."""
    with open(TEMPLATE, encoding="utf-8", newline="") as file:
        template = file.read()
    policy = ["default-src 'none'", "img-src data:"]
    for tag in ("style", "script"):
        text = re.search(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        policy.append(f"{tag}-src 'sha256-{digest}'")
    policy += ["base-uri 'none'", "form-action 'none'"]
    head, tail = template.replace("{{POLICY}}", "; ".join(policy)).split("{{DATA}}")
    # Without `<`, no text of the data can end its block.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return head + text + tail


def write_page(path, text):
    """Write beside, then rename: never half a file."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path + ".tmp", "w", encoding="utf-8", newline="") as file:
        file.write(text)
    os.replace(path + ".tmp", path)


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("--run", help="folder of a cycle, as cycle.sh leaves it")
    several = {"nargs": "+", "default": [], "metavar": "[LABEL=]FILE"}
    p.add_argument("--metrics", **several, help="metrics.json for tables, metrics.jsonl for curves")
    p.add_argument("--predictions", **several, help="predictions.jsonl of eval.py, or rollouts.jsonl")
    p.add_argument("--scored", **several, help="scored.jsonl of reward.py")
    p.add_argument("--figures", **several, help="SVG or PNG files to embed")
    p.add_argument("--title", help="the page's heading (the name of --run)")
    p.add_argument("--image-root", help="folder that images may lie in, besides their record file's (--run)")
    p.add_argument("--items", type=int, default=10000, help="most items; if there are more, they are drawn")
    p.add_argument("--thumbnail", type=int, default=160, help="longest side of an image, in pixels")
    p.add_argument("--seed", type=int, default=0, help="of the draw of items")
    p.add_argument("--out", required=True, help="the page to write (report.html)")
    return p.parse_args()


def main(args):
    if args.items < 0 or args.thumbnail < 1:
        raise RunError("--items, --thumbnail: give a number of items, and at least 1 pixel")
    files = gather_files(args.run, {kind: getattr(args, kind) for kind in KINDS})
    root = args.image_root or args.run
    draw = Draw(args.items, args.seed)
    read_evaluated(draw, files["predictions"], root)
    read_scored(draw, files["scored"], root)
    items, images, missing = embed_images(draw.items.values(), args.thumbnail)
    title = args.title or (os.path.basename(os.path.abspath(args.run)) if args.run else "Report")
    curve_files = [f for f in files["metrics"] if f[1].endswith(".jsonl")]
    data = {
        "title": title,
        "total": len(draw.numbers),
        "items": items,
        "images": images,
        "runs": [label for label, _ in files["predictions"]],
        "headline": make_headline(args.run) if args.run else None,
        "tables": make_tables([f for f in files["metrics"] if f not in curve_files]),
        "curves": make_curves(curve_files),
        "figures": [{"label": label, "url": embed_figure(path)} for label, path in files["figures"]],
    }
    text = render_page(data)
    write_page(args.out, text)
    if missing:
        more = ", ..." * (len(missing) > 1)
        print(f"{len(missing)} images cannot be read, their items have none: {missing[0]}{more}")
    share = f" of {len(draw.numbers)} (drawn with --seed {args.seed}; --items to hold more)"
    counts = f"{len(items)} items{share if len(items) < len(draw.numbers) else ''}, {len(images)} images"
    print(f"{args.out}: {counts}, {len(text) / 2**20:.1f} MiB")


if __name__ == "__main__":
    cli.run_main(main, parse_args())
