"""README.md of a trained model's folder: its header and tables, and that its own lines load the model."""

import base64
import hashlib
import json
import re
import shlex
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from helpers import ROOT

import reward
import sft
from medgr2 import model_card


def read(folder):
    """(header, text) of a folder's card, by another YAML reader."""
    _, header, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(header), text


def test_the_card_says_what_a_model_was_made_from_on_which_data_how_and_how_well(data, call, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(ROOT / "toy" / "policy", base)
    header = "license: other\nlicense_name: toy-research\nbase_model: maker/toy-vl\nlanguage: en\n"
    (base / "README.md").write_text(f"---\n{header}---\n# The base's own card\n")
    words = f"--model {base} --data {data}/expert.jsonl {data}/reports.jsonl --val {data}/val.jsonl"
    words += f" --steps 2 --batch 2 --out {out}"
    assert call(sft, words)[0] == 0
    header, text = read(out)
    assert header == {
        "license": "other",
        "license_name": "toy-research",
        "base_model": "maker/toy-vl",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
    }
    assert f"# {out}\n\nVision-language model trained by `sft.py` from `{base}`" in text
    assert "Licence of the base: other toy-research." in text and "own card" not in text
    assert shlex.split(re.search("```\n(python .*)\n```", text)[1]) == ["python", "sft.py", *words.split()]
    for name in ("expert", "reports", "val"):
        path = data / f"{name}.jsonl"
        assert f"| {path} | {hashlib.sha256(path.read_bytes()).hexdigest()} |" in text
    result = json.loads((out / "metrics.json").read_text())
    assert set(result) == {"steps", "examples", "train_loss", "val_loss", "skipped"}
    for name, value in result.items():
        assert f"| {name} | {value if isinstance(value, int) else f'{value:.3f}'} |" in text
    # A model trained from this one: the licence and the Hub's name of the first base go on.
    words = f"--model {out} --data {data}/expert.jsonl --steps 1 --batch 1 --out {tmp_path}/next"
    assert call(sft, words)[0] == 0
    assert read(tmp_path / "next")[0] == header and f"from `{out}`" in read(tmp_path / "next")[1]


def test_the_lines_of_the_card_load_the_model_with_transformers_alone(data, call, tmp_path):
    words = f"--model {ROOT}/toy/policy --data {data}/expert.jsonl --steps 1 --batch 1 --out {tmp_path}/m"
    assert call(sft, words)[0] == 0
    lines = re.search("```python\n(.*?)```", read(tmp_path / "m")[1], re.DOTALL)[1]
    found = {}
    exec(compile(lines, "README.md", "exec"), found)
    assert found["model"].num_parameters() > 1e6 and found["processor"].tokenizer.eos_token


def test_a_base_without_a_card_has_no_licence_and_no_name_on_the_hub(data, call, tmp_path):
    words = f"train --model {ROOT}/toy/policy --data {data}/expert.jsonl --steps 1 --out {tmp_path}/rm"
    assert call(reward, words)[0] == 0
    header, text = read(tmp_path / "rm")
    assert not header and "The base names no licence." in text
    assert "Reward model trained by `reward.py`" in text and "from_pretrained" not in text
    auroc = json.loads((tmp_path / "rm" / "metrics.json").read_text())["auroc"]
    assert f"| auroc | {auroc:.3f} |" in text


@pytest.mark.parametrize("text", ["", "# No header\n", "---\n- a\n- list\n---\n", "---\nlicense: [\n---\n"])
def test_a_card_without_a_header_that_can_be_read_says_nothing(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert model_card.read_header(str(tmp_path)) == {}


# --push-to-hub -------------------------------------------------------------------------------------------


class HubHandler(BaseHTTPRequestHandler):
    """As much of the Hub as an upload needs; server.repositories, server.files: what it was told and sent."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = f"http://127.0.0.1:{self.server.server_port}/me/mine"
        status, reply = 200, {"url": url, "commitUrl": f"{url}/commit/{'0' * 40}", "commitOid": "0" * 40}
        if self.path == "/api/repos/create":
            self.server.repositories.append(json.loads(body))
            status = self.server.status
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            reply = {"files": modes}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            status = self.server.commit_status
        self.answer(status, reply)

    def do_GET(self):
        known = {"id": "me/mine", "sha": "0" * 40, "siblings": [], "private": True}
        self.answer(200 if self.server.status == 200 else 404, known)

    def answer(self, status, reply):
        payload = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A server in place of the Hub."""
    import huggingface_hub.constants as constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.repositories, server.files, server.status, server.commit_status = [], {}, 200, 200
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()
    server.server_close()


def test_a_pushed_model_is_complete_and_private_and_no_record_goes_with_it(data, call, tmp_path, hub):
    out = tmp_path / "out"
    words = f"--model {ROOT}/toy/policy --data {data}/expert.jsonl --steps 1 --batch 1 --out {out}"
    assert call(sft, words + " --push-to-hub me/mine")[0] == 0
    (told,) = hub.repositories
    assert (told["name"], told["organization"], told["visibility"]) == ("mine", "me", "private")
    kept_here = {"metrics.jsonl", "args.json"}
    assert hub.files == {p.name: p.read_bytes() for p in out.iterdir() if p.name not in kept_here}
    assert b'from_pretrained("me/mine")' in hub.files["README.md"]
    assert {"README.md", "config.json", "model.safetensors", "chat_template.jinja"} <= set(hub.files)


def test_a_repository_that_cannot_be_made_is_one_line_before_training(data, call, tmp_path, hub):
    hub.status = 403
    words = f"--model {ROOT}/toy/policy --data {data}/expert.jsonl --steps 1 --out {tmp_path}/out"
    status, out, err = call(sft, *words.split(), "--push-to-hub", "me/mine")
    assert status == 2 and err.count("\n") == 1 and "--push-to-hub me/mine: " in err
    assert "403" in err and out == "" and list(tmp_path.iterdir()) == []


def test_if_the_upload_fails_the_run_is_complete_and_one_line_says_how_to_push_it(data, call, tmp_path, hub):
    hub.commit_status = 400
    out = tmp_path / "out"
    words = f"--model {ROOT}/toy/policy --data {data}/expert.jsonl --steps 1 --batch 1 --out {out}"
    status, _, err = call(sft, *words.split(), "--push-to-hub", "me/mine")
    err = err.splitlines()[-1]
    assert status == 2 and f"{out}: complete, but not pushed: " in err
    assert f"hf upload me/mine {out} --exclude '*.jsonl'" in err and (out / "model.safetensors").is_file()
