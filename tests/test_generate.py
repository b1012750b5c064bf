"""generate.py: what is asked, of a model here and of a server; what is kept, rejected and why; and going on after a kill."""

import base64
import io
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from concurrent.futures import Future

import clinic
import pytest
from helpers import KEY
from PIL import Image, ImageChops

import generate
from medgr2 import endpoint, loading, records, vlm
from medgr2.images import open_image
from medgr2.prompts import MODALITIES, PARADIGMS, TASKS, generator_prompt

ROOT = pathlib.Path(__file__).resolve().parent.parent

TOY = str(ROOT / "toy" / "generator")


def write_images(folder, n, modalities=MODALITIES):
    """n clinic images and their images.jsonl; modalities go round."""
    rows = []
    for i in range(n):
        rng = random.Random(i)
        rows.append(
            {"id": f"i{i}", "image": str(folder / f"i{i}.png"), "modality": modalities[i % len(modalities)]}
        )
        clinic.draw(clinic.draw_facts(rng) | {"modality": rows[-1]["modality"]}, rng).save(rows[-1]["image"])
    records.write_records(folder / "images.jsonl", rows)
    return folder / "images.jsonl"


def lines(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines()]


def candidate(question="Which finding?", answer="cyst", rationale="A hollow ring.", options="mass | cyst"):
    return f"<question>{question}</question><options>{options}</options><think>{rationale}</think><answer>{answer}</answer>"


def by_seed(body):
    """A well-formed reply of its own for every request."""
    return candidate(f"What of {body['seed']}?"), "stop"


def prompt_of(body):
    return body["messages"][0]["content"][1]["text"]


# What is asked --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "per_image, tasks, paradigms",
    [(1, 5, 3), (2, 5, 3), (4, 5, 3), (5, 5, 3), (1, 3, 3), (2, 4, 2), (1, 5, 1)],
)
def test_every_modality_and_paradigm_is_asked_every_task_equally_often(per_image, tasks, paradigms):
    tasks, paradigms = TASKS[:tasks], list(PARADIGMS)[:paradigms]
    rng = random.Random(0)
    images = [
        {"id": f"{m}{i}", "image": "/x", "modality": m}
        for m in ("CT", "OCT", "MRI")
        for i in range(len(tasks))
    ]
    rng.shuffle(images)
    drafts = [
        generate.build_drafts(i, turn, paradigms, tasks, per_image, 1, 0, "g")
        for i, turn in zip(images, generate.assign_turns(images))
    ]
    cells = Counter((d["modality"], d["paradigm"], d["task"]) for of_image in drafts for d in of_image)
    assert set(cells.values()) == {per_image} and len(cells) == 3 * len(paradigms) * len(tasks)
    # and one image is asked for as many different tasks as possible
    for of_image in drafts:
        assert len({d["task"] for d in of_image}) == min(len(tasks), len(of_image))
    # and few images of many modalities for all tasks
    starts = {d[0]["modality"]: d[0]["task"] for d in reversed(drafts)}
    assert len(set(starts.values())) == len({turn * per_image % len(tasks) for turn in range(3)})


def test_seeds_and_ids_differ_between_all_candidates_and_cycles_and_seeds():
    images = [{"id": f"i{i}", "image": "/x"} for i in range(4)]
    drafts = [
        d
        for image in images
        for cycle, seed in ((1, 0), (2, 0), (1, 1))
        for d in generate.build_drafts(image, 0, list(PARADIGMS), TASKS, 2, cycle, seed, "g")
    ]
    assert len({d["seed"] for d in drafts}) == len(drafts) == 72
    assert len({d["id"] for d in drafts}) == 48 and all(0 <= d["seed"] < 2**31 for d in drafts)
    # where it is not known, it is left out
    assert not any("modality" in d for d in drafts)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_the_server_gets_prompt_image_and_settings(suffix, serve, stage, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("weights are loaded"))
    images = write_images(tmp_path, 2)
    rgba = Image.open(tmp_path / "i1.png").convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
    # what is sent is the image as the local model would see it
    rgba.save(tmp_path / "i1.png")
    server = serve(by_seed)
    status, _, _ = stage(
        "--images",
        images,
        "--endpoint",
        server.url + suffix,
        "--endpoint-model",
        "big/vlm",
        "--temperature",
        0.7,
        "--max-new-tokens",
        99,
        "--cycle",
        3,
        "--out",
        tmp_path / "out",
    )
    assert status == 0
    kept = lines(tmp_path / "out" / "candidates.jsonl")
    sent = {body["seed"]: body for _, _, body in server.seen}
    assert len(sent) == len(server.seen) == len(kept) == 6
    for row in kept:
        body = sent[row["seed"]]
        assert (
            body["model"] == "big/vlm" == row["generator"]
            and body["temperature"] == 0.7
            and body["max_tokens"] == 99
        )
        assert [m["role"] for m in body["messages"]] == ["user"]
        assert prompt_of(body) == generator_prompt(row["paradigm"], row["task"])
        head, data = body["messages"][0]["content"][0]["image_url"]["url"].split(",")
        got, want = (
            Image.open(io.BytesIO(base64.b64decode(data))),
            open_image(tmp_path / "out" / row["image"]),
        )
        assert (
            head == "data:image/png;base64"
            and got.mode == "RGB"
            and ImageChops.difference(got, want).getbbox() is None
        )
        assert row["question"] == f"What of {row['seed']}?" and row["cycle"] == 3
        assert row["id"] == f"{row['parent']}-c3-{row['paradigm']}-0" and row["source"] == "generated"
        assert (
            row["modality"] == dict(i0="CT", i1="MRI")[row["parent"]]
            and row["image"] == f"../{row['parent']}.png"
        )
    assert {path for path, _, _ in server.seen} == {"/v1/chat/completions"}
    assert {r["paradigm"] for r in kept} == set(PARADIGMS)
    assert (
        len(list(records.read_records(tmp_path / "out" / "candidates.jsonl", records.QUESTION, tmp_path)))
        == 6
    )


def test_the_key_goes_into_the_header_and_nowhere_else(serve, stage, tmp_path, monkeypatch):
    # as `export MY_KEY="$(cat file)"` would not, but files in containers do
    monkeypatch.setenv("MY_KEY", KEY + "\n")
    server = serve(by_seed)
    status, out, err = stage(
        "--images",
        write_images(tmp_path, 2),
        "--endpoint",
        server.url,
        "--endpoint-model",
        "m",
        "--endpoint-key-env",
        "MY_KEY",
        "--out",
        tmp_path / "out",
    )
    assert status == 0 and {h["authorization"] for _, h, _ in server.seen} == {f"Bearer {KEY}"}
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 3 + 5 and not any(KEY.encode() in p.read_bytes() for p in files)
    assert KEY not in out + err


def test_without_a_key_no_other_secret_is_sent(serve, stage, tmp_path, monkeypatch):
    # InferenceClient's own fallback
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_user")
    server = serve(by_seed)
    assert (
        stage(
            "--images",
            write_images(tmp_path, 1),
            "--endpoint",
            server.url,
            "--endpoint-model",
            "m",
            "--out",
            tmp_path / "out",
        )[0]
        == 0
    )
    assert len(server.seen) == 3 and not any("hf_of_this_user" in str(h) for _, h, _ in server.seen)


# A server's moods -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mood",
    [(503, {"error": "busy"}), (429, {"error": "slow down"}), (500, b"<html>"), (None, None)],
    ids=["503", "429", "500", "hung-up"],
)
def test_a_busy_server_is_asked_again_and_later(mood, serve, stage, tmp_path, monkeypatch):
    calls, waits = Counter(), []
    monkeypatch.setattr(endpoint, "time", types.SimpleNamespace(sleep=waits.append, time=time.time))

    def script(body):
        calls[body["seed"]] += 1
        return mood if calls[body["seed"]] <= 2 else by_seed(body)

    server = serve(script)
    status, _, _ = stage(
        "--images",
        write_images(tmp_path, 1),
        "--endpoint",
        server.url,
        "--endpoint-model",
        "m",
        "--retries",
        2,
        "--concurrency",
        1,
        "--out",
        tmp_path / "out",
    )
    assert status == 0 and list(calls.values()) == [3, 3, 3] and waits == [0.01, 0.02] * 3
    assert len(lines(tmp_path / "out" / "candidates.jsonl")) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_is_one_line_and_no_retry(status, serve, stage, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(lambda body: (status, {"error": {"message": f"Incorrect key\n{KEY}"}}))
    code, out, err = stage(
        "--images",
        write_images(tmp_path, 8),
        "--endpoint",
        server.url + "/v1",
        "--endpoint-model",
        "m",
        "--concurrency",
        1,
        "--out",
        tmp_path / "out",
    )
    seeds = [body["seed"] for _, _, body in server.seen]
    # none twice, and the rest of the batch is not sent any more
    assert code == 2 and len(set(seeds)) == len(seeds) < 24
    assert (
        err.count("\n") == 1
        and f"generate.py: {server.url}/v1: HTTP {status} " in err
        and "Incorrect key" in err
        and KEY not in err
    )
    assert not (tmp_path / "out").exists()


def test_a_server_of_something_else_is_one_line(serve, stage, tmp_path):
    images = write_images(tmp_path, 1)
    for k, reply in enumerate([(200, b"<html>Welcome</html>"), (200, {"choices": []}), (200, {"hello": 1})]):
        code, _, err = stage(
            "--images",
            images,
            "--endpoint",
            serve(lambda body: reply).url,
            "--endpoint-model",
            "m",
            "--out",
            tmp_path / f"out{k}",
        )
        assert code == 2 and err.count("\n") == 1 and "no chat completion" in err


def test_when_the_server_stays_away_the_same_command_goes_on_later(serve, stage, tmp_path):
    away = threading.Event()
    server = serve(
        lambda body: (503, {"error": "out for lunch"}) if away.is_set() and prompt_of(body) else by_seed(body)
    )
    flags = (
        "--images",
        write_images(tmp_path, 3),
        "--endpoint",
        server.url,
        "--endpoint-model",
        "m",
        "--batch",
        1,
        "--retries",
        1,
    )
    assert stage(*flags, "--out", tmp_path / "whole")[0] == 0
    del server.seen[:]
    ask, calls = endpoint.ask_server, itertools.count()
    endpoint.ask_server = lambda *a, **k: (away.set() if next(calls) == 2 else None, ask(*a, **k))[1]
    try:
        code, _, err = stage(*flags, "--out", tmp_path / "out")
    finally:
        endpoint.ask_server = ask
    assert code == 2 and err.count("\n") == 1 and "HTTP 503 out for lunch; gave up after 1 retries" in err
    away.clear()
    del server.seen[:]
    # the third image alone
    assert stage(*flags, "--out", tmp_path / "out")[0] == 0 and len(server.seen) == 3
    for name in ("candidates.jsonl", "rejected.jsonl", "metrics.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_no_server_at_all_is_one_line(serve, stage, tmp_path):
    server = serve(by_seed)
    server.shutdown()
    server.server_close()
    code, _, err = stage(
        "--images",
        write_images(tmp_path, 1),
        "--endpoint",
        server.url,
        "--endpoint-model",
        "m",
        "--retries",
        1,
        "--out",
        tmp_path / "out",
    )
    assert code == 2 and err.count("\n") == 1 and server.url in err and "gave up after 1 retries" in err


def test_requests_at_a_time_reach_the_limit_and_never_exceed_it(serve, stage, tmp_path):
    def script(body):
        time.sleep(0.05)
        return by_seed(body)

    server = serve(script)
    assert (
        stage(
            "--images",
            write_images(tmp_path, 4),
            "--endpoint",
            server.url,
            "--endpoint-model",
            "m",
            "--concurrency",
            3,
            "--batch",
            4,
            "--out",
            tmp_path / "out",
        )[0]
        == 0
    )
    assert server.busiest == 3 and len(server.seen) == 12


# What is kept, what is rejected ---------------------------------------------------------------------------

# in the order of asking: one image, paradigm direct; None: kept
REPLIES = [
    (candidate(), "stop", None),
    (candidate(" which  FINDING ", "Cyst.", "Otherwise.", "cyst | fissure"), "stop", "duplicate"),
    (candidate(answer="mass"), "stop", None),
    (candidate("Which side?"), "length", "truncated"),
    ("A nice picture.", "stop", "malformed"),
    (None, "stop", "malformed"),
    (candidate("?"), "stop", "empty question"),
    (candidate(options="cyst"), "stop", "too few or empty options"),
    (candidate(options="mass | Mass | cyst"), "stop", "repeated options"),
    (candidate(answer="fracture"), "stop", "answer not among the options"),
    (candidate(answer=" "), "stop", "empty answer"),
    (candidate("Write one exam question about this image"), "stop", "prompt echo"),
    (candidate("Half a surrogate: \ud83d"), "stop", None),
    ("<question>Where is it?</question><think>Left.</think><answer>left lung</answer>", "stop", None),
]


def test_every_reply_is_kept_or_rejected_for_its_reason(serve, stage, tmp_path):
    replies = iter(REPLIES)

    def script(body):
        text, finish, _ = next(replies)
        return (
            200,
            {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]},
        )

    status, out, _ = stage(
        "--images",
        write_images(tmp_path, 1),
        "--endpoint",
        serve(script).url,
        "--endpoint-model",
        "m",
        "--concurrency",
        1,
        "--paradigms",
        "direct",
        "--per-image",
        len(REPLIES),
        "--out",
        tmp_path / "out",
    )
    assert status == 0
    kept, rejected = lines(tmp_path / "out" / "candidates.jsonl"), lines(tmp_path / "out" / "rejected.jsonl")
    got = {int(r["id"].rsplit("-", 1)[1]): r.get("reason") for r in kept + rejected}
    assert got == dict(enumerate(reason for _, _, reason in REPLIES))
    assert [r["text"] for r in rejected] == [text or "" for text, _, reason in REPLIES if reason]
    assert all({"id", "image", "parent", "paradigm", "task", "reason", "text"} <= set(r) for r in rejected)
    assert "options" not in kept[-1] and kept[-1]["answer"] == "left lung"
    want = Counter(reason for _, _, reason in REPLIES if reason)
    counts = {"asked": len(REPLIES), "kept": 4, "rejected": dict(want)}
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == {
        "images": 1,
        **counts,
        "by_paradigm": {"direct": counts},
    }
    for row in [("asked", len(REPLIES)), ("kept", 4), *want.items()]:
        assert re.search(rf"^{row[0]} +{row[1]} +{row[1]}$", out, re.MULTILINE)
    assert (
        len(list(records.read_records(tmp_path / "out" / "candidates.jsonl", records.QUESTION, tmp_path)))
        == 4
    )


def test_counts_are_by_paradigm(serve, stage, tmp_path):
    bad = PARADIGMS["stepwise"]
    server = serve(lambda body: ("no", "stop") if bad in prompt_of(body) else by_seed(body))
    _, out, _ = stage(
        "--images",
        write_images(tmp_path, 2),
        "--endpoint",
        server.url,
        "--endpoint-model",
        "m",
        "--per-image",
        2,
        "--paradigms",
        "stepwise",
        "metacognitive",
        "--out",
        tmp_path / "out",
    )
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["by_paradigm"] == {
        "stepwise": {"asked": 4, "kept": 0, "rejected": {"malformed": 4}},
        "metacognitive": {"asked": 4, "kept": 4, "rejected": {}},
    }
    assert (metrics["asked"], metrics["kept"], metrics["rejected"]) == (8, 4, {"malformed": 4})
    assert re.search(r"^malformed +4 +0 +4$", out, re.MULTILINE)


@pytest.mark.parametrize("batch", [1, 4])
def test_duplicates_are_found_by_content_across_records_and_batches(batch, serve, stage, tmp_path):
    images = write_images(tmp_path, 4)
    # another name, the same image
    shutil.copy(tmp_path / "i0.png", tmp_path / "i2.png")
    server = serve(lambda body: (candidate(), "stop"))
    stage(
        "--images",
        images,
        "--endpoint",
        server.url,
        "--endpoint-model",
        "m",
        "--paradigms",
        "direct",
        "--batch",
        batch,
        "--out",
        tmp_path / "out",
    )
    assert [r["parent"] for r in lines(tmp_path / "out" / "candidates.jsonl")] == ["i0", "i1", "i3"]
    assert [(r["parent"], r["reason"]) for r in lines(tmp_path / "out" / "rejected.jsonl")] == [
        ("i2", "duplicate")
    ]


def test_judging_changes_nothing_that_it_is_given():
    drafts, seen = [{"id": "a", "image": __file__}, {"id": "b", "image": __file__}], set()
    kept, rejected = generate.split_replies(drafts, [(candidate(), False), ("no", False)], seen)
    assert (
        (len(kept), len(rejected)) == (1, 1)
        and seen == set()
        and drafts == [{"id": "a", "image": __file__}, {"id": "b", "image": __file__}]
    )
    # a reply too few is a bug, not a lost candidate
    with pytest.raises(ValueError):
        generate.split_replies(drafts, [(candidate(), False)], seen)


# Going on -------------------------------------------------------------------------------------------------


def test_after_kill_9_the_same_command_gives_the_same_files(serve, stage, tmp_path):
    images = write_images(tmp_path, 4)
    # its duplicates must be known after the restart too
    shutil.copy(tmp_path / "i0.png", tmp_path / "i3.png")
    gate, killed = Future(), threading.Event()
    first_batch = {"i0", "i1"}

    def script(body):
        # of 24: two images of the first batch, six requests each
        if gate.running() and len(server.seen) > 12:
            killed.wait(30)
        text = candidate(f"What of {body['seed'] % 2}?") if body["seed"] % 5 else "no"
        return text, "stop"

    server = serve(script)
    flags = [
        "--images",
        images,
        "--endpoint",
        server.url,
        "--endpoint-model",
        "m",
        "--per-image",
        2,
        "--batch",
        2,
    ]
    assert stage(*flags, "--out", tmp_path / "whole")[0] == 0
    del server.seen[:]
    gate.set_running_or_notify_cancel()
    part = tmp_path / "out.part"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "generate.py"), *map(str, flags), "--out", str(tmp_path / "out")],
        env=os.environ | {"HF_HUB_OFFLINE": "0"},
    )
    while not list(part.glob("state/*.pt")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    killed.set()
    committed = lines(part / "candidates.jsonl")
    assert {r["parent"] for r in committed} <= first_batch and committed
    with open(part / "candidates.jsonl", "a") as file:
        file.write('{"id": "half a li')
    del server.seen[:]
    status, out, _ = stage(*flags, "--out", tmp_path / "out")
    assert status == 0 and "resuming from step 2" in out and len(server.seen) == 12
    for name in ("candidates.jsonl", "rejected.jsonl", "metrics.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert any(
        r["reason"] == "duplicate" and r["parent"] == "i3" for r in lines(tmp_path / "out" / "rejected.jsonl")
    )
    assert stage(*flags, "--out", tmp_path / "out")[:2] == (0, f"{tmp_path / 'out'}: complete already\n")


# The model on this machine --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy_vlm():
    return loading.load(TOY, "cpu")


@pytest.fixture
def toy_stage(stage, toy_vlm, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda name, **_: toy_vlm if name == TOY else pytest.fail(name))
    return lambda *flags: stage("--model", TOY, *flags)


def test_the_toy_generator_writes_valid_records(stage, tmp_path):
    status, _, _ = stage(
        "--model", TOY, "--images", write_images(tmp_path, 8), "--batch", 3, "--out", tmp_path / "out"
    )
    kept = list(
        records.read_records(
            tmp_path / "out" / "candidates.jsonl",
            (*records.QUESTION, "rationale", "task", "modality", "parent"),
            tmp_path,
        )
    )
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (
        status == 0 and len(kept) + len(lines(tmp_path / "out" / "rejected.jsonl")) == metrics["asked"] == 24
    )
    # by far the most are well-formed
    assert metrics["kept"] == len(kept) >= 12
    assert {r["generator"] for r in kept} == {TOY} and {r["task"] for r in kept} == set(TASKS)
    asked_for = [r["question"] in clinic.QUESTIONS[r["task"]] for r in kept]
    # the task in the prompt arrives, row by row
    assert sum(asked_for) > 0.8 * len(kept)


def test_what_is_sampled_depends_on_the_seed_and_not_on_the_batch(toy_stage, tmp_path):
    images = write_images(tmp_path, 4)
    files = {}
    for name, flags in {
        "a": (),
        "again": (),
        "cut": ("--batch", 3),
        "seed": ("--seed", 1),
        "cycle": ("--cycle", 2),
    }.items():
        assert (
            toy_stage("--images", images, "--max-new-tokens", 100, *flags, "--out", tmp_path / name)[0] == 0
        )
        files[name] = {
            (r["paradigm"], r["parent"]): r.get("text")
            or (r["question"], r["options"], r["rationale"], r["answer"])
            for file in ("candidates.jsonl", "rejected.jsonl")
            for r in lines(tmp_path / name / file)
        }
    assert files["a"] == files["again"] == files["cut"] and len(files["a"]) == 12
    for other in ("seed", "cycle"):
        assert sum(files["a"][key] == files[other][key] for key in files["a"]) < 4


def test_a_reply_cut_at_the_limit_is_truncated_and_one_that_just_fits_is_not(toy_vlm, tmp_path):
    image = next(records.read_records(write_images(tmp_path, 1)))
    drafts = generate.build_drafts(image, 0, ["direct"], TASKS, 3, 1, 0, "g")
    whole = generate.ask_model(drafts, toy_vlm, 1.0, 200, 1)
    assert not any(truncated for _, truncated in whole)
    # end of turn included
    lengths = [int(vlm.encode_continuations(toy_vlm, [text])[1].sum()) for text, _ in whole]
    limit = sorted(lengths)[1]
    for length, (text, truncated), (full, _) in zip(
        lengths, generate.ask_model(drafts, toy_vlm, 1.0, limit, 1), whole
    ):
        assert truncated == (length > limit) and full.startswith(text) and (text == full) == (not truncated)
    assert len(set(lengths)) == 3


def test_one_task_reads_the_prompt_once_and_samples_the_same(toy_stage, toy_vlm, tmp_path, monkeypatch):
    sizes, encode = [], vlm.encode_prompts
    monkeypatch.setattr(
        vlm,
        "encode_prompts",
        lambda v, images, texts: (sizes.append(len(texts)), encode(v, images, texts))[1],
    )
    images = write_images(tmp_path, 2)
    flags = ("--images", images, "--per-image", 3, "--max-new-tokens", 30)
    assert toy_stage(*flags, "--tasks", "Disease Diagnosis", "--out", tmp_path / "once")[0] == 0
    assert (
        toy_stage(*flags, "--tasks", "Disease Diagnosis", "Disease Diagnosis", "--out", tmp_path / "apart")[0]
        == 0
    )
    assert sizes == [6, 18]
    for name in ("candidates.jsonl", "rejected.jsonl"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "apart" / name).read_bytes()


def test_a_local_run_that_is_cut_goes_on_bit_equal(toy_stage, tmp_path, monkeypatch):
    flags = ("--images", write_images(tmp_path, 5), "--batch", 2, "--max-new-tokens", 100)
    assert toy_stage(*flags, "--out", tmp_path / "whole")[0] == 0
    calls, sample = itertools.count(1), vlm.sample
    monkeypatch.setattr(
        vlm,
        "sample",
        lambda *a, **k: sample(*a, **k) if next(calls) != 2 else (_ for _ in ()).throw(KeyboardInterrupt),
    )
    with pytest.raises(KeyboardInterrupt):
        toy_stage(*flags, "--out", tmp_path / "out")
    # 1, 2 cut, 3 and 4
    assert toy_stage(*flags, "--out", tmp_path / "out")[0] == 0 and next(calls) == 5
    for name in ("candidates.jsonl", "rejected.jsonl", "metrics.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# A user's mistakes ----------------------------------------------------------------------------------------

SERVER = ("--endpoint", "http://127.0.0.1:9", "--endpoint-model", "m", "--retries", "0")


@pytest.mark.parametrize(
    "flags, says",
    [
        ((), "one of the arguments --model --endpoint is required"),
        (("--model", "x", *SERVER), "not allowed with argument"),
        (("--endpoint", "http://h"), "--endpoint and --endpoint-model go together"),
        (("--model", "x", "--endpoint-model", "m"), "--endpoint and --endpoint-model go together"),
        (("--endpoint", "localhost:8000", "--endpoint-model", "m"), "--endpoint: give a URL"),
        (("--endpoint", "http://me:secret@host/v1", "--endpoint-model", "m"), "--endpoint: give a URL"),
        ((*SERVER, "--paradigms", "sloppy"), "invalid choice: 'sloppy'"),
        ((*SERVER, "--paradigms", "direct", "direct"), "--paradigms: one is named twice"),
        ((*SERVER, "--per-image", "0"), "0 is not at least 1"),
        ((*SERVER, "--temperature", "nan"), "nan is not at least 0"),
        ((*SERVER, "--batch", "two"), "invalid int value: 'two'"),
        (("--model", "/nowhere/at/all"), "/nowhere/at/all"),
        ((*SERVER, "--images", "FOLDER/none.jsonl"), "none.jsonl: No such file"),
        ((*SERVER, "--images", "FOLDER/gone.jsonl"), "gone.jsonl: record g: no image"),
        ((*SERVER, "--images", "FOLDER/broken.jsonl"), "broken.png: not a readable image"),
        ((*SERVER, "--images", "FOLDER/bare.jsonl"), "bare.jsonl:1: no field `image`"),
        ((*SERVER, "--images", "FOLDER/empty.jsonl"), "no records: the file is empty"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_status_2(flags, says, stage, tmp_path):
    images = write_images(tmp_path, 1)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    for name, rows in {
        "gone": [{"id": "g", "image": str(tmp_path / "gone.png")}],
        "bare": [{"id": "b"}],
        "empty": [],
        "broken": [{"id": "b", "image": str(tmp_path / "broken.png")}],
    }.items():
        records.write_records(tmp_path / f"{name}.jsonl", rows)
    status, out, err = stage(
        "--images", images, "--out", tmp_path / "out", *(f.replace("FOLDER", str(tmp_path)) for f in flags)
    )
    # argparse says its usage first
    message = err[err.index("generate.py: ") :]
    assert status == 2 and says in message and message.count("\n") == 1 and not (tmp_path / "out").exists()
