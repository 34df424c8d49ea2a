"""Finds the Python function that a command names and calls it: a recipe's graph, a cluster's facts.

octothinker:llama_3b   recipes/octothinker.py, here or in the checkout
./my.py:run            a file anywhere; it may import `recipes` and `megatron_ext.config`
h100                   recipes/clusters.py
./site.py:h100         a file anywhere
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import megatron_ext
from megatron_ext.config.base import nearest
from megatron_ext.config.cluster import Cluster
from megatron_ext.errors import ConfigError
from megatron_ext.launch.graph import Graph, with_overrides

CHECKOUT = Path(megatron_ext.__file__).resolve().parent.parent


class _Wanted(NamedTuple):
    """How one kind of value is spoken of in messages."""

    word: str
    kind: type
    example: str
    file: str  # read where a name has no file of its own


RECIPE = _Wanted("recipe", Graph, "octothinker:llama_3b or ./my.py:run", "")
CLUSTER = _Wanted("cluster", Cluster, "h100 or ./site.py:h100", "clusters")


def load_graph(recipe: str, overrides: list[str], cluster: str | None) -> tuple[Graph, Cluster | None]:
    """What a command's words name: a recipe's graph after its overrides, and a cluster."""
    facts = load_cluster(cluster) if cluster else None
    return with_overrides(load_recipe(recipe), overrides), facts


def load_recipe(name: str) -> Graph:
    """The graph that `FILE:function` returns; `ConfigError` names the nearest file or function."""
    graph: Graph = _load(name, RECIPE)
    return graph


def load_cluster(name: str) -> Cluster:
    """The cluster that a function of `clusters.py`, or `FILE.py:function`, returns."""
    cluster: Cluster = _load(name, CLUSTER)
    return cluster


def _load(name: str, wanted: _Wanted) -> Any:
    alone = (wanted.file, name) if wanted.file and not name.endswith(".py") else (name, "")
    file_name, function_name = name.rsplit(":", 1) if ":" in name else alone
    module = _module(_find(file_name, wanted))
    function = _function(module, function_name, name, wanted)
    value = function()
    if not isinstance(value, wanted.kind):
        raise ConfigError(
            f"{wanted.word} '{name}': {function_name}() of {module.__file__} returns {type(value).__name__}, "
            f"not a {wanted.kind.__name__}; return the {wanted.kind.__name__} itself"
        )
    return value


def _find(name: str, wanted: _Wanted) -> Path:
    if name.endswith(".py"):
        path = Path(name).expanduser().resolve()
        if not path.is_file():
            known = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
            raise ConfigError(f"{wanted.word} '{name}': no file {path}{nearest(path.name, known)}")
        return path
    folders = list(dict.fromkeys([Path.cwd() / "recipes", CHECKOUT / "recipes"]))
    for folder in folders:
        if (folder / f"{name}.py").is_file():
            return folder / f"{name}.py"
    known = [p.stem for folder in folders for p in folder.glob("*.py") if not p.stem.startswith("_")]
    raise ConfigError(
        f"{wanted.word} '{name}': no file {name}.py in {' or '.join(map(str, folders))}; "
        f"write {wanted.example}{nearest(name, list(dict.fromkeys(known)))}"
    )


def _module(path: Path) -> ModuleType:
    """Run the file as a module that can import `recipes` and its own neighbours."""
    in_recipes = path.parent.name == "recipes"
    _span_recipes([path.parent] if in_recipes else [])
    if not in_recipes and str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last: a site.py of theirs must not stand before Python's own
    name = f"recipes.{path.stem}" if in_recipes else f"_recipe_file_{path.stem}"
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__file__ == str(path):
        return loaded
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: an import of itself through a neighbour finds this one
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _span_recipes(first: list[Path]) -> None:
    """Make `recipes` one package over several folders: the named file's, the present folder's, the checkout's."""
    package = sys.modules.setdefault("recipes", ModuleType("recipes"))
    folders = [*first, Path.cwd() / "recipes", CHECKOUT / "recipes"]
    package.__path__ = list(dict.fromkeys(str(folder) for folder in folders if folder.is_dir()))


def _function(module: ModuleType, function_name: str, name: str, wanted: _Wanted) -> Callable[[], Any]:
    choices = ready_functions(module)
    if not function_name:
        raise ConfigError(f"{wanted.word} '{name}': name a function of it, as in {wanted.example}{_listed(choices)}")
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"{wanted.word} '{name}': {module.__file__} has no function '{function_name}'{nearest(function_name, choices)}")
    required = _required_arguments(function)
    if required:
        raise ConfigError(
            f"{wanted.word} '{name}': {function_name}() needs arguments ({', '.join(required)}) and a {wanted.word} takes none; "
            f"give them defaults, or call it from a function of your own{_listed(choices)}"
        )
    found: Callable[[], Any] = function
    return found


def _listed(names: list[str]) -> str:
    return f"; it has: {', '.join(names)}" if names else "; it has none that takes no arguments"


def ready_functions(module: ModuleType) -> list[str]:
    """Public functions of a file that can be called without arguments, in the file's order."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and inspect.isfunction(value) and value.__module__ == module.__name__ and not _required_arguments(value)
    ]


def _required_arguments(function: Callable[..., Any]) -> list[str]:
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in optional]
