"""Hypothesis strategies for mangled input, and the check of what its reader says."""

import copy
import json
import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from sae_core.utils.errors import SAEError

fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", 80)),
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


NASTY = ["", "..", "../up", "/etc", "a\nb", "a\0b", "-rf", "a b", "$(id)", "`id`", "a;b", "\ud800",
         "x" * 300, "~", ".", "con\x1b[2J", "a/../../b", "middle\n", "NaN"]  # fmt: skip

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**30, -(10**30), 2**63, 1e308, float("nan"), float("inf"), 0.5, 8.0]),
    st.text(max_size=8),
    st.sampled_from(NASTY),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, inner in items:
        found.append((*path, key))
        if isinstance(inner, (dict, list)):
            found += places(inner, (*path, key))
    return found


@st.composite
def mangled(draw: Callable, original: Any) -> Any:
    """A JSON value with one to three places changed, removed or added."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        if not isinstance(value, (dict, list)) or not value:
            return draw(values)
        *path, last = draw(st.sampled_from(places(value)))
        inner = value
        for key in path:
            inner = inner[key]
        action = draw(st.sampled_from(["change", "change", "remove", "add"]))
        if action == "remove":
            del inner[last]
        elif action == "add" and isinstance(inner, dict):
            inner[draw(st.sampled_from([*NASTY, 3, True]))] = draw(values)
        else:
            inner[last] = draw(values)
    return value


def said(read: Callable[[], Any], *names: object) -> Any:
    """What `read` gives, or None if it says in one line what is wrong, which begins with a name."""
    try:
        return read()
    except SAEError as error:
        message = str(error)
        assert message.startswith(tuple(map(str, names))), message
        assert len(message) < 3000
        return None


json_bytes = st.one_of(
    st.binary(max_size=60),
    values.map(lambda value: json.dumps(value).encode()),
    mangled(["a text", "another"]).map(lambda value: json.dumps(value).encode()),
    st.sampled_from([b"[1" + b"0" * 5000 + b"]", b'["\\ud800"]', b"[" * 10**5, b"\xff\xfe[]"]),
)
