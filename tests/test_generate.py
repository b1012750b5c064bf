"""generate.py: what it asks, of a local model and of a server; what it keeps, what it rejects; resuming."""

import argparse
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

import clinic
import pytest
from helpers import KEY, ROOT
from PIL import Image, ImageChops

import generate
from medgr2 import context, encoding, endpoint, loading, records, vlm
from medgr2.errors import RecordError
from medgr2.images import open_image
from medgr2.prompts import MODALITIES, PARADIGMS, TASKS, generator_prompt

TOY = str(ROOT / "toy" / "generator")


def write_images(folder, n, modalities=MODALITIES):
    """Write n clinic images, their modalities in turn, and images.jsonl. Returns its path."""
    rows = []
    for i in range(n):
        rng, path, modality = random.Random(i), str(folder / f"i{i}.png"), modalities[i % len(modalities)]
        clinic.draw(clinic.draw_facts(rng) | {"modality": modality}, rng).save(path)
        rows.append({"id": f"i{i}", "image": path, "modality": modality})
    records.write_records(folder / "images.jsonl", rows)
    return folder / "images.jsonl"


def lines(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines()]


def candidate(question="Which finding?", answer="cyst", rationale="A hollow ring.", options="mass | cyst"):
    response = f"<think>{rationale}</think><answer>{answer}</answer>"
    return f"<question>{question}</question><options>{options}</options>{response}"


def by_seed(body):
    """A well-formed reply, another for each request."""
    return candidate(f"What of {body['seed']}?"), "stop"


def prompt_of(body):
    return body["messages"][0]["content"][1]["text"]


@pytest.fixture
def ask(stage, tmp_path):
    """ask(server, flags) asks it about images.jsonl, with these flags → (exit status, stdout, stderr)."""

    def call(server, flags="", out="out"):
        flags = f"--endpoint {server.url} --endpoint-model m {flags}".split()
        return stage("--images", tmp_path / "images.jsonl", *flags, "--out", tmp_path / out)

    return call


def assert_same_output(one, other, names=("candidates.jsonl", "rejected.jsonl", "metrics.json")):
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes()


# What is asked --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "per_image, tasks, paradigms",
    [(1, 5, 3), (2, 5, 3), (4, 5, 3), (5, 5, 3), (1, 3, 3), (2, 4, 2), (1, 5, 1)],
)
def test_every_modality_and_paradigm_is_asked_every_task_equally_often(per_image, tasks, paradigms):
    tasks, paradigms = TASKS[:tasks], list(PARADIGMS)[:paradigms]
    images = []
    for modality in ("CT", "OCT", "MRI"):
        images += [{"id": f"{modality}{i}", "image": "/x", "modality": modality} for i in range(len(tasks))]
    random.Random(0).shuffle(images)
    drafts = [
        generate.build_drafts(i, turn, paradigms, tasks, per_image, 1, 0, "g")
        for i, turn in zip(images, generate.assign_turns(images))
    ]
    cells = Counter((d["modality"], d["paradigm"], d["task"]) for of_image in drafts for d in of_image)
    assert set(cells.values()) == {per_image} and len(cells) == 3 * len(paradigms) * len(tasks)
    # One image is asked for as many different tasks as possible.
    for of_image in drafts:
        assert len({d["task"] for d in of_image}) == min(len(tasks), len(of_image))
    # Few images of many modalities are asked for all tasks.
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
    # An unknown modality is left out.
    assert not any("modality" in d for d in drafts)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_the_server_gets_prompt_image_and_settings(suffix, serve, ask, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("weights are loaded"))
    write_images(tmp_path, 2)
    rgba = Image.open(tmp_path / "i1.png").convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
    rgba.save(tmp_path / "i1.png")
    server = serve(by_seed)
    server.url += suffix
    assert ask(server, "--temperature 0.7 --max-new-tokens 99 --cycle 3")[0] == 0
    kept = lines(tmp_path / "out" / "candidates.jsonl")
    sent = {body["seed"]: body for _, _, body in server.seen}
    assert len(sent) == len(server.seen) == len(kept) == 6
    for row in kept:
        body, parent = sent[row["seed"]], row["parent"]
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.7, 99)
        assert [message["role"] for message in body["messages"]] == ["user"]
        assert prompt_of(body) == generator_prompt(row["paradigm"], row["task"])
        head, data = body["messages"][0]["content"][0]["image_url"]["url"].split(",")
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert head == "data:image/png;base64" and image.mode == "RGB"
        # The same pixels that a local model would get.
        local = open_image(tmp_path / "out" / row["image"])
        assert ImageChops.difference(image, local).getbbox() is None
        assert row["question"] == f"What of {row['seed']}?" and row["cycle"] == 3
        assert row["id"] == f"{parent}-c3-{row['paradigm']}-0" and row["image"] == f"../{parent}.png"
        assert row["modality"] == {"i0": "CT", "i1": "MRI"}[parent]
        assert row["source"] == "generated" and row["generator"] == "m"
    assert {path for path, _, _ in server.seen} == {"/v1/chat/completions"}
    assert {row["paradigm"] for row in kept} == set(PARADIGMS)
    assert len(list(records.read_records(tmp_path / "out/candidates.jsonl", records.QUESTION, tmp_path))) == 6


def test_the_key_goes_into_the_header_and_nowhere_else(serve, ask, tmp_path, monkeypatch):
    # A key from a file often ends in a newline.
    monkeypatch.setenv("MY_KEY", KEY + "\n")
    write_images(tmp_path, 2)
    server = serve(by_seed)
    status, out, err = ask(server, "--endpoint-key-env MY_KEY")
    assert status == 0 and {h["authorization"] for _, h, _ in server.seen} == {f"Bearer {KEY}"}
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 3 + 5 and not any(KEY.encode() in p.read_bytes() for p in files)
    assert KEY not in out + err


def test_without_a_key_no_other_secret_is_sent(serve, ask, tmp_path, monkeypatch):
    # What InferenceClient would send by itself.
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_user")
    write_images(tmp_path, 1)
    server = serve(by_seed)
    assert ask(server)[0] == 0
    assert len(server.seen) == 3 and not any("hf_of_this_user" in str(h) for _, h, _ in server.seen)


# A server that fails -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure",
    [(503, {"error": "busy"}), (429, {"error": "slow down"}), (500, b"<html>"), (None, None)],
    ids=["503", "429", "500", "hung-up"],
)
def test_a_busy_server_is_asked_again_after_longer_and_longer_waits(
    failure, serve, ask, tmp_path, monkeypatch
):
    calls, waits = Counter(), []
    monkeypatch.setattr(endpoint, "time", types.SimpleNamespace(sleep=waits.append))

    def script(body):
        calls[body["seed"]] += 1
        return failure if calls[body["seed"]] <= 2 else by_seed(body)

    write_images(tmp_path, 1)
    status, _, _ = ask(serve(script), "--retries 2 --concurrency 1")
    assert status == 0 and list(calls.values()) == [3, 3, 3] and waits == [0.01, 0.02] * 3
    assert len(lines(tmp_path / "out" / "candidates.jsonl")) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_is_one_line_and_no_retry(status, serve, ask, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    write_images(tmp_path, 8)
    server = serve(lambda body: (status, {"error": {"message": f"Incorrect key\n{KEY}"}}))
    code, _, err = ask(server, "--concurrency 1")
    seeds = [body["seed"] for _, _, body in server.seen]
    # None is sent twice, and the rest of the batch is not sent at all.
    assert code == 2 and len(set(seeds)) == len(seeds) < 24
    assert err.count("\n") == 1 and f"generate.py: {server.url}: HTTP {status} " in err
    assert "Incorrect key" in err and KEY not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reply", [b"<html>Welcome</html>", {"choices": []}, {"hello": 1}])
def test_a_server_of_something_else_is_one_line(reply, serve, ask, tmp_path):
    write_images(tmp_path, 1)
    code, _, err = ask(serve(lambda body: (200, reply)))
    assert code == 2 and err.count("\n") == 1 and "not a chat completion" in err


def test_if_the_server_stays_away_the_same_command_resumes_later(serve, ask, tmp_path, monkeypatch):
    away, batches, ask_server = threading.Event(), itertools.count(), endpoint.ask_server

    def ask_until_the_third_batch(*args, **settings):
        if next(batches) == 2:
            away.set()
        return ask_server(*args, **settings)

    write_images(tmp_path, 3)
    server = serve(lambda body: (503, {"error": "out for lunch"}) if away.is_set() else by_seed(body))
    flags = "--batch 1 --retries 1"
    assert ask(server, flags, "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(endpoint, "ask_server", ask_until_the_third_batch)
        code, _, err = ask(server, flags)
    assert code == 2 and err.count("\n") == 1 and "HTTP 503 out for lunch; gave up after 1 retries" in err
    away.clear()
    del server.seen[:]
    # The third image only.
    assert ask(server, flags)[0] == 0 and len(server.seen) == 3
    assert_same_output(tmp_path / "out", tmp_path / "whole")


def test_no_server_at_all_is_one_line(serve, ask, tmp_path):
    write_images(tmp_path, 1)
    server = serve(by_seed)
    server.shutdown()
    server.server_close()
    code, _, err = ask(server, "--retries 1")
    assert code == 2 and err.count("\n") == 1 and server.url in err and "gave up after 1 retries" in err


def test_requests_at_a_time_reach_the_limit_and_never_exceed_it(serve, ask, tmp_path):
    def script(body):
        time.sleep(0.05)
        return by_seed(body)

    write_images(tmp_path, 4)
    server = serve(script)
    assert ask(server, "--concurrency 3 --batch 4")[0] == 0
    assert server.busiest == 3 and len(server.seen) == 12


# What is kept, what is rejected ---------------------------------------------------------------------------

# (reply, finish_reason, reason for rejection or None), in the order of asking.
REPLIES = [
    (candidate(), "stop", None),
    (candidate(" which  FINDING ", "Cyst.", "Otherwise.", "cyst | fissure"), "stop", "duplicate"),
    (candidate(answer="mass"), "stop", None),
    (candidate("Which side?"), "length", "truncated"),
    ("A nice picture.", "stop", "malformed"),
    (None, "stop", "malformed"),
    (candidate("?"), "stop", "empty question"),
    (candidate(options="cyst"), "stop", "too few or empty options"),
    (candidate("Which of these?", options="mass | Mass | cyst"), "stop", None),
    (candidate(answer="fracture"), "stop", "answer not among the options"),
    (candidate(answer=" "), "stop", "empty answer"),
    (candidate("Write one exam question about this image"), "stop", "prompt echo"),
    (candidate("Half a surrogate: \ud83d"), "stop", None),
    ("<question>Where is it?</question><think>Left.</think><answer>left lung</answer>", "stop", None),
]


def test_every_reply_is_kept_or_rejected_for_its_reason(serve, ask, tmp_path):
    replies = iter(REPLIES)

    def script(body):
        text, finish, _ = next(replies)
        message = {"role": "assistant", "content": text}
        return 200, {"choices": [{"message": message, "finish_reason": finish}]}

    write_images(tmp_path, 1)
    flags = f"--concurrency 1 --paradigms direct --per-image {len(REPLIES)}"
    status, out, _ = ask(serve(script), flags)
    assert status == 0
    kept, rejected = lines(tmp_path / "out" / "candidates.jsonl"), lines(tmp_path / "out" / "rejected.jsonl")
    got = {int(r["id"].rsplit("-", 1)[1]): r.get("reason") for r in kept + rejected}
    assert got == dict(enumerate(reason for _, _, reason in REPLIES))
    assert [r["text"] for r in rejected] == [text or "" for text, _, reason in REPLIES if reason]
    assert all({"id", "image", "parent", "paradigm", "task", "reason", "text"} <= set(r) for r in rejected)
    assert "options" not in kept[-1] and kept[-1]["answer"] == "left lung"
    reasons = Counter(reason for _, _, reason in REPLIES if reason)
    counts = {"asked": len(REPLIES), "kept": 5, "rejected": dict(reasons)}
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics == {"images": 1, **counts, "by_paradigm": {"direct": counts}}
    for name, n in [("asked", len(REPLIES)), ("kept", 5), *reasons.items()]:
        assert re.search(rf"^{name} +{n} +{n}$", out, re.MULTILINE)
    assert len(list(records.read_records(tmp_path / "out/candidates.jsonl", records.QUESTION, tmp_path))) == 5


def test_if_nothing_is_kept_the_reasons_are_counted_and_the_replies_can_be_read(serve, ask, tmp_path):
    replies = itertools.cycle(
        [("no form", "stop"), (candidate(answer="PET"), "stop"), (candidate(), "length")]
    )
    write_images(tmp_path, 2)
    server = serve(lambda body: next(replies))
    status, _, error = ask(server)
    assert status == 2 and error.count("\n") == 1 and "none of 6 candidates is kept (" in error
    assert all(f"{why} 2" in error for why in ("malformed", "answer not among the options", "truncated"))
    assert not (tmp_path / "out").exists() and len(lines(tmp_path / "out.part" / "rejected.jsonl")) == 6
    # The same command asks nothing anew.
    assert ask(server)[2] == error and len(server.seen) == 6


def test_counts_are_by_paradigm(serve, ask, tmp_path):
    bad = PARADIGMS["stepwise"]
    write_images(tmp_path, 2)
    server = serve(lambda body: ("no", "stop") if bad in prompt_of(body) else by_seed(body))
    _, out, _ = ask(server, "--per-image 2 --paradigms stepwise metacognitive")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["by_paradigm"] == {
        "stepwise": {"asked": 4, "kept": 0, "rejected": {"malformed": 4}},
        "metacognitive": {"asked": 4, "kept": 4, "rejected": {}},
    }
    assert (metrics["asked"], metrics["kept"], metrics["rejected"]) == (8, 4, {"malformed": 4})
    assert re.search(r"^malformed +4 +0 +4$", out, re.MULTILINE)


@pytest.mark.parametrize("batch", [1, 4])
def test_duplicates_are_found_by_content_across_records_and_batches(batch, serve, ask, tmp_path):
    write_images(tmp_path, 4)
    # The same image under another name.
    shutil.copy(tmp_path / "i0.png", tmp_path / "i2.png")
    ask(serve(lambda body: (candidate(), "stop")), f"--paradigms direct --batch {batch}")
    rejected = lines(tmp_path / "out" / "rejected.jsonl")
    assert [r["parent"] for r in lines(tmp_path / "out" / "candidates.jsonl")] == ["i0", "i1", "i3"]
    assert [(r["parent"], r["reason"]) for r in rejected] == [("i2", "duplicate")]


def test_splitting_replies_mutates_no_argument_and_needs_a_reply_for_each_draft():
    drafts, seen = [{"id": "a", "image": __file__}, {"id": "b", "image": __file__}], set()
    kept, rejected = generate.split_replies(drafts, [(candidate(), False), ("no", False)], seen)
    assert (len(kept), len(rejected)) == (1, 1) and seen == set()
    assert drafts == [{"id": "a", "image": __file__}, {"id": "b", "image": __file__}]
    with pytest.raises(ValueError):
        generate.split_replies(drafts, [(candidate(), False)], seen)


# Resuming -------------------------------------------------------------------------------------------------


def test_after_kill_9_the_same_command_gives_the_same_files(serve, ask, tmp_path):
    images = write_images(tmp_path, 4)
    # Its candidates are duplicates of the first batch's, also in a resumed run.
    shutil.copy(tmp_path / "i0.png", tmp_path / "i3.png")
    holding, killed = threading.Event(), threading.Event()

    def script(body):
        # The first batch is 12 of the 24 requests: two images, six each. The second one waits for the kill.
        if holding.is_set() and len(server.seen) > 12:
            killed.wait(30)
        text = candidate(f"What of {body['seed'] % 2}?") if body["seed"] % 5 else "no"
        return text, "stop"

    server = serve(script)
    flags = "--per-image 2 --batch 2"
    assert ask(server, flags, "whole")[0] == 0
    del server.seen[:]
    holding.set()
    part = tmp_path / "out.part"
    command = [ROOT / "generate.py", "--images", images, "--out", tmp_path / "out"]
    command += f"--endpoint {server.url} --endpoint-model m {flags}".split()
    env = os.environ | {"HF_HUB_OFFLINE": "0"}
    process = subprocess.Popen([sys.executable, *map(str, command)], env=env)
    while not list(part.glob("state/*.pt")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    killed.set()
    committed = lines(part / "candidates.jsonl")
    assert committed and {r["parent"] for r in committed} <= {"i0", "i1"}
    with open(part / "candidates.jsonl", "a") as file:
        file.write('{"id": "half a li')
    del server.seen[:]
    status, out, _ = ask(server, flags)
    assert status == 0 and "resuming from step 2" in out and len(server.seen) == 12
    assert_same_output(tmp_path / "out", tmp_path / "whole")
    rejected = lines(tmp_path / "out" / "rejected.jsonl")
    assert "duplicate" in [r["reason"] for r in rejected if r["parent"] == "i3"]
    assert ask(server, flags)[:2] == (0, f"{tmp_path / 'out'}: complete already\n")


# A local model --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy_vlm():
    return loading.load(TOY, "cpu")


@pytest.fixture
def toy_stage(stage, toy_vlm, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda name, **_: toy_vlm if name == TOY else pytest.fail(name))
    return lambda *flags: stage("--model", TOY, *flags)


def test_the_toy_generator_writes_valid_records(stage, tmp_path):
    images, out = write_images(tmp_path, 8), tmp_path / "out"
    status, _, _ = stage("--model", TOY, "--images", images, "--batch", 3, "--out", out)
    fields = (*records.QUESTION, "rationale", "task", "modality", "parent")
    kept = list(records.read_records(out / "candidates.jsonl", fields, tmp_path))
    metrics = json.loads((out / "metrics.json").read_text())
    assert status == 0 and len(kept) + len(lines(out / "rejected.jsonl")) == metrics["asked"] == 24
    # Most replies are well-formed.
    assert metrics["kept"] == len(kept) >= 12
    assert {r["generator"] for r in kept} == {TOY} and {r["task"] for r in kept} == set(TASKS)
    # Most questions are of the task that the row's prompt asks for.
    of_its_task = [r["question"] in clinic.QUESTIONS[r["task"]] for r in kept]
    assert sum(of_its_task) > 0.8 * len(kept)


def test_what_is_sampled_depends_on_the_seed_and_not_on_the_batch(toy_stage, tmp_path):
    images = write_images(tmp_path, 4)

    def texts(name, *flags):
        flags = "--max-new-tokens", 100, *flags
        assert toy_stage("--images", images, *flags, "--out", tmp_path / name)[0] == 0
        found = {}
        for row in lines(tmp_path / name / "candidates.jsonl"):
            written = row["question"], row["options"], row["rationale"], row["answer"]
            found[row["paradigm"], row["parent"]] = written
        for row in lines(tmp_path / name / "rejected.jsonl"):
            found[row["paradigm"], row["parent"]] = row["text"]
        return found

    first = texts("first")
    assert first == texts("again") == texts("batch", "--batch", 3) and len(first) == 12
    for other in (texts("seed", "--seed", 1), texts("cycle", "--cycle", 2)):
        assert sum(first[key] == other[key] for key in first) < 4


def test_a_reply_cut_at_the_limit_is_truncated_and_one_that_just_fits_is_not(toy_vlm, tmp_path):
    image = next(records.read_records(write_images(tmp_path, 1)))
    drafts = generate.build_drafts(image, 0, ["direct"], TASKS, 6, 1, 0, "g")
    inputs = generate.encode_drafts(toy_vlm, 1, drafts)
    whole = generate.ask_model(drafts, inputs, toy_vlm, 0, 200, 1)
    assert not any(truncated for _, truncated in whole)
    # In tokens, with the end of turn.
    lengths = [int(encoding.encode_continuations(toy_vlm, [text])[1].sum()) for text, _ in whole]
    assert len(set(lengths)) >= 3
    limit = sorted(set(lengths))[1]
    cut = generate.ask_model(drafts, inputs, toy_vlm, 0, limit, 1)
    for length, (text, truncated), (full, _) in zip(lengths, cut, whole):
        assert truncated == (length > limit) and full.startswith(text)
        # A reply one token too long lacks its end of turn only.
        assert (text == full) == (length <= limit + 1)


def test_an_image_too_large_for_the_context_is_refused_at_the_start_or_left_out(
    toy_stage, tmp_path, monkeypatch
):
    real = context.count_tokens
    # A model whose images cost as many more tokens as they are wide, and a context of 1,024.
    monkeypatch.setattr(
        context, "count_tokens", lambda model, image, text: real(model, image, text) + image.width
    )
    images = write_images(tmp_path, 3)
    first, second, third = records.read_records(images)
    Image.new("RGB", (1300, 64)).save(second["image"])
    flags = "--images", images, "--max-new-tokens", 8, "--paradigms", "direct"
    status, _, error = toy_stage(*flags, "--out", tmp_path / "stop")
    assert status == 2 and error.count("\n") == 1 and "1 of 3 records are too long" in error
    assert not (tmp_path / "stop").exists()
    toy_stage(*flags, "--on-error", "skip", "--out", tmp_path / "skip")
    # Eight tokens are too few for a candidate.
    rejected = lines(tmp_path / "skip.part" / "rejected.jsonl")
    assert {row["parent"] for row in rejected} == {first["id"], third["id"]}


def test_an_unreadable_image_is_left_out_by_skip_if_the_prompts_nearly_fill_the_context_too(
    toy_stage, tmp_path
):
    images = write_images(tmp_path, 2)
    bad = next(records.read_records(images))["image"]
    with open(bad, "wb") as f:
        f.write(b"no image")
    # The toy's context is 1,024 tokens.
    flags = "--images", images, "--max-new-tokens", 1000, "--paradigms", "direct", "--on-error", "skip"
    status, said, error = toy_stage(*flags, "--max-rejected", 0.5, "--out", tmp_path / "skip")
    assert status == 2 and "left out: 1 of 2 records are too long" in said
    assert "none of 1 candidates is kept (unreadable image 1)" in error


def test_an_image_is_encoded_once_with_one_task_a_prompt_too_and_the_samples_are_the_same(
    toy_stage, tmp_path, monkeypatch
):
    sizes, encode = [], encoding.encode_by_image

    def count_and_encode(model, images, texts, device=None):
        inputs = encode(model, images, texts, device)
        sizes.append((len(texts), len(inputs["pixel_values"])))
        return inputs

    monkeypatch.setattr(encoding, "encode_by_image", count_and_encode)
    flags = "--images", write_images(tmp_path, 2), "--per-image", 3, "--max-new-tokens", 30
    tasks = "--tasks", "Disease Diagnosis"
    assert toy_stage(*flags, *tasks, "--out", tmp_path / "once")[0] == 0
    # Named twice, it counts as two tasks.
    assert toy_stage(*flags, *tasks, "Disease Diagnosis", "--out", tmp_path / "apart")[0] == 0
    # Three paradigms, two images.
    assert sizes == [(6, 2), (18, 2)]
    assert_same_output(tmp_path / "once", tmp_path / "apart", ("candidates.jsonl", "rejected.jsonl"))


def test_the_tasks_can_be_those_of_a_record_file(toy_stage, tmp_path):
    tasks = ["Lesion Grading", "Disease Diagnosis", "Lesion Grading"]
    asked = [{"id": str(i), "image": "images/0.png", "task": task} for i, task in enumerate(tasks)]
    of = tmp_path / "expert.jsonl"
    of.write_text("".join(json.dumps(row) + "\n" for row in asked))
    flags = "--images", write_images(tmp_path, 2), "--max-new-tokens", 100
    assert toy_stage(*flags, "--tasks-of", of, "--out", tmp_path / "x")[0] == 0
    rows = [r for name in ("candidates", "rejected") for r in lines(tmp_path / "x" / f"{name}.jsonl")]
    assert {row["task"] for row in rows} == set(tasks)
    of.write_text(json.dumps({"id": "0", "image": "images/0.png"}) + "\n")
    status, _, error = toy_stage(*flags, "--tasks-of", of, "--out", tmp_path / "y")
    assert status == 2 and f"{of}" in error and "task" in error


def test_an_interrupted_local_run_resumes_with_the_same_bytes(toy_stage, tmp_path, monkeypatch):
    flags = "--images", write_images(tmp_path, 5), "--batch", 2, "--max-new-tokens", 100
    assert toy_stage(*flags, "--out", tmp_path / "whole")[0] == 0
    calls, sample = itertools.count(1), vlm.sample

    def interrupt_the_second(*args, **settings):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return sample(*args, **settings)

    monkeypatch.setattr(vlm, "sample", interrupt_the_second)
    with pytest.raises(KeyboardInterrupt):
        toy_stage(*flags, "--out", tmp_path / "out")
    # Batch 1, batch 2 interrupted; then batches 2 and 3.
    assert toy_stage(*flags, "--out", tmp_path / "out")[0] == 0 and next(calls) == 5
    assert_same_output(tmp_path / "out", tmp_path / "whole")


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
    files = {
        "gone": [{"id": "g", "image": str(tmp_path / "gone.png")}],
        "bare": [{"id": "b"}],
        "empty": [],
        "broken": [{"id": "b", "image": str(tmp_path / "broken.png")}],
    }
    for name, rows in files.items():
        records.write_records(tmp_path / f"{name}.jsonl", rows)
    flags = [flag.replace("FOLDER", str(tmp_path)) for flag in flags]
    status, out, err = stage("--images", images, "--out", tmp_path / "out", *flags)
    # argparse prints the usage first.
    message = err[err.index("generate.py: ") :]
    assert status == 2 and says in message and message.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_parts_of_the_images_share_none_and_leave_none_out(tmp_path):
    path = write_images(tmp_path, 7)
    parts = [[r["id"] for r in generate.read_images(path, part=(k, 3))] for k in (1, 2, 3)]
    assert sorted(sum(parts, [])) == [r["id"] for r in records.read_records(path)]
    assert sorted(map(len, parts)) == [2, 2, 3]


def test_more_parts_than_images_is_one_line(tmp_path):
    with pytest.raises(RecordError, match="2 images: too few for part 3 of 3"):
        generate.read_images(write_images(tmp_path, 2), part=(3, 3))


@pytest.mark.parametrize("text", ["0/3", "4/3", "2", "a/b", "1/", "-1/3", ""])
def test_what_is_no_part_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="give K/N"):
        generate.parse_part(text)
