"""What a choice among tools comes to, in any protocol."""

from __future__ import annotations

from typing import Any

import pytest

from kttrio.server.asking.tools import allow, force
from kttrio.server.errors import BadRequestError


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


TOOLS = [tool("f"), tool("g")]


def test_a_forced_call_keeps_all_tools_in_sight() -> None:
    use = force(TOOLS, ("g",), "choice", one_call=True)
    assert (use.tools, use.forced_calls, use.one_call) == (TOOLS, ("g",), True)


@pytest.mark.parametrize(("must_call", "forced"), [(True, ("g",)), (False, ())])
def test_the_model_is_told_of_allowed_tools_alone(must_call: bool, forced: tuple[str, ...]) -> None:
    use = allow(TOOLS, ("g",), "choice", must_call=must_call)
    assert (use.tools, use.forced_calls, use.one_call) == ([tool("g")], forced, False)


def test_names_that_no_tool_has_are_blamed() -> None:
    for choose in (
        lambda names: force(TOOLS, names, "choice"),
        lambda names: allow(TOOLS, names, "choice", must_call=False),
    ):
        with pytest.raises(BadRequestError, match="'h', which is none of the 'tools'") as caught:
            choose(("g", "h"))
        assert caught.value.param == "choice"


def test_none_can_be_forced_where_there_are_none() -> None:
    with pytest.raises(BadRequestError, match="needs 'tools' to choose from"):
        force([], (), "choice")
