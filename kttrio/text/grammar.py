"""What an answer must look like: a form that a request asks for.

Not here: where the answer begins (reasoning.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FormKind = Literal["json_object", "json_schema", "regex", "ebnf", "lark", "choice"]


@dataclass(frozen=True, slots=True)
class Form:
    """What a whole answer must be."""

    kind: FormKind
    source: str
    """The schema as JSON text, the pattern, the grammar, or the choices as a JSON array; empty for
    `json_object`."""
    field: str
    """Where it stands in the request's body, for complaints."""
