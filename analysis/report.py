"""The report: one page that shows a run, `report.html`, self-contained, for any browser, offline.

It holds the tables of metrics.json files, figures, curves of metrics.jsonl files, and a page through items: image,
question, options, rationale, answer, rewards, and each run's response, with filters and a search. An evaluated question is
one item, with the responses of all runs that answered it, so runs can be compared on it.

The page can do no harm: records are untrusted text, so they travel as JSON and are shown as text alone, never as HTML, and
the page's Content-Security-Policy names the hash of its own script and style and forbids everything else, all of the network
included. Figures are embedded as images, in which scripts never run.

Reads   a cycle's folder as cycle.sh leaves it (--run), and any files of the same kinds, each [LABEL=]FILE; beside a metrics
        file its args.json, and beside scored.jsonl the accepted.jsonl, where they are there
Writes  the page, always the same bytes for the same input; report_template.html has its HTML, CSS and JavaScript

    python -m analysis.report --run runs/toy --out runs/toy/report.html
    python -m analysis.report --predictions ours=a/predictions.jsonl theirs=b/predictions.jsonl --image-root images --out compared.html
"""

import base64
import glob
import hashlib
import io
import json
import os
import random
import re
from concurrent.futures import ThreadPoolExecutor

from medgr2 import cli, records
from medgr2.errors import RecordError, RunError
from medgr2.images import hash_image, open_image, require_file
from medgr2.prompts import is_match

TEMPLATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "report_template.html")
# of a curve: more would not be seen
POINTS = 200
# of a cycle
STEPS = (
    "reward",
    "scored",
    "sft_random",
    "eval_sft_random",
    "sft",
    "eval_sft",
    "sft_both",
    "eval_sft_both",
    "grpo",
    "eval_grpo",
    "generator",
)
# shown first
CURVES = (
    "reward",
    "reward_model",
    "match",
    "watch_accuracy",
    "watch_reward",
    "loss",
    "kl",
    "entropy",
    "length",
)
KEPT = (
    "id",
    "question",
    "options",
    "rationale",
    "answer",
    "modality",
    "task",
    "source",
    "paradigm",
    "reward",
)


# ---------------------------------------------------------------------------------------------------------
# Which files: {"metrics" | "predictions" | "scored" | "figures": [(label, path)]}.


def labelled(value, by_name=False):
    """(label, path) of `LABEL=FILE`; of a file alone, its label is its own name or the last two folders of its path."""
    label, equals, path = value.rpartition("=")
    folder, name = os.path.split(os.path.abspath(path))
    return label if equals else name if by_name else "/".join(folder.split(os.sep)[-2:]), path


def cycle_files(folder):
    """What cycle.sh leaves in `folder`, in the order of its stages. Raises RunError where there is nothing."""
    cycles = range(1, 1 + len(glob.glob(os.path.join(glob.escape(folder), "cycle[0-9]*"))))
    names = [
        "eval_base",
        "sft_expert",
        "eval_sft_expert",
        *(f"cycle{c}/{step}" for c in cycles for step in STEPS),
    ]

    def there(names, *files):
        found = [(name, os.path.join(folder, name, file)) for name in names for file in files]
        return [(name, path) for name, path in found if os.path.isfile(path)]

    tables = [name for name in names if os.path.basename(name).startswith(("eval", "reward", "scored"))]
    figures = sorted(glob.glob(os.path.join(glob.escape(folder), "**", "*.svg"), recursive=True))
    files = {
        "metrics": [
            *there(tables, "metrics.json"),
            *there([f"cycle{c}" for c in cycles], "marks.json"),
            *there(names, "metrics.jsonl"),
        ],
        "predictions": there(names, "predictions.jsonl"),
        "scored": there(names, "scored.jsonl"),
        "figures": [(os.path.relpath(path, folder), path) for path in figures],
    }
    if not any(files.values()):
        raise RunError(
            f"{folder}: no cycle's folder; give the OUT of cycle.sh, or files by --predictions, --metrics, ..."
        )
    return files


def gather(args):
    """All files of the arguments, those of --run first. Raises RunError where two predictions have one label."""
    files = (
        cycle_files(args.run)
        if args.run
        else {kind: [] for kind in ("metrics", "predictions", "scored", "figures")}
    )
    for kind, found in files.items():
        found += [labelled(value, kind == "figures") for value in getattr(args, kind)]
        labels = [label for label, _ in found]
        twice = next(
            (label for label in labels if kind in ("predictions", "scored") and labels.count(label) > 1), None
        )
        if twice:
            raise RunError(f"--{kind}: two files are called {twice}; give LABEL=FILE")
    if not any(files.values()):
        raise RunError(
            "nothing to report; give --run FOLDER, or files by --predictions, --scored, --metrics, --figures"
        )
    return files


def load(path, lines=False):
    """The JSON of a file, or of each of its lines; NaN and infinities, which a page cannot hold, as None. Raises RunError."""
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
    return str(load(args).get("script", "")) if os.path.isfile(args) else os.path.basename(path)


# ---------------------------------------------------------------------------------------------------------
# Tables and curves.


def measure_of(group):
    """What a group's cell shows: the measure that its interval is of, else its first fraction; "" where it has none."""
    names = list(group)
    return (
        names[names.index("low") - 1]
        if "low" in names[1:]
        else next((name for name in names if isinstance(group[name], float)), "")
    )


def cell(value, low=None, high=None):
    """A number or name as [text], with its interval, where it has one, as [text, interval]; anything else as [""]."""
    if isinstance(value, dict):
        return cell(value.get(measure_of(value)), value.get("low"), value.get("high"))
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return [""]
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return [text] if None in (low, high) else [text, f"{low:.3f} to {high:.3f}"]


def columns_of(result):
    """{column: cell} of a metrics.json's own numbers; `low` and `high` join the number before them."""
    columns, before = {}, None
    for name, value in result.items():
        if name in ("low", "high") and before:
            columns[before] = cell(result[before], result.get("low"), result.get("high"))
        elif isinstance(value, (int, float, str)):
            columns[name], before = cell(value), name
    return columns


def union(dicts):
    """The keys of all, in the order in which they are met."""
    return list(dict.fromkeys(key for d in dicts for key in d))


def groups(values, name=""):
    """{name: group} of a metrics.json: what it has by modality, by level, ...; of groups in a group, `outer: inner`, no deeper."""
    found = {}
    for field, group in values.items():
        if isinstance(group, dict):
            inner = {
                k: v
                for k, v in group.items()
                if isinstance(v, dict) and any(isinstance(x, dict) for x in v.values())
            }
            found |= {name + field: group} | ({} if name else groups(inner, f"{field}: "))
    return found


def tables(files):
    """A table for each script's results, a row a file; and one for each group in them (modality, level, ...), a column a file."""
    scripts = {}
    for label, path in files:
        scripts.setdefault(script_of(path), []).append((label, load(path)))
    return [
        table
        for script, found in scripts.items()
        for table in [overall_table(script, found), *group_tables(script, found)]
    ]


def overall_table(script, found):
    """The table of a script's own numbers; `found`: [(label, metrics.json)]."""
    rows = [columns_of(values) for _, values in found]
    # what has an interval first
    columns = sorted(union(rows), key=lambda c: all(len(row.get(c, "")) < 2 for row in rows))
    return {
        "title": script,
        "columns": columns,
        "rows": [[[label], *(row.get(c, [""]) for c in columns)] for (label, _), row in zip(found, rows)],
    }


def group_tables(script, found):
    """A table of each group of a script's results; what holds nothing that can be shown is left out."""
    grouped = [(label, groups(values)) for label, values in found]
    for field in union(named for _, named in grouped):
        having = [(label, named[field]) for label, named in grouped if field in named]
        rows = [
            [[name], *(cell(group.get(name)) for _, group in having)]
            for name in union(group for _, group in having)
        ]
        rows = [row for row in rows if any(text != [""] for text in row[1:])]
        measures = union(
            {measure_of(v): 0} for _, group in having for v in group.values() if isinstance(v, dict)
        )
        if rows:
            yield {
                "title": " ".join([f"{script}: {field}", *filter(None, measures)]),
                "columns": [label for label, _ in having],
                "rows": rows,
            }


def curves(files):
    """[{"title", "metric", "main", "lines": [{"label", "x", "y"}]}]: one panel for each script's metric, a line a file."""
    panels = {}
    for label, path in files:
        rows, script = load(path, lines=True), script_of(path)
        for metric in [key for key in union(rows) if key != "step"]:
            points = [
                (row.get("step", i), row[metric])
                for i, row in enumerate(rows)
                if type(row.get(metric)) in (int, float)
            ]
            if len(points) > POINTS:
                points = [points[i * (len(points) - 1) // (POINTS - 1)] for i in range(POINTS)]
            if len(points) > 1:
                x, y = zip(*points)
                panels.setdefault((script, metric), []).append({"label": label, "x": x, "y": y})
    # stable: scripts stay in order
    order = sorted(panels, key=lambda p: CURVES.index(p[1]) if p[1] in CURVES else len(CURVES))
    return [
        {"title": script, "metric": metric, "main": metric in CURVES, "lines": panels[script, metric]}
        for script, metric in order
    ]


# ---------------------------------------------------------------------------------------------------------
# Items: {KEPT fields, "path", "set", "accepted", "responses"}.


def evaluated(files, root=None):
    """One item a question, with the response of each file that has it: the same id, image and texts."""
    items = {}
    for label, path in files:
        for row in records.read_records(path, ("id", "question", "answer", "prediction"), root):
            key = (row["id"], row["question"], row["answer"], row.get("image_hash", row.get("image")))
            item = items.setdefault(key, new_item(row, "evaluated") | {"responses": []})
            correct = row.get("correct", is_match(row["prediction"], row["answer"]))
            response = {
                field: row[field]
                for field in ("response", "prediction", "reason", "rollout_scores")
                if row.get(field) is not None
            }
            item["responses"].append({"run": label, "correct": bool(correct), **response})
    return list(items.values())


def candidates(files, root=None):
    """One item a scored candidate; accepted where accepted.jsonl, beside the file, has its id."""
    items = []
    for label, path in files:
        beside = os.path.join(os.path.dirname(path), "accepted.jsonl")
        accepted = (
            {row["id"] for row in records.read_records(beside, root=records.ANYWHERE)}
            if os.path.isfile(beside)
            else None
        )
        for row in records.read_records(path, ("id", "question", "answer", "reward"), root):
            items.append(
                new_item(row, label) | ({} if accepted is None else {"accepted": row["id"] in accepted})
            )
    return items


def new_item(row, where):
    return {field: row[field] for field in KEPT if field in row} | {"set": where, "path": row.get("image")}


def sample(items, limit, seed):
    """At most `limit` of the items, drawn by `seed`, in their order."""
    picked = sorted(random.Random(seed).sample(range(len(items)), min(limit, len(items))))
    return [items[i] for i in picked]


def thumbnail(path, side):
    """A data URL of the image, made to fit `side` x `side` pixels, WebP; None where it cannot be read."""
    try:
        image = open_image(path)
    except RecordError:
        return None
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=75)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def with_images(items, side):
    """(items with "image", an index, in place of "path"; [data URL]; image files that cannot be read). Same bytes, one image."""

    def content(path):
        return hash_image(path) if os.path.isfile(path) else None

    paths, first = list(dict.fromkeys(item["path"] for item in items if item["path"])), {}
    with ThreadPoolExecutor() as pool:
        hashes = dict(zip(paths, pool.map(content, paths)))
        for path, digest in hashes.items():
            first.setdefault(digest, path)
        first.pop(None, None)
        urls = {
            digest: url
            for digest, url in zip(first, pool.map(lambda path: thumbnail(path, side), first.values()))
            if url
        }
    index = {digest: i for i, digest in enumerate(urls)}
    items = [
        {k: v for k, v in item.items() if k != "path"} | {"image": index.get(hashes.get(item["path"]))}
        for item in items
    ]
    return items, list(urls.values()), [path for path in paths if hashes[path] not in index]


# ---------------------------------------------------------------------------------------------------------
# The page.


def embed(path):
    """A figure as a data URL. Raises RunError where it is not an SVG or PNG file that can be read."""
    kind = {".svg": "svg+xml", ".png": "png"}.get(os.path.splitext(path)[1].lower())
    if not kind or not os.path.isfile(path):
        raise RunError(f"{path}: no figure; give an SVG or PNG file")
    with open(path, "rb") as file:
        return f"data:image/{kind};base64," + base64.b64encode(file.read()).decode()


def page(data):
    """The template with `data` in it, and with the policy that lets nothing run or load but what the template holds."""
    with open(TEMPLATE, encoding="utf-8", newline="") as file:
        template = file.read()
    style, script = (
        re.search(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1] for tag in ("style", "script")
    )
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head, tail = template.replace("{{POLICY}}", policy).split("{{DATA}}")
    # no tag ends the block
    return head + json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c") + tail


def parse_args():
    p = cli.Parser(description=__doc__)
    p.add_argument("--run", help="folder of a cycle, as cycle.sh leaves it")
    p.add_argument(
        "--metrics",
        nargs="+",
        default=[],
        metavar="[LABEL=]FILE",
        help="metrics.json for the tables, metrics.jsonl for the curves",
    )
    p.add_argument(
        "--predictions",
        nargs="+",
        default=[],
        metavar="[LABEL=]FILE",
        help="predictions.jsonl of eval.py, or rollouts.jsonl",
    )
    p.add_argument(
        "--scored", nargs="+", default=[], metavar="[LABEL=]FILE", help="scored.jsonl of reward.py"
    )
    p.add_argument(
        "--figures", nargs="+", default=[], metavar="[LABEL=]FILE", help="SVG or PNG files to embed"
    )
    p.add_argument("--title", help="the page's heading (the name of --run)")
    p.add_argument(
        "--image-root", help="folder that images may lie in, beside that of the file that names them (--run)"
    )
    p.add_argument(
        "--items", type=int, default=10000, help="most items to hold; of more, this many are drawn"
    )
    p.add_argument("--thumbnail", type=int, default=160, help="longest side of an image, in pixels")
    p.add_argument("--seed", type=int, default=0, help="of the draw of items")
    p.add_argument("--out", required=True, help="the page to write (report.html)")
    return p.parse_args()


def main(args):
    if args.items < 0 or args.thumbnail < 1:
        raise RunError("--items, --thumbnail: give a number of items, and at least 1 pixel")
    files = gather(args)
    root = args.image_root or args.run
    found = evaluated(files["predictions"], root) + candidates(files["scored"], root)
    items, images, missing = with_images(sample(found, args.items, args.seed), args.thumbnail)
    title = args.title or (os.path.basename(os.path.abspath(args.run)) if args.run else "Report")
    curve_files = [f for f in files["metrics"] if f[1].endswith(".jsonl")]
    data = {
        "title": title,
        "total": len(found),
        "items": items,
        "images": images,
        "runs": [label for label, _ in files["predictions"]],
        "tables": tables([f for f in files["metrics"] if f not in curve_files]),
        "curves": curves(curve_files),
        "figures": [{"label": label, "url": embed(path)} for label, path in files["figures"]],
    }
    text = page(data)
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    with open(args.out + ".tmp", "w", encoding="utf-8", newline="") as file:
        file.write(text)
    os.replace(args.out + ".tmp", args.out)
    if missing:
        print(
            f"{len(missing)} images cannot be read, their items have none: {missing[0]}"
            + ", ..." * (len(missing) > 1)
        )
    drawn = (
        ""
        if len(items) == len(found)
        else f" of {len(found)} (drawn with --seed {args.seed}; --items to hold more)"
    )
    print(f"{args.out}: {len(items)} items{drawn}, {len(images)} images, {len(text) / 2**20:.1f} MiB")


if __name__ == "__main__":
    cli.run_main(main, parse_args())
