"""Sources mean what their JSON says, and what cannot be meant is refused with the field at fault."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyserve.errors import InvalidRequest
from proxyserve.experts.source import ExpertSpec, LayerScale, Source
from tests.experts.strategies import SOURCES, SPECS

FACTORS = st.floats(-1e6, 1e6)
PROPERTY = settings(max_examples=200, deadline=None, derandomize=True)


@PROPERTY
@given(SOURCES)
def test_a_source_comes_back_from_json(source: Source) -> None:
    assert Source.of_json(json.loads(json.dumps(source.as_json()))) == source


@PROPERTY
@given(SPECS)
def test_a_spec_comes_back_from_json(spec: ExpertSpec) -> None:
    assert ExpertSpec.of_json(json.loads(json.dumps(spec.as_json()))) == spec


def test_a_string_is_a_path() -> None:
    assert Source.of_json("/experts/qa") == Source.of_json({"path": "/experts/qa"}) == Source("/experts/qa")


def test_defaults_are_not_written() -> None:
    assert ExpertSpec(Source("/experts/qa")).as_json() == {"tuned": {"path": "/experts/qa"}}
    assert Source(of="small").as_json() == {"of": "small"}


def test_everything_else_is_written() -> None:
    diff = Source("/a.safetensors", "diff", "small", 0.5, LayerScale(0.1, 1.0))
    spec = ExpertSpec(
        Source(of="small", merge=((0.25, diff), (-1.0, Source("/b")))), Source("/c", "folder"), True
    )
    assert spec.as_json() == {
        "tuned": {
            "of": "small",
            "merge": [
                {
                    "weight": 0.25,
                    "path": "/a.safetensors",
                    "format": "diff",
                    "of": "small",
                    "scale": 0.5,
                    "layers": {"first": 0.1, "last": 1.0},
                },
                {"weight": -1.0, "path": "/b"},
            ],
        },
        "untuned": {"path": "/c", "format": "folder"},
        "protected": True,
    }


@pytest.mark.parametrize(
    ("make", "param"),
    [
        (lambda: Source(), "path"),
        (lambda: Source(" \n"), "path"),
        (lambda: Source(""), "path"),
        (lambda: Source("/a", merge=((1.0, Source("/b")),)), "merge"),
        (lambda: Source("/a", "pickle"), "format"),  # type: ignore[arg-type]
        (lambda: Source("/a", scale=math.inf), "scale"),
        (lambda: Source("/a", scale=math.nan), "scale"),
        (lambda: Source("/a", "folder", scale=0.5), "scale"),
        (lambda: Source(of="small", scale=0.5), "scale"),
        (lambda: Source(of="small", layers=LayerScale(0, 1)), "layers"),
        (lambda: Source(of="small", format="lora"), "format"),
        (lambda: Source(merge=((1.0, Source("/b")),), scale=0.5), "scale"),
        (lambda: Source("/a", "lora", layers=LayerScale(0, 1)), "layers"),
        (lambda: Source("/a", "diff", layers=LayerScale(0, math.inf)), "layers"),
        (lambda: Source("/a", "diff", layers=LayerScale(math.nan, 1)), "layers"),
        (lambda: Source(merge=((math.nan, Source("/b")),)), "merge"),
        (lambda: Source(merge=((1.0, Source(of="small")),)), "merge"),
        (lambda: Source(merge=((1.0, Source(merge=((1.0, Source("/b")),))),)), "merge"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_field(make: Callable[[], Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        make()
    assert refused.value.param == param
