"""The demo's text: real prose from the docstrings of installed packages, and generated problems.

Offline and deterministic: the same package versions and seed give the same bytes. Sources are
parsed, never imported or run.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import random
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ext.attempts import attempting
from megatron_ext.config.base import Json
from megatron_ext.config.stages import TextStage
from megatron_ext.data import arithmetic
from megatron_ext.data.arithmetic import Problem
from megatron_ext.errors import DataError
from megatron_ext.provenance import environment, file_sha256
from megatron_ext.runs import PROVENANCE, Run, atomic_write, mark_done, write_json

MATH_PACKAGES = ("networkx", "numpy", "scipy", "sympy")
STDLIB_MATH = ("_pydecimal.py", "fractions.py", "numbers.py", "random.py", "statistics.py")
SKIPPED_FOLDERS = {"tests", "test", "site-packages", "dist-packages", "idlelib", "lib2to3"}
DOCUMENT_CHARACTERS = 4000  # docstrings of one module are joined up to this length
LEAST_CHARACTERS = 200  # what is shorter says too little to be a document
DOCTEST = re.compile(r"^[ \t]*>>>.*\n?(?:[ \t]*\S.*\n?)*", re.MULTILINE)  # from >>> to the next blank line
SENTENCEPIECE_SPACE = "\u2581"  # SentencePiece writes a space so; in the text it would come back as one
RL_PROBLEMS, EVALUATION = "rl_problems.jsonl", "evaluation/problems.jsonl"  # trainable and held-out ones
PROBLEM_SHARE = 0.6  # of the exchanges in the instruction source; the rest are small word tasks


@dataclass(frozen=True)
class Document:
    """One line of a source's JSONL."""

    id: str
    text: str


@dataclass
class Prose:
    """Docstrings of many source files as documents; counts what was read and what could not be."""

    files: list[tuple[str, Path]]  # (name such as 'scipy/stats/qmc.py', where it lies)
    read: int = 0
    unreadable: int = 0
    contaminated: int = 0  # docstrings left out because they hold the expression of a held-out problem
    seen: set[bytes] = field(default_factory=set)

    def documents(self) -> Iterator[Document]:
        """All documents, files in the order of their names' hashes: any beginning is a sample of the whole."""
        for name, path in sorted(self.files, key=lambda item: hashlib.sha256(item[0].encode()).digest()):
            try:
                found = docstrings(path.read_bytes())
            except (SyntaxError, ValueError):  # another Python's syntax, or bytes that are no source text
                self.unreadable += 1
                continue
            self.read += 1
            yield from _packed(name, [text for text in map(clean, found) if self._is_new(text) and self._is_fair(text)])

    def _is_fair(self, text: str) -> bool:
        is_fair = not arithmetic.states_held_out(text)
        self.contaminated += not is_fair
        return is_fair

    def _is_new(self, text: str) -> bool:
        digest = hashlib.sha256(text.encode()).digest()
        is_new = bool(text) and digest not in self.seen
        self.seen.add(digest)
        return is_new


def docstrings(source: bytes) -> list[str]:
    """The docstrings of a module, its classes and its functions, in the order of the source."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's remarks on other people's escapes
        tree = ast.parse(source)
    owners = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
    owners.sort(key=lambda node: 0 if isinstance(node, ast.Module) else node.lineno)
    return [text for text in map(ast.get_docstring, owners) if text]


def clean(text: str) -> str:
    """Prose of a docstring: no interpreter sessions, no unprintable characters, at most one blank line in a row."""
    text = DOCTEST.sub("", text).replace(SENTENCEPIECE_SPACE, "")
    text = "".join(c if c == "\n" or c.isprintable() else " " if c.isspace() else "" for c in text)
    lines = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines).strip()


def _packed(name: str, texts: list[str]) -> Iterator[Document]:
    """Join a module's docstrings into documents; the second and later ones have '#2', '#3' behind their name."""
    parts: list[str] = []
    for text in texts:
        if parts and len(parts[-1]) + len(text) <= DOCUMENT_CHARACTERS:
            parts[-1] += "\n\n" + text
        else:
            parts.append(text)
    useful = [part for part in parts if len(part) >= LEAST_CHARACTERS]
    yield from (Document(name if number == 1 else f"{name}#{number}", part) for number, part in enumerate(useful, start=1))


def package_folder(package: str) -> Path:
    """Where an installed package's source lies, found without importing it; `DataError` where it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"package '{package}' is not installed in this Python, and its docstrings are part of the demo's mathematical prose; "
            f"install {package} (it is one of megatron_ext's dependencies) and run the stage again"
        )
    return Path(spec.submodule_search_locations[0])


def source_files(folder: Path, name: str) -> list[tuple[str, Path]]:
    """Every .py file under a folder but tests and foreign packages, named from `name` on."""
    paths = (path for path in folder.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(folder).parts[:-1]))
    return [(f"{name}/{path.relative_to(folder).as_posix()}", path) for path in paths]


def prose_files() -> tuple[list[tuple[str, Path]], list[tuple[str, Path]]]:
    """The files behind the mathematical and the general prose."""
    folder = Path(sysconfig.get_path("stdlib"))
    library = source_files(folder, "python")
    if not library:
        raise DataError(
            f"{folder}: no .py files of Python's standard library, the demo's general prose; use a Python that has them on disk"
        )
    maths = [item for item in library if item[0].removeprefix("python/") in STDLIB_MATH]
    packages = [item for package in MATH_PACKAGES for item in source_files(package_folder(package), package)]
    return packages + maths, [item for item in library if item not in maths]


def up_to(documents: Iterable[Document], limit_bytes: int, key: str) -> list[Document]:
    """Documents from the first on while their UTF-8 text stays within `limit_bytes`."""
    taken: list[Document] = []
    total = 0
    for document in documents if limit_bytes > 0 else ():
        size = len(document.text.encode())
        if total + size > limit_bytes:
            if not taken:
                raise DataError(f"{key}={limit_bytes:,} does not hold one document; {document.id} alone has {size:,} bytes: raise {key}")
            break
        taken.append(document)
        total += size
    return taken


# --- generated sources --------------------------------------------------------------------------------


def distinct(draw: Callable[[], str], count: int, key: str) -> list[str]:
    """`count` different texts; `DataError` where drawing hardly finds a new one any more."""
    found: dict[str, None] = {}
    tries = 0
    while len(found) < count:
        found[draw()] = None
        tries += 1
        if tries > 50 * count + 1000:
            raise DataError(f"{key}={count:,}: only {len(found):,} different ones were found in {tries:,} draws; lower {key}")
    return list(found)


def worked_problems(name: str, render: Callable[[Problem], str], count: int, seed: int) -> list[Document]:
    """Training problems in one rendering; every source has its own random stream."""
    rng = random.Random(f"{seed}:{name}")
    texts = distinct(lambda: render(arithmetic.training_problem(rng)), count, f"{name} problems")
    return _numbered(name, texts)


def dialogues(count: int, seed: int) -> list[Document]:
    """One or two exchanges each, over problems and small word tasks."""
    rng = random.Random(f"{seed}:instruction")

    def exchange() -> str:
        is_problem = rng.random() < PROBLEM_SHARE
        return arithmetic.instruction(arithmetic.training_problem(rng) if is_problem else arithmetic.text_task(rng))

    texts = distinct(lambda: "\n".join(exchange() for _ in range(rng.randint(1, 2))), count, "instruction_problems")
    return _numbered("instruction", texts)


def _numbered(name: str, texts: list[str]) -> list[Document]:
    return [Document(f"{name}/{number:06d}", text) for number, text in enumerate(texts)]


def problem_lines(name: str, draw: Callable[[random.Random], Problem], count: int, seed: int) -> list[str]:
    """JSONL of different problems, without their working: id, question, answer, kind, operands."""
    rng = random.Random(f"{seed}:{name}")
    problems: dict[str, Problem] = {}

    def question() -> str:
        problem = draw(rng)
        problems.setdefault(problem.question, problem)
        return problem.question

    rows = [problems[text] for text in distinct(question, count, f"{name}_problems")]
    return [
        json.dumps({"id": f"{name}/{i:06d}", "question": p.question, "answer": p.answer, "kind": p.kind, "operands": p.operands})
        for i, p in enumerate(rows)
    ]


# --- the stage ----------------------------------------------------------------------------------------


def run_text(run: Run) -> None:
    """Do the work of a text run: write `text/<source>.jsonl`, the problems of reinforcement learning and of its validation, the mark.

    `DataError` where a package is missing, or a bound is too small or too large.
    """
    stage: TextStage = run.stage
    with attempting(run):
        math_files, general_files = prose_files()
        files = [
            _write_prose(run, "math_web", Prose(math_files), stage.math_prose_bytes, "math_prose_bytes"),
            _write_prose(run, "general_web", Prose(general_files), stage.general_prose_bytes, "general_prose_bytes"),
            _write_source(run, "short_cot", worked_problems("short_cot", arithmetic.short, stage.short_problems, stage.seed)),
            _write_source(run, "long_cot", worked_problems("long_cot", arithmetic.long, stage.long_problems, stage.seed)),
            _write_source(run, "instruction", dialogues(stage.instruction_problems, stage.seed)),
            _write_lines(run, RL_PROBLEMS, problem_lines("rl", arithmetic.training_problem, stage.rl_problems, stage.seed)),
            _write_lines(
                run, EVALUATION, problem_lines("evaluation", arithmetic.evaluation_problem, stage.evaluation_problems, stage.seed)
            ),
        ]
        versions = {package: importlib.metadata.version(package) for package in MATH_PACKAGES}
        read_from = {**versions, "python": platform.python_version()}
        write_json(run.path / PROVENANCE, {**environment(), "seed": stage.seed, "read_from": read_from, "files": dict(files)})
        mark_done(run, {"files": {name: {k: v for k, v in facts.items() if k != "sha256"} for name, facts in files}})


def _write_prose(run: Run, name: str, prose: Prose, limit_bytes: int, key: str) -> tuple[str, Json]:
    path, facts = _write_source(run, name, up_to(prose.documents(), limit_bytes, key))
    if limit_bytes > 0 and prose.read + prose.unreadable == len(prose.files):
        print(f"  this is all there is; {key} asked for {limit_bytes:,}", flush=True)
    print(
        f"  from {prose.read:,} of {len(prose.files):,} source files; {prose.unreadable} files unreadable, "
        f"{prose.contaminated} docstrings left out for holding an evaluation problem",
        flush=True,
    )
    counts = {"files_read": prose.read, "files_unreadable": prose.unreadable, "docstrings_contaminated": prose.contaminated}
    return path, {**facts, **counts}


def _write_source(run: Run, name: str, documents: list[Document]) -> tuple[str, Json]:
    lines = [json.dumps({"id": d.id, "text": d.text}, ensure_ascii=False) for d in documents]
    path, facts = _write_lines(run, f"text/{name}.jsonl", lines)
    return path, {**facts, "text_bytes": sum(len(d.text.encode()) for d in documents)}


def _write_lines(run: Run, name: str, lines: list[str]) -> tuple[str, Json]:
    path = run.path / name
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, "".join(line + "\n" for line in lines))
    print(f"{name}: {len(lines):,} lines, {path.stat().st_size:,} bytes", flush=True)
    return name, {"lines": len(lines), "bytes": path.stat().st_size, "sha256": file_sha256(path)}
