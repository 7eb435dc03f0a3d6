"""`fusion-adapters exec`: programs that import peft themselves know the method, and are otherwise left as they are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import attached, disturb, tiny
from transformers import AutoModelForTokenClassification

import fusion_adapters
from fusion_adapters.cli import main
from fusion_adapters.runs.launching import STARTUP, environment

ROOT = str(Path(fusion_adapters.__file__).parents[1])


def execute(*command, before=(), **options):
    """Runs a command below `fusion-adapters exec`, with folders on PYTHONPATH."""
    own = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, before), ROOT])}
    start = [sys.executable, "-m", "fusion_adapters.cli", "exec", *map(str, command)]
    return subprocess.run(start, capture_output=True, text=True, check=False, env=own, **options)


def test_a_program_and_the_pythons_that_it_starts_know_the_method(tmp_path):
    tiny("bert").save_pretrained(tmp_path / "base")
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "base", num_labels=5)
    model = disturb(attached(model=model))
    model.save_pretrained(tmp_path / "adapter")
    batch = torch.tensor([[1, 2, 3]])
    (tmp_path / "inner.py").write_text(
        "import sys, torch\nfrom transformers import AutoModelForTokenClassification\n"  # which looks for peft
        "from peft import AutoPeftModelForTokenClassification as Auto\n"
        "model = Auto.from_pretrained(sys.argv[1], num_labels=5).eval()\n"
        "torch.save(model(torch.tensor([[1, 2, 3]])).logits.detach(), sys.argv[2])\n"
    )
    (tmp_path / "outer.py").write_text(
        "import subprocess, sys\nsys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))\n"
    )
    arguments = [tmp_path / "inner.py", tmp_path / "adapter", tmp_path / "answer.pt"]
    done = execute("--", sys.executable, tmp_path / "outer.py", *arguments)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "answer.pt"), model.eval()(batch).logits)


def test_arguments_input_and_exit_code_are_the_program_s():
    code = "import sys; print(sys.argv[1:], sys.stdin.read()); sys.exit(7)"
    for dashes in (["--"], []):
        done = execute(*dashes, "python", "-c", code, "--json", "-x", "--", "--help", input="text")
        assert done.returncode == 7 and done.stdout == "['--json', '-x', '--', '--help'] text\n"


def test_a_start_loads_little_and_a_sitecustomize_that_was_there_still_runs(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.mine = __file__\n")
    code = (
        "import sys; print(sys.mine); print('fusion_adapters' in sys.modules, {'torch', 'peft', 'importlib.metadata'} & set(sys.modules));"
        "print(sys.modules['sitecustomize'].__file__)"
    )
    done = execute("--", sys.executable, "-c", code, before=[tmp_path])
    own = str(tmp_path / "sitecustomize.py")
    assert done.stdout.splitlines() == [own, "True set()", own] and not done.stderr


def test_a_python_with_peft_and_without_this_package_is_told(tmp_path):
    (tmp_path / "peft.py").write_text("")
    (tmp_path / "fusion_adapters.py").write_text("raise ImportError('not here')\n")
    own = {**os.environ, "PYTHONPATH": os.pathsep.join([str(STARTUP), str(tmp_path)])}
    done = subprocess.run([sys.executable, "-c", "print(1)"], capture_output=True, text=True, check=False, env=own)
    assert done.stdout == "1\n" and "has peft, and not the package fusion-adapters (not here)" in done.stderr


def test_a_program_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["exec", "--", "no-such-program.py"])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and "no program 'no-such-program.py'" in told and "python no-such-program.py" in told


def test_the_environment_keeps_what_was_there():
    changed = environment({"PYTHONPATH": f"one{os.pathsep}{STARTUP}", "PATH": "two", "X": "3"})
    assert changed["PYTHONPATH"].split(os.pathsep) == [str(STARTUP), "one"] and changed["X"] == "3"
    assert changed["PATH"].split(os.pathsep) == [str(Path(sys.executable).parent), "two"]
    assert environment({})["PYTHONPATH"] == str(STARTUP) and environment(changed) == changed
