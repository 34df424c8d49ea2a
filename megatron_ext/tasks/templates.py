r"""How a question is put to a model, and what ends its reply.

`simple` is a bare cue, `complex` a conversation that says where the answer must stand, both of the shape that the paper's runs
used, in wording of our own. `plain` is the form of the demo's worked problems: the question and a line break; `cue` puts one
word before it, and `dialogue` is that of its instructions, a conversation without a preamble: both for models of few positions.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from megatron_ext.config.tasks import TemplateName
from megatron_ext.errors import ConfigError

QUESTION = "{question}"


@dataclass(frozen=True)
class Template:
    """A prompt with a hole for the question; a reply ends before the first of `stop_strings`, which is not kept."""

    name: TemplateName
    text: str
    stop_strings: tuple[str, ...]

    @property
    def version(self) -> str:
        """Twelve hex digits that change with the text or the stop strings; recorded with every score."""
        return hashlib.sha256(json.dumps([self.text, self.stop_strings]).encode()).hexdigest()[:12]

    def prompt(self, question: str) -> str:
        """The prompt for a question; braces in the question are left alone."""
        before, after = self.text.split(QUESTION)
        return before + question.strip() + after


PLAIN = Template("plain", "{question}\n", ())
CUE = Template("cue", "Question: {question}\n", ("Question:",))
DIALOGUE = Template("dialogue", "User: {question} Put the answer in \\boxed{}.\nAssistant:", ("User:", "Assistant:"))
SIMPLE = Template("simple", "Question:\n{question}\nAnswer:\nLet us work through this one step at a time.\n", ("Question:", "Answer:"))
COMPLEX = Template(
    "complex",
    "This is a conversation of a User with an Assistant. The User puts a question, and the Assistant solves it. "
    "The Assistant first reasons about the problem in its own mind, and then tells the User the answer.\n"
    "User: The final answer must be written within \\boxed{}; it is read from that box by a program, and nothing else counts.\n"
    "{question}\nAssistant:",
    ("User:", "Assistant:"),
)
TEMPLATES = {template.name: template for template in (PLAIN, CUE, DIALOGUE, SIMPLE, COMPLEX)}


def template(name: str) -> Template:
    """The template of a name; `ConfigError` where there is none."""
    for known, found in TEMPLATES.items():
        if known == name:
            return found
    raise ConfigError(f"no prompt template is named '{name}'; there are {', '.join(TEMPLATES)}")
