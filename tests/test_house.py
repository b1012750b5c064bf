"""The rules of the house, as DESIGN has them: who may import whom, how long a function is, what --help costs."""
import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ["generate", "reward", "sft", "grpo", "eval"]
ALLOWED = {"records": set(), "runs": set(), "triton_ops": set(), "vlm": {"triton_ops"},
           "measures": set(), "figures": set(), "scorers": {"records"}, "comparisons": {"measures", "records", "runs"},
           "leakage": {"records", "runs"}, "levels": {"records", "runs"}, "report": {"records", "runs"},
           "provenance": {"records", "runs"},
           **{stage: {"records", "runs", "vlm", "triton_ops", "measures", "leakage"} for stage in STAGES},
           "toy": {"records", "runs", "vlm", "clinic", "measures"}}
ALLOWED["reward"] = ALLOWED["reward"] | {"levels"}
ALLOWED["grpo"] = ALLOWED["grpo"] | {"reward"}  # the only arrow between stages
ALLOWED["eval"] = ALLOWED["eval"] | {"scorers", "comparisons", "figures"}
TOOLS = ["leakage", "report", "provenance"]  # ground floor, with a command line of their own
OURS = {*ALLOWED, "clinic"}
FILES = sorted(ROOT.glob("*.py")) + sorted((ROOT / "toy").glob("*.py"))


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_no_table_of_the_readme_is_empty_and_every_result_it_names_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tables = dict(re.findall(r"<!-- (\w+) -->\n(.*?)<!-- /\1 -->", text, re.DOTALL))
    assert {"results", "grpo_step", "logprob", "cycle", "scorers", "kills"} == set(tables) and all("|" in table for table in tables.values())
    named = re.findall(r"benchmarks/results/\w+\.json", text)
    assert named and all((ROOT / name).is_file() for name in named)


def test_tests_that_share_a_fixture_share_a_process(request):
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("not run by tests/run.sh, or by one process")
    assert request.node.nodeid.endswith("@test_house.py")


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_a_room_imports_only_what_it_may(file):
    room = "toy" if file.parent.name == "toy" else file.stem
    assert set(imports(ast.parse(file.read_text()))) & OURS <= ALLOWED[room]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_functions_are_short_and_nothing_is_forbidden(file):
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= (120 if node.name == "main" else 60), node.name
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), "bare except"
        assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("eval", "exec")), "eval"
        assert not (isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and getattr(node.value, "value", True) is not False)
        assert not (isinstance(node, ast.keyword) and node.arg == "type" and getattr(node.value, "id", "") == "bool"), "type=bool"


@pytest.mark.parametrize("stage", STAGES + TOOLS)
def test_help_answers_without_torch(stage):
    code = ("import sys, runpy\nsys.argv = ['x', '--help']\n"
            f"try: runpy.run_path('{stage}.py', run_name='__main__')\n"
            "except SystemExit as e: assert e.code == 0\n"
            "assert not {'torch', 'transformers', 'PIL'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage:"), done.stderr


@pytest.mark.parametrize("stage", STAGES + TOOLS)
def test_a_stage_can_be_imported_and_does_nothing(stage, tmp_path):
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['x', '--nonsense']; import {stage}"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "" and not os.listdir(tmp_path), done.stderr


@pytest.mark.parametrize("stage", STAGES + TOOLS)
def test_every_flag_has_its_help(stage):
    tree = ast.parse((ROOT / f"{stage}.py").read_text())
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == "add_argument"]
    assert calls and all(any(k.arg == "help" for k in call.keywords) for call in calls)


@pytest.mark.parametrize("stage", STAGES + TOOLS)
def test_a_mistaken_or_abbreviated_flag_is_one_line_and_status_2(stage):
    flags = ["train"] if stage == "reward" else []
    for wrong in ("--no-such-flag", "--mod"):
        done = subprocess.run([sys.executable, f"{stage}.py", *flags, "--out", "x", "--model", "m", "--data", "d", "--images", "i", wrong, "1"],
                              cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and f"{stage}.py" in done.stderr, done.stderr


@pytest.mark.parametrize("command", [
    "grpo.py --model m --reward r --data d --out o --group 1", "grpo.py --model m --reward r --data d --out o --micro-batch 0",
    "grpo.py --model m --reward r --data d --out o --lr nan", "grpo.py --model m --reward r --data d --out o --epsilon 1.5",
    "sft.py --model m --data d --out o --batch 0", "sft.py --model m --data d --out o --save-every 0", "sft.py --model m --data d --out o --clip inf",
    "reward.py score --model m --data d --out o --keep 50", "reward.py score --model m --data d --out o --top-k 0",
    "reward.py train --model m --data d --out o --holdout -0.2", "eval.py --model m --data d --out o --batch 0",
    "generate.py --images i --model m --out o --per-image two"])
def test_a_number_that_makes_no_sense_is_one_line_that_names_its_flag(command):
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and command.split()[-2] in done.stderr, done.stderr
