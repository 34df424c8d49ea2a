"""The benchmarks and tokenizers that `fetch_assets` knows: where each lies, at which commit, under which licence, in which form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from huggingface_hub import constants

from megatron_ext.config.tasks import FormName

Row = dict[str, Any]


@dataclass(frozen=True)
class Asset:
    """A file of problems, or a tokenizer (no `form`), in a repository of the hub.

    `revision`: a commit, or `main`, which is resolved when it is fetched. `sha256`: of the repository's file, and `rows` its number
    of problems; None where they are not known, and then recorded at the first fetch alone. `convert` makes a row of ours of one
    of theirs and its number, None where it holds no answer; without it the file is taken as it is.
    """

    name: str
    target: str
    repository: str
    revision: str
    licence: str
    file: str = ""
    form: FormName | None = None
    convert: Callable[[Row, int], Row | None] | None = None
    sha256: str | None = None
    rows: int | None = None
    note: str = ""

    @property
    def kind(self) -> str:
        """The hub's word for such a repository."""
        return "dataset" if self.form else "model"

    @property
    def page(self) -> str:
        """Where a person can read about it."""
        return f"{constants.ENDPOINT}/{'datasets/' if self.form else ''}{self.repository}"

    @property
    def record(self) -> str:
        """The name of the file that says where it is from."""
        return f"{self.target.removesuffix('.jsonl')}.source.json" if self.form else f"{self.target}/source.json"


def _gsm8k(row: Row, number: int) -> Row:
    return {"id": f"gsm8k-test-{number}", "question": row["question"], "answer": row["answer"]}


OLYMPIAD_KEYS = ("id", "subfield", "context", "question", "solution", "final_answer", "is_multiple_answer", "unit", "answer_type", "error")


def _olympiad_bench(row: Row, number: int) -> Row:  # noqa: ARG001 - all conversions have one form
    return {key: row[key] for key in OLYMPIAD_KEYS}


def _amc23(row: Row, number: int) -> Row:  # noqa: ARG001
    return {key: row[key] for key in ("id", "question", "answer", "url")}


def _math8k(row: Row, number: int) -> Row | None:
    """Its prompts are in a template of their own; the bare question stands beside them."""
    if not row["gt_answer"]:
        return None
    return {
        "id": f"math8k-{number}",
        "problem": row["question"],
        "answer": row["gt_answer"],
        "level": row["level"],
        "subject": row["subject"],
    }


# Commits and digests are those that several published studies pin. A branch may move, a commit does not.
ASSETS = {
    asset.name: asset
    for asset in (
        Asset(
            "math500", "math500.jsonl", "HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", "MIT", "test.jsonl",
            "math", None, "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132", 500,
        ),
        Asset(
            "gsm8k", "gsm8k_test.jsonl", "openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866", "MIT",
            "main/test-00000-of-00001.parquet", "gsm8k", _gsm8k,
            "ee7b8da9e381df27b9e3f7758a159ab2bdaa4dbaa910546cbbc47e0cb44e4f59", 1319,
        ),
        Asset(
            "olympiad_bench", "olympiad_bench.jsonl", "Hothan/OlympiadBench", "91184b52131e7fc9455fef848035173aea8cc01a", "Apache-2.0",
            "OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet", "olympiad_bench", _olympiad_bench, rows=674,
            note="the paper's harness counts 675; the hub's file has 674",
        ),
        Asset(
            "amc23", "amc23.jsonl", "math-ai/amc23", "80815d37005feb82cd7f8fbc6901d5d3eff43057",
            "none declared (contest problems of the Mathematical Association of America)", "test-00000-of-00001.parquet", "amc23", _amc23,
            rows=40, note="do not pass it on: its owner has not said that one may",
        ),
        Asset(
            "math8k", "math8k.jsonl", "hkust-nlp/SimpleRL-Zoo-Data", "main", "not known here: read its page (the problems are MATH's, MIT)",
            "simplelr_qwen_level3to5/train.parquet", "math", _math8k,
            note="8,523 problems by its authors' count, more than MATH's training half has at these levels: it very likely holds problems "
            "of the MATH test set. Do not evaluate on that set after training on this one; MATH500 is held out",
        ),
        Asset(
            "llama_3_2_tokenizer", "Llama-3.2-3B", "meta-llama/Llama-3.2-3B", "13afe5124825b4f3751f836b40dafda64c1ed062",
            "Llama 3.2 Community License", note="gated: accept the licence on its page, and set HF_TOKEN",
        ),
        Asset(
            "qwen2_5_tokenizer", "Qwen2.5-3B", "Qwen/Qwen2.5-3B", "3aab1f1954e9cc14eb9509a215f9e5ca08227a9b",
            "Qwen Research License (no commercial use)",
        ),
    )
}  # fmt: skip
