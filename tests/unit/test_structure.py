"""The rules of the tree: which way imports flow, what stays free of torch, how large a file may be.

Each rule is a function of sources that returns its violations, so that a deliberate one is shown to be caught.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = (
    ("errors", "interruption", "json_lines", "redaction"), ("config",),
    ("runs", "snapshot", "attempts", "provenance", "tracker", "metrics", "progress", "estimators", "run_times", "goodput"),
    ("tokenizer", "device", "cpu_megatron", "distributed", "node_check"), ("tasks",),
    ("data",), ("model",), ("checkpoint",), ("conversion",), ("training",), ("generation",), ("evaluation",), ("rl",),
)  # fmt: skip
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}
LOOKING = {"reports", "launch"}  # read run folders, never objects
TORCH_FREE = {
    "errors", "config", "runs", "snapshot", "attempts", "provenance", "tracker", "metrics", "progress", "estimators", "run_times",
    "goodput", "launch", "reports", "interruption", "json_lines", "redaction", "__main__",
}  # fmt: skip
HEAVY = {"torch", "megatron", "transformer_engine", "transformers", "datatrove"}
MAY_NAME_CUDA = {"megatron_ext/device.py", "megatron_ext/cpu_megatron.py", "megatron_ext/generation/vllm_engine.py"}
FORBIDDEN_NAMES = {"utils", "helpers", "common", "misc"}
FILE_LINES, FUNCTION_LINES, MAIN_LINES = 400, 80, 120
UNFINISHED = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error")) + r")\b")
SUFFIX = re.compile(r"^[a-z][a-z0-9]*(?:_[a-z0-9]+)*((?:_[A-Z]+)+)$")  # logprobs_BS, tokens_P_G_T
LEGEND = re.compile(r"^[#\s]*Shapes: (.*?)(?:\.\s|\.$|\n\s*\n|\"\"\")", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Source:
    """One Python file, its path from the root of the tree."""

    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def unit(self) -> str:
        """The file or folder of megatron_ext that it belongs to; '' for others and for megatron_ext/__init__.py."""
        parts = self.module.split(".")
        return parts[1] if parts[0] == "megatron_ext" and len(parts) > 1 else ""


def sources(root: Path, *folders: str) -> list[Source]:
    found = [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]
    return [Source(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")) for path in found]


def imports(source: Source, modules: set[str]) -> set[str]:
    """Dotted names that a file imports, anywhere in it; `from a import b` counts as a.b where that is a module."""
    names: set[str] = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = source.module.split(".")
                package = parts if source.path.endswith("__init__.py") else parts[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            names |= {full if (full := f"{base}.{alias.name}") in modules else base for alias in node.names}
    return names


def import_graph(files: list[Source]) -> dict[str, set[str]]:
    modules = {file.module for file in files}
    return {file.module: imports(file, modules) for file in files}


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for name in graph.get(waiting.pop(), set()) - seen:
            seen.add(name)
            waiting.append(name)
    return seen


def unit_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "megatron_ext" and len(parts) > 1 else ""


def upward_imports(files: list[Source]) -> list[str]:
    found = []
    graph = import_graph(files)
    for file in files:
        if file.unit in ("", "__main__"):
            continue
        if file.unit not in LEVEL and file.unit not in LOOKING:
            found.append(f"{file.path}: '{file.unit}' stands in no layer")
            continue
        level = LEVEL["metrics"] if file.unit in LOOKING else LEVEL[file.unit]
        for name in sorted(graph[file.module]):
            unit = unit_of(name)
            if unit and unit != file.unit and LEVEL.get(unit, len(LAYERS)) > level:
                found.append(f"{file.path}: imports {name}, which stands below it")
    return found


def circles(files: list[Source]) -> list[str]:
    graph = import_graph(files)
    return [f"{name}: imports itself through {others & set(graph)}" for name in graph if name in (others := reachable(graph, name))]


def training_in_generation(files: list[Source]) -> list[str]:
    graph = import_graph(files)
    return [
        f"{file.path}: reaches {name}"
        for file in files
        if file.unit in ("generation", "evaluation")
        for name in reachable(graph, file.module)
        if unit_of(name) == "training"
    ]


def recipe_imports(files: list[Source]) -> list[str]:
    """Recipes import values only; the package never imports recipes (it loads them by name)."""
    found = []
    graph = import_graph(files)
    for file in files:
        is_recipe = file.path.startswith("recipes/")
        for name in sorted(graph[file.module]):
            top = name.split(".")[0]
            allowed = name.startswith("megatron_ext.config") or name == "megatron_ext.launch.graph" or top == "recipes"
            if is_recipe and not allowed and top not in sys.stdlib_module_names:
                found.append(f"{file.path}: a recipe imports {name}")
            if file.path.startswith("megatron_ext/") and top == "recipes":
                found.append(f"{file.path}: imports {name}")
    return found


def dynamic_imports(files: list[Source]) -> list[str]:
    """Imports by a string would hide from the other rules: only `__main__` turns verbs into functions."""
    hiding = {"import_module", "__import__"}
    return [
        f"{file.path}:{node.lineno}: imports by name"
        for file in files
        if file.unit != "__main__"
        for node in ast.walk(file.tree)
        if (isinstance(node, ast.Attribute) and node.attr in hiding) or (isinstance(node, ast.Name) and node.id in hiding)
    ]


def torch_in_looking(files: list[Source]) -> list[str]:
    graph = import_graph(files)
    return [
        f"{file.path}: reaches {name}"
        for file in files
        if file.unit in TORCH_FREE or file.path.startswith("recipes/")
        for name in sorted(reachable(graph, file.module))
        if name.split(".")[0] in HEAVY
    ]


def named(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every name, attribute chain and import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def cuda_names(files: list[Source]) -> list[str]:
    return [
        f"{file.path}:{line}: names torch.cuda"
        for file in files
        if file.path not in MAY_NAME_CUDA
        for line, name in named(file.tree)
        if name == "torch.cuda" or name.startswith("torch.cuda.")
    ]


def parallel_state_names(files: list[Source]) -> list[str]:
    return [
        f"{file.path}:{line}: names parallel_state"
        for file in files
        if file.path != "megatron_ext/distributed.py"
        for line, name in named(file.tree)
        if "parallel_state" in name.split(".") or name == "megatron.core.mpu"
    ]


def sizes(files: list[Source]) -> list[str]:
    found = []
    for file in files:
        most = MAIN_LINES if file.path == "megatron_ext/__main__.py" else FILE_LINES
        if (lines := len(file.text.splitlines())) > most:
            found.append(f"{file.path}: {lines} lines, more than {most}")
        for node in ast.walk(file.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES:
                found.append(f"{file.path}:{node.lineno}: {node.name}() is longer than {FUNCTION_LINES} lines")
    return found


def docstrings(files: list[Source]) -> list[str]:
    return [f"{file.path}: no docstring" for file in files if file.text.strip() and not ast.get_docstring(file.tree)]


def annotations(files: list[Source]) -> list[str]:
    found = []
    for file in files:
        for node in ast.walk(file.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                a = node.args
                every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *(x for x in (a.vararg, a.kwarg) if x)]
                bare = [x.arg for x in every if x.annotation is None and x.arg not in ("self", "cls")]
                found += [f"{file.path}:{node.lineno}: argument {name} of {node.name}() has no annotation" for name in bare]
    return found


def vague_names(files: list[Source]) -> list[str]:
    return [f"{file.path}: a vague name" for file in files if FORBIDDEN_NAMES & set(file.path.removesuffix(".py").split("/"))]


def unfinished(files: list[Source]) -> list[str]:
    return [
        f"{file.path}:{number}: {found.group()}"
        for file in files
        for number, line in enumerate(file.text.splitlines(), start=1)
        if (found := UNFINISHED.search(line))
    ]


def shape_suffixes(files: list[Source]) -> list[str]:
    """Every letter of a shape suffix stands in the file's `Shapes: B batch, S sequence, ...` line."""
    found = []
    for file in files:
        legend = LEGEND.search(file.text)
        known = {item.split()[0] for item in legend.group(1).split(",") if item.split()} if legend else set()
        used = {name.id if isinstance(name, ast.Name) else name.arg for name in ast.walk(file.tree) if isinstance(name, ast.Name | ast.arg)}
        for name in sorted(used):
            letters = set(match.group(1).replace("_", "")) if (match := SUFFIX.match(name)) else set()
            if letters - known:
                found.append(f"{file.path}: {name} uses {sorted(letters - known)}, not in the file's legend of shapes {sorted(known)}")
    return found


PRODUCT, ALL = ("megatron_ext", "recipes", "tools"), ("megatron_ext", "recipes", "tools", "tests")
Rule = Callable[[list[Source]], list[str]]
RULES: dict[Rule, tuple[str, ...]] = {
    upward_imports: PRODUCT, circles: PRODUCT, training_in_generation: PRODUCT, recipe_imports: PRODUCT, dynamic_imports: PRODUCT,
    torch_in_looking: PRODUCT, cuda_names: PRODUCT, parallel_state_names: PRODUCT, sizes: ALL, docstrings: ALL, annotations: PRODUCT,
    vague_names: ALL, unfinished: ALL, shape_suffixes: PRODUCT,
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree_keeps_the_rule(rule: Rule) -> None:
    files = sources(ROOT, *RULES[rule])
    assert len(files) > 20
    assert rule(files) == []


FAULTS: list[tuple[Rule, dict[str, str], str]] = [
    (upward_imports, {"megatron_ext/config/a.py": "from megatron_ext.runs import x"}, "imports megatron_ext.runs"),
    (upward_imports, {"megatron_ext/data/a.py": "def f():\n    import megatron_ext.training.step"}, "imports megatron_ext.training.step"),
    (upward_imports, {"megatron_ext/launch/a.py": "from megatron_ext import device", "megatron_ext/device.py": ""}, "megatron_ext.device"),
    (upward_imports, {"megatron_ext/reports/a.py": "from ..data import shards"}, "imports megatron_ext.data"),
    (upward_imports, {"megatron_ext/reports/a.py": "from megatron_ext.launch.tree import x"}, "imports megatron_ext.launch.tree"),
    (upward_imports, {"megatron_ext/elsewhere.py": ""}, "stands in no layer"),
    (
        circles,
        {"megatron_ext/runs.py": "import megatron_ext.metrics", "megatron_ext/metrics.py": "def f():\n    from megatron_ext import runs"},
        "megatron_ext.runs: imports itself",
    ),
    (
        training_in_generation,
        {"megatron_ext/evaluation/a.py": "import megatron_ext.model.b", "megatron_ext/model/b.py": "import megatron_ext.training.step"},
        "reaches megatron_ext.training.step",
    ),
    (recipe_imports, {"recipes/a.py": "from megatron_ext.runs import x"}, "a recipe imports megatron_ext.runs"),
    (recipe_imports, {"recipes/a.py": "import numpy"}, "a recipe imports numpy"),
    (recipe_imports, {"megatron_ext/launch/a.py": "from recipes import models"}, "imports recipes"),
    (dynamic_imports, {"megatron_ext/launch/a.py": "import importlib\nimportlib.import_module('x')"}, "imports by name"),
    (torch_in_looking, {"megatron_ext/config/a.py": "def f():\n    import torch.nn"}, "reaches torch.nn"),
    (torch_in_looking, {"megatron_ext/launch/a.py": "import megatron_ext.data", "megatron_ext/data.py": "import torch"}, "reaches torch"),
    (cuda_names, {"megatron_ext/model/a.py": "import torch\nif torch.cuda.is_available(): pass"}, "a.py:2"),
    (cuda_names, {"megatron_ext/model/a.py": "from torch import cuda"}, "a.py:1"),
    (parallel_state_names, {"megatron_ext/model/a.py": "from megatron.core import parallel_state"}, "a.py:1"),
    (sizes, {"megatron_ext/a.py": "x = 1\n" * 401}, "401 lines"),
    (sizes, {"megatron_ext/__main__.py": "x = 1\n" * 121}, "more than 120"),
    (sizes, {"tests/a.py": "def f():\n" + "    x = 1\n" * 80}, "longer than 80"),
    (docstrings, {"megatron_ext/a.py": "x = 1"}, "no docstring"),
    (annotations, {"megatron_ext/a.py": "def f(a: int, *, b): pass"}, "argument b of f()"),
    (vague_names, {"megatron_ext/data/utils.py": ""}, "vague"),
    (vague_names, {"megatron_ext/common/a.py": ""}, "vague"),
    (unfinished, {"megatron_ext/a.py": "def f():\n    raise NotImplemented" + "Error"}, "a.py:2"),
    (unfinished, {"megatron_ext/a.py": "# TO" + "DO: later"}, "a.py:1"),
    (shape_suffixes, {"megatron_ext/a.py": '"""A.\n\nShapes: B batch, S sequence.\n"""\nlogits_BSV = 1'}, "['V']"),
    (shape_suffixes, {"megatron_ext/a.py": '"""No legend."""\ndef f(mask_BS): pass'}, "mask_BS uses"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "files", "part"), FAULTS, ids=[f"{rule.__name__}-{i}" for i, (rule, _, _) in enumerate(FAULTS)])
def test_a_deliberate_violation_is_caught(tmp_path: Path, rule: Rule, files: dict[str, str], part: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = rule(sources(tmp_path, *ALL))
    assert any(part in line for line in found), found


def test_a_legend_that_covers_its_suffixes_is_accepted() -> None:
    text = '"""A.\n\nShapes: B batch, S sequence,\nV vocabulary. More.\n"""\nlogits_BSV = ids_B_S = MAX_TOKENS = 1'
    assert shape_suffixes([Source("megatron_ext/a.py", text)]) == []


def test_what_looks_imports_with_torch_blocked() -> None:
    looking = [
        file.module for file in sources(ROOT, "megatron_ext", "recipes") if file.unit in TORCH_FREE or file.path.startswith("recipes/")
    ]
    assert {"megatron_ext.launch.graph", "megatron_ext.runs", "recipes.demo"} <= set(looking)
    block = "".join(f"sys.modules['{name}'] = None\n" for name in sorted(HEAVY))
    program = f"import sys, importlib\n{block}for name in {looking!r}:\n    importlib.import_module(name)\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
