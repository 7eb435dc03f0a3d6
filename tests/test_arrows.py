"""The rooms of the package and the arrows between them: who may import whom, no circle, light imports, short files."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fusion_adapters

PACKAGE = Path(fusion_adapters.__file__).parent
NAME = PACKAGE.name
BELOW = {  # room: the rooms that it may import
    "fusions": [],
    "tasks": [],
    "backbone": ["fusions"],
    "tuner": ["backbone", "fusions"],
    "states": ["tuner", "backbone", "fusions"],
    "shortcuts": ["states", "backbone", "fusions"],
    "runs": ["shortcuts", "states", "tasks", "tuner", "backbone", "fusions"],
}
BELOW["study"] = BELOW["bench"] = ["runs", *BELOW["runs"]]
BELOW["cli"] = ["study", "bench", *BELOW["study"]]


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module):
    return module.split(".")[1] if "." in module else ""


def imports_of(module):
    """What a module imports of the package, wherever in the file and whatever for: modules, else what holds the name."""
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == NAME)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            if source.split(".")[0] == NAME:
                names = [f"{source}.{alias.name}" for alias in node.names]
                yield from (name if name in FILES else source for name in names)


GRAPH = {module: set(imports_of(module)) for module in FILES}


@pytest.mark.parametrize("room", sorted({room_of(module) for module in FILES} - {""}))
def test_a_room_imports_the_rooms_below_it_alone(room):
    assert room in BELOW, "a new room: give it its arrows here and in CONTRIBUTING.md"
    found = {(m, target) for m, targets in GRAPH.items() if room_of(m) == room for target in targets}
    wrong = sorted(f"{m} imports {target}" for m, target in found if room_of(target) not in (room, *BELOW[room]))
    assert not wrong  # the names at the top, which the package offers to users, are among the wrong ones


def test_no_circle_among_modules():
    graph = {}
    for module, targets in GRAPH.items():
        rooms = {f"{NAME}.{room_of(t)}" for t in targets if room_of(t) != room_of(module)}  # their __init__ runs too
        graph[module] = (targets | rooms) - {NAME}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_at_most_twelve_entries_at_the_top():
    entries = sorted(path.name for path in PACKAGE.iterdir() if path.name != "__pycache__")
    assert len(entries) <= 12, entries


def test_no_file_is_long():
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in FILES.items()}
    assert not {module: length for module, length in lengths.items() if length > 350}


def modules_after(code):
    """The top-level modules that a fresh process holds after it ran the code."""
    told = "\nimport sys; print('\\n' + ' '.join({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code + told], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_method_is_light():
    code = "import fusion_adapters, fusion_adapters.fusions\nfrom fusion_adapters import FusionConfig"
    assert not modules_after(code) & {"datasets", "pandas", "matplotlib"}
