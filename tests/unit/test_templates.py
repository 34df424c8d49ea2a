"""Prompts: the question stands in them as it is, and a version says when their text changed."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_ext.errors import ConfigError
from megatron_ext.tasks.templates import COMPLEX, PLAIN, SIMPLE, TEMPLATES, template


def test_a_question_with_braces_is_left_alone() -> None:
    question = r"What is $\{x : {question} \boxed{}\}$?"
    for one in TEMPLATES.values():
        assert question in one.prompt(question)
        assert one.prompt(question).count(question) == 1


def test_the_forms() -> None:
    assert PLAIN.prompt("1+1?") == "1+1?\n"
    assert SIMPLE.prompt("1+1?").startswith("Question:\n1+1?\nAnswer:\n")
    assert COMPLEX.prompt("1+1?").endswith("\n1+1?\nAssistant:")
    assert r"\boxed{}" in COMPLEX.text
    assert "\nUser: " in COMPLEX.text
    assert set(SIMPLE.stop_strings) == {"Question:", "Answer:"}
    assert set(COMPLEX.stop_strings) == {"User:", "Assistant:"}


def test_a_version_changes_with_text_and_stop_strings() -> None:
    others = [dataclasses.replace(SIMPLE, text=SIMPLE.text + " "), dataclasses.replace(SIMPLE, stop_strings=("Question:",))]
    assert len({one.version for one in (PLAIN, SIMPLE, COMPLEX, *others)}) == 5


def test_a_template_has_a_name() -> None:
    assert template("complex") is COMPLEX
    with pytest.raises(ConfigError, match="'complx'; there are plain, cue, dialogue, simple, complex"):
        template("complx")
