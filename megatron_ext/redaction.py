"""Secrets out of texts that are written down: a traceback, or what a library says, may quote one.

Standard library alone (Python 3.9), as all that a job's supervisor imports.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

SECRETS = "MEGATRON_EXT_SECRETS"  # a variable of a rank: the names of those that hold its secrets, with commas between


def own_secrets(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The secrets that a job gave to this process, by name."""
    names = environment.get(SECRETS, "").split(",")
    return {name: environment[name] for name in names if environment.get(name)}


def without_secrets(text: str, secrets: Mapping[str, str]) -> str:
    """A text with the name of a secret wherever its value stood."""
    for name, value in secrets.items():
        if value:
            text = text.replace(value, f"<{name}>")
    return text
