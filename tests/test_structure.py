"""The rules of DESIGN that a program can check: imports, the length of functions, what --help costs."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ["generate", "reward", "sft", "grpo", "eval"]
# Modules with a command line of their own.
ANALYSES = "compare transfer efficiency reliability summarize provenance report walkthrough".split()
TOOLS = ["medgr2.records", "medgr2.leakage", *(f"analysis.{name}" for name in ANALYSES)]
FILES = sorted(p for folder in (".", "medgr2", "analysis", "toy") for p in ROOT.glob(f"{folder}/*.py"))


def imports(tree):
    """The modules that a file imports, `from a import b` as both `a` and `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_in(module, package):
    return module == package or module.startswith(package + ".")


def forbidden(file, module):
    """Why a file may not import a module, or None."""
    if any(is_in(module, name) for name in ("tests", "benchmarks", "recipes")):
        return "nothing imports tests, benchmarks or recipes"
    if file.parent == ROOT:
        if module in STAGES and (file.stem, module) != ("grpo", "reward"):
            return "stages meet on disk; only grpo.py imports a stage, for the reward model's class"
        if is_in(module, "analysis"):
            return "a stage reads no finished run"
    if file.parent.name == "medgr2" and (module in STAGES or is_in(module, "analysis")):
        return "medgr2 is what the stages are built on"
    if file.parent.name == "analysis" and module in [
        *STAGES,
        "triton_ops",
        "medgr2.vlm",
        "medgr2.encoding",
        "medgr2.loading",
    ]:
        return "analysis reads finished runs and runs no model"
    if file.parent.name == "toy" and (module in STAGES or is_in(module, "analysis")):
        return "the toy is data and models on disk"
    if file.name == "triton_ops.py" and is_in(module, "medgr2"):
        return "triton_ops.py can be copied by itself"


def test_the_root_holds_the_six_scripts_and_no_other_module():
    assert {path.stem for path in ROOT.glob("*.py")} == {*STAGES, "triton_ops"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_a_file_imports_only_what_it_may(file):
    found = {module: forbidden(file, module) for module in imports(ast.parse(file.read_text()))}
    assert {module: why for module, why in found.items() if why} == {}


def test_the_import_rule_can_fail():
    assert forbidden(ROOT / "sft.py", "grpo") and forbidden(ROOT / "medgr2" / "runs.py", "analysis.report")
    assert forbidden(ROOT / "eval.py", "analysis.compare") and not forbidden(ROOT / "grpo.py", "reward")


def test_no_table_of_readme_and_docs_is_empty_and_every_result_they_name_is_there():
    tables, named = {}, []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        tables |= dict(re.findall(r"<!-- ([\w-]+) -->\n(.*?)<!-- /\1 -->", text, re.DOTALL))
        named += re.findall(r"benchmarks/results/\w+\.json", text)
    assert {"results", "grpo_step", "logprob", "cycle", "scorers", "kills"} <= set(tables)
    # "Not run: ", then the command, where nobody has run the script yet.
    assert all("|" in table or table.startswith("Not run: `") for table in tables.values())
    assert named and all((ROOT / name).is_file() for name in named)


def test_tests_that_share_a_fixture_share_a_process(request):
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("not run by tests/run.sh, or by one process")
    assert request.node.nodeid.endswith("@test_structure.py")


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_functions_are_short_and_nothing_is_forbidden(file):
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= (100 if node.name == "main" else 60), node.name
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), "bare except"
        assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("eval", "exec")), "eval"
        if isinstance(node, ast.keyword):
            assert node.arg != "trust_remote_code" or getattr(node.value, "value", True) is False
            assert node.arg != "type" or getattr(node.value, "id", "") != "bool", "type=bool"


def run_flags(module):
    """The command line that starts a stage or a tool."""
    return [f"{module}.py"] if module in STAGES else ["-m", module]


@pytest.mark.parametrize("module", STAGES + TOOLS)
def test_help_answers_without_torch(module):
    run = f"runpy.run_path('{module}.py'" if module in STAGES else f"runpy.run_module('{module}'"
    code = (
        f"import sys, runpy\nsys.argv = ['x', '--help']\ntry: {run}, run_name='__main__')\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert not {'torch', 'transformers', 'PIL'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage:"), done.stderr


def test_modules_can_be_imported_and_do_nothing(tmp_path):
    # In one process: torch is imported once.
    modules = ", ".join(STAGES + TOOLS)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['x', '--nonsense']; import {modules}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "" and not os.listdir(tmp_path), done.stderr


@pytest.mark.parametrize("module", STAGES + TOOLS)
def test_every_flag_has_its_help(module):
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    calls = [
        n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == "add_argument"
    ]
    assert calls and all(any(k.arg == "help" for k in call.keywords) for call in calls)


# A command line with all that each module requires, so that the mistaken flag is what it complains of.
COMMANDS = {
    "generate": "--images i --model m --out x",
    "reward": "train --model m --data d --out x",
    "sft": "--model m --data d --out x",
    "grpo": "--model m --reward r --data d --out x",
    "eval": "--model m --data d --out x",
    "medgr2.records": "split f --out x",
    "medgr2.leakage": "--train a --test b --out x",
    "analysis.compare": "a b --out x",
    "analysis.transfer": "a b --out x",
    "analysis.efficiency": "a b --out x",
    "analysis.reliability": "a --out x",
    "analysis.summarize": "a=b --fields c",
    "analysis.provenance": "verify r",
    "analysis.report": "--run r --out x",
    "analysis.walkthrough": "--run r --out x",
}


@pytest.mark.parametrize("module", STAGES + TOOLS)
def test_a_mistaken_or_abbreviated_flag_is_one_line_and_status_2(module):
    for wrong in ("--no-such-flag", "--imag"):
        flags = [*run_flags(module), *COMMANDS[module].split(), wrong, "1"]
        done = subprocess.run([sys.executable, *flags], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert f"{module.split('.')[-1]}.py" in done.stderr and wrong in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        "grpo.py --model m --reward r --data d --out o --group 1",
        "grpo.py --model m --reward r --data d --out o --micro-batch 0",
        "grpo.py --model m --reward r --data d --out o --lr nan",
        "grpo.py --model m --reward r --data d --out o --epsilon 1.5",
        "sft.py --model m --data d --out o --batch 0",
        "sft.py --model m --data d --out o --save-every 0",
        "sft.py --model m --data d --out o --clip inf",
        "reward.py score --model m --data d --out o --keep 50",
        "reward.py score --model m --data d --out o --top-k 0",
        "reward.py train --model m --data d --out o --holdout -0.2",
        "eval.py --model m --data d --out o --batch 0",
        "generate.py --images i --model m --out o --per-image two",
    ],
)
def test_a_number_that_makes_no_sense_is_one_line_that_names_its_flag(command):
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert (
        done.returncode == 2 and len(done.stderr.splitlines()) == 1 and command.split()[-2] in done.stderr
    ), done.stderr
