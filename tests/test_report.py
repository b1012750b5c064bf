"""report.py: what the page holds, by its bytes; what a reader can do with it, in a browser offline."""

import base64
import hashlib
import html.parser
import io
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from helpers import run_here
from PIL import Image

import eval as evaluation
from analysis import report
from medgr2 import records
from medgr2.prompts import format_response

ROOT = Path(__file__).parent.parent
HOSTILE = (
    "</script><script>window.harm = 1</script><img src=x onerror='window.harm = 2'> "
    "<!-- <b>bold</b> & \u2028 {{DATA}}"
)
# What the table of cycle.sh calls the runs of the fixture `cycle`.
BASE, GRPO, CANDIDATES = "base", "cycle 1: + GRPO", "cycle 1: candidates"
TASKS, MODALITIES = ("Disease Diagnosis", "Lesion Grading"), ("CT", "MRI", "OCT")


# ---------------------------------------------------------------------------------------------------------
# A small run in the layout of cycle.sh, and the data that a page holds.


def draw(path, seed, size=(40, 30)):
    rng = random.Random(seed)
    Image.frombytes("RGB", size, rng.randbytes(size[0] * size[1] * 3)).save(path)
    return str(path)


def questions(folder, n=60):
    """Question records, two on an image; the last is hostile."""
    rows = [
        {
            "id": f"q{i}",
            "image": str(folder / "images" / f"{i // 2}.png"),
            "question": f"What is number {i}?",
            "options": ["yes", "no", "number"],
            "answer": ("yes", "no")[i % 2],
            "modality": MODALITIES[i % 3],
            "task": TASKS[i % 2],
            "source": "expert",
            "rationale": f"because {i * i}",
        }
        for i in range(n)
    ]
    rows[-1] |= {
        "question": HOSTILE,
        "rationale": HOSTILE,
        "modality": HOSTILE,
        "options": ["yes", "no", HOSTILE],
    }
    return rows


def evaluate(folder, rows, rate, seed):
    """The files of an evaluation, by eval.py's own functions: `rate` of the answers right, some unparsed."""
    rng = random.Random(seed)
    texts = [
        format_response("I see", r["answer"] if rng.random() < rate else rng.choice(["number", "nonsense"]))
        for r in rows
    ]
    predicted = [evaluation.with_prediction(r, text) for r, text in zip(rows, texts)]
    records.write_records(folder / "predictions.jsonl", predicted)
    (folder / "metrics.json").write_text(json.dumps(evaluation.compute_metrics(predicted, 0)))
    (folder / "args.json").write_text(json.dumps({"script": "eval.py"}))
    return predicted


@pytest.fixture(scope="module")
def cycle(tmp_path_factory):
    """(folder, its rows by file's label): two evaluations, scored candidates, a GRPO's metrics."""
    folder = tmp_path_factory.mktemp("report") / "run"
    (folder / "images").mkdir(parents=True)
    for i in range(30):
        draw(folder / "images" / f"{i}.png", i)
    rows = questions(folder)
    made = {
        label: evaluate(folder / name, rows, rate, name)
        for label, name, rate in ((BASE, "eval_base", 0.4), (GRPO, "cycle1/eval_grpo", 0.8))
    }
    rng = random.Random(0)
    scored = [
        r
        | {
            "id": f"c{r['id']}",
            "source": "generated",
            "cycle": 1,
            "reward": {
                "overall": rng.uniform(-6, 10),
                "relevant": rng.random(),
                "coherent": 0.5,
                "faithful": 0.25,
            },
        }
        for r in rows
    ]
    records.write_records(folder / "cycle1" / "scored" / "scored.jsonl", scored)
    records.write_records(folder / "cycle1" / "scored" / "accepted.jsonl", scored[::3])
    (folder / "cycle1" / "grpo").mkdir()
    steps = [
        {"step": i, "reward": i / 10, "odd": None}
        | ({"watch_accuracy": 0.5 + i / 1000} if i % 100 == 0 else {})
        for i in range(1000)
    ]
    (folder / "cycle1" / "grpo" / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    (folder / "cycle1" / "figure.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9" width="90" height="90">'
        '<script>top.harm = 3</script><circle r="4"/></svg>'
    )
    return folder, made | {CANDIDATES: scored}


class Scripts(html.parser.HTMLParser):
    """The text of each script and style element, as a browser finds them, and the policy."""

    def __init__(self):
        super().__init__()
        self.found, self.policy, self.inside = [], "", False

    def handle_starttag(self, tag, attributes):
        self.inside = tag in ("script", "style")
        if self.inside:
            self.found.append([dict(attributes).get("type", tag), ""])
        if dict(attributes).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attributes)["content"]

    def handle_data(self, text):
        if self.inside:
            self.found[-1][1] += text

    def handle_endtag(self, tag):
        self.inside = False


def parse(page):
    parser = Scripts()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser


def make(out, *flags):
    return run_here(report, "--out", out, *flags)


def made(out, *flags):
    """The data in the page of these flags."""
    done = make(out, *flags)
    assert done.returncode == 0, done.stderr
    return json.loads(
        next(text for kind, text in parse(out).found if kind == "application/json")
    ), done.stdout


# ---------------------------------------------------------------------------------------------------------
# What the page holds.


def test_an_evaluated_question_is_one_item_with_every_run_and_a_candidate_knows_if_it_was_accepted(
    cycle, tmp_path
):
    folder, rows = cycle
    data, _ = made(tmp_path / "r.html", "--run", folder)
    first, second = (
        [i for i in data["items"] if i["set"] == "evaluated"],
        [i for i in data["items"] if i["set"] != "evaluated"],
    )
    assert [i["id"] for i in first] == [r["id"] for r in rows[BASE]] and len(second) == 60
    for item, *answers in zip(first, rows[BASE], rows[GRPO]):
        assert [(r["run"], r["correct"], r.get("prediction")) for r in item["responses"]] == [
            (run, a["prediction"] == a["answer"], a["prediction"]) for run, a in zip((BASE, GRPO), answers)
        ]
    assert [i["accepted"] for i in second] == [n % 3 == 0 for n in range(60)]
    assert data["runs"] == [BASE, GRPO]


def test_the_same_id_on_another_question_is_another_item(cycle, tmp_path):
    folder, rows = cycle
    for name, question in (("a", "One?"), ("b", "Two?")):
        records.write_records(tmp_path / name / "p.jsonl", [rows[BASE][0] | {"question": question}])
    files = [tmp_path / "a" / "p.jsonl", f"other={tmp_path / 'b' / 'p.jsonl'}"]
    data, _ = made(tmp_path / "r.html", "--predictions", *files, "--image-root", folder)
    assert [(i["question"], len(i["responses"])) for i in data["items"]] == [("One?", 1), ("Two?", 1)]
    assert data["runs"] == [f"{tmp_path.name}/a", "other"]


def test_a_rollout_to_a_question_without_an_answer_is_left_out_and_another_record_without_one_is_refused(
    tmp_path,
):
    known = {"id": "a", "question": "?a", "answer": "a", "prediction": "a"}
    bare = {"id": "b", "question": "?b", "prediction": "b"}
    records.write_records(tmp_path / "rollouts.jsonl", [known, bare | {"record": "b", "correct": None}])
    data, _ = made(tmp_path / "r.html", "--predictions", tmp_path / "rollouts.jsonl")
    assert [item["id"] for item in data["items"]] == ["a"]
    records.write_records(tmp_path / "p.jsonl", [known, bare])
    done = make(tmp_path / "r.html", "--predictions", tmp_path / "p.jsonl")
    assert done.returncode and "p.jsonl: record b: no field `answer`: add it" in done.stderr


def test_an_image_under_two_names_is_embedded_once_and_fits_the_thumbnail(tmp_path):
    draw(tmp_path / "a.png", 1, (400, 300))
    draw(tmp_path / "c.png", 2)
    (tmp_path / "broken.png").write_text("no image")
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    rows = [
        {"id": n, "image": str(tmp_path / f"{n}.png"), "question": "?a", "answer": "a", "prediction": "a"}
        for n in ("a", "b", "broken", "c", "gone")
    ]
    rows.append({"id": "none", "question": "?a", "answer": "a", "prediction": "b"})
    records.write_records(tmp_path / "p.jsonl", rows)
    data, printed = made(tmp_path / "r.html", "--predictions", tmp_path / "p.jsonl", "--thumbnail", 100)
    assert [i["image"] for i in data["items"]] == [0, 0, None, 1, None, None]
    assert "2 images cannot be read" in printed
    sizes = [Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).size for url in data["images"]]
    assert sizes == [(100, 75), (40, 30)]
    assert [i["responses"][0]["correct"] for i in data["items"]] == [True] * 5 + [False]


def test_more_items_than_the_limit_are_drawn_by_the_seed_in_their_order_and_the_page_says_so(cycle, tmp_path):
    drawn = [
        made(tmp_path / f"{n}.html", "--run", cycle[0], "--items", 20, "--seed", seed)
        for n, seed in enumerate((1, 1, 2))
    ]
    ids = [[i["id"] for i in data["items"]] for data, _ in drawn]
    everything = [i["id"] for i in made(tmp_path / "all.html", "--run", cycle[0])[0]["items"]]
    assert len(ids[0]) == 20 and ids[0] == ids[1] != ids[2]
    assert ids[0] == [i for i in everything if i in ids[0]]
    assert drawn[0][0]["total"] == 120 and "20 items of 120" in drawn[0][1]
    assert (tmp_path / "0.html").read_bytes() == (tmp_path / "1.html").read_bytes()


def test_a_drawn_question_has_the_responses_of_all_files_and_the_others_are_counted(tmp_path):
    draw, rng = report.Draw(5, 0), random.Random(0)
    for file in ("a", "b"):
        rows = [
            {"id": f"q{n}", "image": "i", "question": "Which?", "answer": "x", "prediction": "x"}
            for n in range(40)
        ]
        rng.shuffle(rows)
        path = tmp_path / f"{file}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        report.read_evaluated(draw, [(file, str(path))])
    items = list(draw.items.values())
    assert len(items) == 5 and len(draw.numbers) == 40
    assert all([r["run"] for r in item["responses"]] == ["a", "b"] for item in items)
    # Every question is drawn by some seed. A draw depends on the file's path too; one of 40 questions is
    # missed by 60 seeds in 1% of all paths, by 200 in none.
    drawn = set()
    for seed in range(200):
        draw = report.Draw(5, seed)
        report.read_evaluated(draw, [("a", str(tmp_path / "a.jsonl"))])
        drawn |= {item["id"] for item in draw.items.values()}
    assert len(drawn) == 40


def test_tables_show_the_numbers_of_the_files_with_their_intervals(cycle, tmp_path):
    folder, _ = cycle
    first, by_modality, *_ = made(tmp_path / "r.html", "--run", folder)[0]["tables"]
    result = json.loads((folder / "eval_base" / "metrics.json").read_text())
    assert first["title"] == "eval.py" and first["columns"][0] == "accuracy" and "low" not in first["columns"]
    assert first["rows"][0][:2] == [
        [BASE],
        [f"{result['accuracy']:.3f}", f"{result['low']:.3f} to {result['high']:.3f}"],
    ]
    assert [row[0] for row in first["rows"]] == [[BASE], [GRPO]]
    assert by_modality["title"] == "eval.py: modality accuracy"
    assert by_modality["columns"] == [BASE, GRPO]
    assert {row[0][0]: row[1][0] for row in by_modality["rows"]} == {
        m: f"{g['accuracy']:.3f}" for m, g in result["modality"].items()
    }


def test_a_group_in_a_group_has_a_table_and_shows_its_first_fraction_if_it_has_no_interval(tmp_path):
    (tmp_path / "m.json").write_text(
        '{"a": NaN, "n": 3, "ok": true, "levels": {"x": {"n": 2, "mean": 0.5}, "y": 7}, '
        '"empty": {"z": {"w": {}}}, "scorers": {"closed": {"n": 9, "strict": {"n": 8, "accuracy": 0.25}}}}'
    )
    tables = made(tmp_path / "r.html", "--metrics", f"mine={tmp_path / 'm.json'}")[0]["tables"]
    assert tables == [
        {"title": "m.json", "columns": ["n", "ok"], "rows": [[["mine"], ["3"], [""]]]},
        {
            "title": "m.json: levels mean",
            "field": "levels",
            "columns": ["mine"],
            "rows": [[["x"], ["0.500"]], [["y"], ["7"]]],
        },
        {
            "title": "m.json: scorers: closed accuracy",
            "field": "scorers: closed",
            "columns": ["mine"],
            "rows": [[["n"], ["9"]], [["strict"], ["0.250"]]],
        },
    ]


def test_with_a_random_filter_the_policy_is_called_so(cycle, tmp_path):
    folder = tmp_path / "run"
    for name in ("eval_base", "cycle1/eval_sft"):
        shutil.copytree(cycle[0] / "eval_base", folder / name)
    for chosen in ("accepted", "random"):
        (folder / "settings").write_text(f"SEED=0\nFILTER={chosen}\n")
        assert made(tmp_path / "r.html", "--run", folder)[0]["runs"] == ["base", f"cycle 1: SFT on {chosen}"]


def test_the_headline_holds_accuracy_and_interval_of_each_stage_by_cycle_and_task(cycle, tmp_path):
    folder = tmp_path / "run"
    for name in ("eval_base", "cycle1/eval_grpo"):
        shutil.copytree(cycle[0] / name, folder / name)
    # A second cycle with one stage, and without one of the tasks.
    shutil.copytree(cycle[0] / "eval_base", folder / "cycle2" / "eval_grpo")
    path = folder / "cycle2" / "eval_grpo" / "metrics.json"
    result = json.loads(path.read_text())
    del result["task"][TASKS[1]]
    path.write_text(json.dumps(result))
    (folder / "cycle2" / "eval_sft.part").mkdir()
    headline = made(tmp_path / "r.html", "--run", folder)[0]["headline"]

    def point(name, groups=("", *TASKS)):
        whole = json.loads((folder / name / "metrics.json").read_text())
        by_group = {"": whole} | whole["task"]
        return {g: [by_group[g][key] for key in ("accuracy", "low", "high")] for g in groups}

    assert headline == {
        "groups": ["", *TASKS],
        "cycles": 2,
        "levels": [{"name": "base", "points": [[0, point("eval_base")]]}],
        "lines": [
            {
                "name": "+ GRPO",
                "points": [[1, point("cycle1/eval_grpo")], [2, point("cycle2/eval_grpo", ("", TASKS[0]))]],
            }
        ],
    }
    shutil.rmtree(folder / "cycle1")
    shutil.rmtree(folder / "cycle2")
    assert made(tmp_path / "r.html", "--run", folder)[0]["headline"] is None


def test_a_curve_keeps_its_ends_and_at_most_200_points(cycle, tmp_path):
    curves = made(tmp_path / "r.html", "--run", cycle[0])[0]["curves"]
    assert [(c["metric"], c["main"]) for c in curves] == [("reward", True), ("watch_accuracy", True)]
    x, y = curves[0]["lines"][0]["x"], curves[0]["lines"][0]["y"]
    assert (len(x), x[0], x[-1]) == (200, 0, 999) and x == sorted(set(x))
    assert y == [step / 10 for step in x]
    steps = list(range(0, 1000, 100))
    line = {"label": GRPO, "x": steps, "y": [0.5 + step / 1000 for step in steps]}
    assert curves[1]["lines"] == [line]


def test_the_policy_names_the_pages_own_script_and_style_and_no_text_ends_the_data(cycle, tmp_path):
    data, _ = made(tmp_path / "r.html", "--run", cycle[0], "--title", HOSTILE)
    page = parse(tmp_path / "r.html")
    assert [kind for kind, _ in page.found] == ["style", "application/json", "script"]
    assert data["title"] == HOSTILE
    for kind in ("style", "script"):
        text = next(text for k, text in page.found if k == kind)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in page.policy
    assert page.policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in page.policy


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "nothing to report"),
        (["--run", "nowhere"], "no cycle's folder"),
        (["--metrics", "nowhere.json"], "nowhere.json"),
        (["--metrics", "list.json"], "not a JSON object"),
        (["--figures", "list.json"], "SVG or PNG"),
        (["--predictions", "a.jsonl", "a.jsonl"], "LABEL=FILE"),
        (["--scored", "a.jsonl"], "reward"),
        (["--predictions", "a.jsonl", "--items", "-1"], "--items"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, flags, words):
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "a.jsonl").write_text('{"id": "a", "question": "b", "answer": "c", "prediction": null}\n')
    done = make(
        tmp_path / "out" / "r.html", *[tmp_path / f if "." in f or f == "nowhere" else f for f in flags]
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and words in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------
# What a reader can do, in a browser.


@pytest.fixture(scope="module")
def browser():
    """Debian's chromium, headless. Skipped, with the reason, if it or its driver is missing."""
    driver = pytest.importorskip(
        "playwright.sync_api", reason="no playwright: pip install -r tests/requirements.txt"
    )
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if not path:
        pytest.skip("no browser: apt-get install chromium")
    flags = [
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
    ]
    with driver.sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=path, args=flags + ["--no-sandbox"] * (os.geteuid() == 0)
        )
        yield browser
        browser.close()


class View:
    """A page opened offline, and all that it said and asked for."""

    def __init__(self, browser, path, width=1280, scheme="light"):
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
        )
        self.page, self.complaints, self.requests = self.context.new_page(), [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]", timeout=60000)

    def ids(self):
        return self.page.eval_on_selector_all("article", "all => all.map(a => a.dataset.id)")

    def count(self):
        return int(self.page.inner_text("#count").split(" of ")[0].replace(",", ""))

    def choose(self, **choices):
        """Reset, then set the filters."""
        self.page.click("button[type=reset]")
        for name, value in choices.items():
            self.page.select_option(f"select[name={name}]", value)

    def search(self, text):
        """Type, and wait for what is found (the page's own policy forbids the driver's wait_for_function)."""
        before = self.page.inner_text("#count")
        self.page.fill("input[name=text]", text)
        for _ in range(100):
            if self.page.inner_text("#count") != before:
                return
            self.page.wait_for_timeout(50)


@pytest.fixture(scope="module")
def page_file(cycle):
    made(cycle[0] / "report.html", "--run", cycle[0])
    return cycle[0] / "report.html"


@pytest.fixture
def view(browser, page_file):
    view = View(browser, page_file)
    yield view
    view.context.close()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_without_an_error_or_a_request_and_fits_the_screen(browser, page_file, width, scheme):
    view = View(browser, page_file, width, scheme)
    assert view.complaints == [] and [u for u in view.requests if not u.startswith("data:")] == [
        page_file.as_uri()
    ]
    assert view.page.evaluate("document.documentElement.scrollWidth") <= width
    assert view.page.locator("article").count() == 24 and view.page.locator(
        "h2:visible"
    ).all_inner_texts() == ["Results", "Figures", "Curves", "Items"]
    red = view.page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
    assert (int(red) < 128) == (scheme == "dark")
    assert view.page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    view.context.close()


def test_every_filter_leaves_exactly_the_records_that_it_names(cycle, view):
    rows = cycle[1]
    base, grpo, scored = rows[BASE], rows[GRPO], rows[CANDIDATES]
    right = [{r["id"] for r in run if r["prediction"] == r["answer"]} for run in (base, grpo)]
    unread = [r for r in grpo if r["prediction"] is None]
    assert unread and right[0] != right[1]
    expected = [
        ({"modality": "MRI"}, sum(r["modality"] == "MRI" for r in base + scored)),
        ({"task": TASKS[1]}, 60),
        ({"source": "generated"}, 60),
        ({"set": CANDIDATES}, 60),
        ({"result": "right"}, len(right[1])),
        ({"run": BASE, "result": "right"}, len(right[0])),
        ({"result": "wrong"}, 60 - len(right[1])),
        ({"result": "unread"}, len(unread)),
        ({"result": "mixed"}, len(right[0] ^ right[1])),
        ({"accepted": "accepted"}, 20),
        ({"accepted": "rejected"}, 40),
        ({"modality": "CT", "accepted": "rejected"}, 0),
        ({}, 120),
    ]
    for choices, n in expected:
        view.choose(**choices)
        assert (view.count() if n else view.page.inner_text("#count")) == (
            n or "No item passes the filters."
        ), choices
    view.choose(result="unread", run=BASE)
    assert view.ids() == [r["id"] for r in base if r["prediction"] is None][:24] and view.complaints == []


def test_items_can_be_ordered_by_reward(cycle, view):
    ordered = [r["id"] for r in sorted(cycle[1][CANDIDATES], key=lambda r: r["reward"]["overall"])]
    view.choose(order="up")
    assert view.ids() == ordered[:24]
    view.choose(order="down")
    assert view.ids() == ordered[::-1][:24]


def test_pages_follow_one_another_by_mouse_keyboard_and_number(cycle, view):
    ids = [r["id"] for r in cycle[1][BASE] + cycle[1][CANDIDATES]]
    assert view.ids() == ids[:24] and view.page.is_disabled("#previous")
    view.page.click("#next")
    assert view.ids() == ids[24:48]
    view.page.focus("#next")
    view.page.keyboard.press("Enter")
    assert view.ids() == ids[48:72] and view.page.input_value("#page") == "3"
    for typed, page in (("5", 5), ("99", 5), ("0", 1), ("", 1)):
        view.page.fill("#page", typed)
        view.page.press("#page", "Enter")
        assert view.ids() == ids[(page - 1) * 24 : page * 24]
    view.page.click("#next2")
    view.page.click("#previous2")
    assert view.ids() == ids[:24] and view.page.evaluate("scrollY") > 0
    view.page.fill("#page", "5")
    view.page.press("#page", "Enter")
    assert view.page.is_disabled("#next") and view.page.is_disabled("#next2")
    view.choose(modality="CT")
    # A filter starts at the first page.
    assert view.page.input_value("#page") == "1"


@pytest.mark.parametrize(
    "text, field",
    [
        ("number 17?", "question"),
        ("BECAUSE 289", "rationale"),
        ("q17", "id"),
        ("because 17?", "words anywhere"),
    ],
)
def test_a_search_finds_every_word_in_any_text_of_an_item(view, text, field):
    view.search(text)
    assert view.ids() == ["q17", "cq17"]


def test_a_response_is_found_by_the_search_and_shown_with_its_verdict(cycle, view):
    wrong = next(r for r in cycle[1][GRPO] if r["prediction"] == "number")
    view.search(f"{wrong['question']} <answer>number</answer>")
    card = view.page.locator(f"article[data-id={wrong['id']}]")
    assert (
        wrong["response"] in card.inner_text()
        and card.locator(".response .badge").first.inner_text() == "wrong"
    )
    assert card.locator(".options .right").inner_text() == f"{wrong['answer']} (answer)"


def test_the_headline_shows_all_questions_and_on_demand_one_task(cycle, view):
    figure = view.page.locator("#headline")

    def shown():
        return figure.locator("svg.chart").get_attribute("aria-label"), figure.locator(".legend").inner_text()

    def accuracy(run, task=None):
        rows = [r for r in cycle[1][run] if task in (None, r["task"])]
        return f"{sum(r['correct'] for r in rows) / len(rows):.3f}"

    for task, said in ((None, "all questions"), (TASKS[1], TASKS[1]), (TASKS[0], TASKS[0])):
        figure.locator("select").select_option(task or "")
        label, legend = shown()
        base, grpo = accuracy(BASE, task), accuracy(GRPO, task)
        assert label == f"Accuracy, {said}: base {base}; + GRPO cycle 1 {grpo}"
        assert legend.strip() == f"+ GRPO: {grpo}"
    # One point, its interval's bar and the line through the points; the level of the base.
    assert figure.locator(".chart circle").count() == 1 and figure.locator("line.level").count() == 1
    low, high = figure.locator(".whisker").get_attribute("points").split(" ")
    middle = float(figure.locator(".chart circle").get_attribute("cy"))
    assert float(high.split(",")[1]) < middle < float(low.split(",")[1]) and view.complaints == []


def test_a_name_in_a_table_leads_to_its_items(cycle, view):
    rows = cycle[1]

    def follow(title, name):
        view.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        view.page.evaluate("scrollTo(0, 0)")
        view.choose(accepted="accepted", order="down")
        view.page.get_by_role("region", name=title, exact=True).get_by_role(
            "link", name=name, exact=True
        ).click()
        # The items are in sight, and filters that were set before are not.
        assert 0 <= view.page.locator("#items").bounding_box()["y"] < 100
        assert {view.page.input_value(f"select[name={n}]") for n in ("accepted", "order")} == {""}

    for run in (BASE, GRPO):
        follow("eval.py", run)
        assert view.page.input_value("select[name=run]") == run and view.count() == len(rows[run])
        assert view.ids() == [r["id"] for r in rows[run]][:24]
        assert view.page.locator("article .response .name").first.inner_text() == f"by {run}"
    follow("eval.py: task accuracy", TASKS[0])
    of_task = [r["id"] for r in rows[BASE] + rows[CANDIDATES] if r["task"] == TASKS[0]]
    assert view.count() == len(of_task) and view.ids() == of_task[:24]
    follow("eval.py: modality accuracy", GRPO)
    assert view.page.input_value("select[name=run]") == GRPO and view.count() == 60
    # What has no items is no link.
    links = view.page.get_by_role("region", name="eval.py: scorers", exact=True).get_by_role("link")
    assert set(links.all_inner_texts()) <= {BASE, GRPO} and view.complaints == []


def test_text_that_is_html_shows_as_text_and_nothing_in_it_runs(view):
    view.search("window.harm")
    assert view.ids() == ["q59", "cq59"]
    card = view.page.locator("article").first
    assert card.locator("h3").text_content() == HOSTILE and HOSTILE in card.locator("li").all_text_contents()
    assert HOSTILE in view.page.locator("select[name=modality] option").all_text_contents()
    assert view.page.locator("article script, article b b, img[src=x]").count() == 0
    assert view.page.evaluate("window.harm") is None and view.complaints == []


def test_the_browser_itself_refuses_what_the_policy_forbids(view):
    blocked = view.page.evaluate("""async () => {
        const found = [];
        document.addEventListener("securitypolicyviolation", event => found.push(event.effectiveDirective));
        const script = document.createElement("script"), image = new Image();
        script.textContent = "window.harm = 4";
        image.src = "https://example.org/x.png";
        document.body.append(script, image);
        await fetch("https://example.org/").catch(() => {});
        await new Promise(done => setTimeout(done, 100));
        return found.sort(); }""")
    assert (
        blocked == ["connect-src", "img-src", "script-src-elem"] and view.page.evaluate("window.harm") is None
    )


def test_everything_has_a_name_for_those_who_cannot_see_it(view):
    for elements, nameless in [
        ("querySelectorAll('input, select')", "!e.labels.length || !e.labels[0].textContent.trim()"),
        ("querySelectorAll('button')", "!e.textContent.trim()"),
        ("images", "!e.alt"),
    ]:
        assert view.page.evaluate(f"[...document.{elements}].filter(e => {nameless}).length") == 0
    assert view.page.locator("svg.chart[role=img][aria-label*='from 0 to 99.9']").count() == 1
    view.page.keyboard.press("Tab")
    assert view.page.evaluate("document.activeElement.textContent") == "Skip to the items"


def test_ten_thousand_items_are_usable(browser, tmp_path, capsys):
    for i in range(500):
        draw(tmp_path / f"{i}.png", i, (64, 64))
    records.write_records(
        tmp_path / "p.jsonl",
        (
            {
                "id": f"q{i}",
                "image": str(tmp_path / f"{i % 500}.png"),
                "question": f"What is number {i}?",
                "answer": "yes",
                "modality": MODALITIES[i % 3],
                "prediction": "yes",
                "response": "I think so. " * 30,
            }
            for i in range(10001)
        ),
    )
    data, _ = made(tmp_path / "r.html", "--predictions", tmp_path / "p.jsonl")
    assert len(data["items"]) == 10000 and len(data["images"]) == 500
    view = View(browser, tmp_path / "r.html")
    ready = int(view.page.get_attribute("html", "data-ready"))
    known = data["items"][7000]["id"]
    taken = view.page.evaluate(
        """word => { const start = performance.now();
        state.text = word; apply(); return performance.now() - start; }""",
        f"{known[1:]}? think",
    )
    assert known in view.ids() and view.count() < 24 and view.complaints == []
    size = (tmp_path / "r.html").stat().st_size / 2**20
    with capsys.disabled():
        print(f"\n10,000 items: first page after {ready} ms, first search {taken:.0f} ms, {size:.1f} MiB")
    # Generous limits, for a busy machine: the figures are printed.
    assert ready < 60000 and taken < 30000
    view.context.close()
