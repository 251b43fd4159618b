"""Sources and specs of every form that the control plane takes."""

from __future__ import annotations

from hypothesis import strategies as st

from proxyserve.experts.source import ExpertSpec, LayerScale, Source

FINITE = st.floats(allow_nan=False, allow_infinity=False)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
PATHS = NAMES.filter(lambda text: bool(text.strip()))
LAYER_SCALES = st.builds(LayerScale, FINITE, FINITE)

FOLDERS = st.builds(Source, path=PATHS, format=st.sampled_from([None, "folder"]))
ADAPTERS = st.builds(
    Source, path=PATHS, format=st.sampled_from([None, "lora"]), of=st.none() | NAMES, scale=FINITE
)
DIFFS = st.builds(
    Source,
    path=PATHS,
    format=st.sampled_from([None, "diff", "compressed"]),
    of=st.none() | NAMES,
    scale=FINITE,
    layers=st.none() | LAYER_SCALES,
)
WITH_PATH = FOLDERS | ADAPTERS | DIFFS
MERGES = st.builds(
    Source,
    of=st.none() | NAMES,
    merge=st.lists(st.tuples(FINITE, WITH_PATH), min_size=1, max_size=3).map(tuple),
)
SOURCES = WITH_PATH | MERGES | st.builds(Source, of=NAMES)
SPECS = st.builds(ExpertSpec, tuned=SOURCES, untuned=st.none() | SOURCES, protected=st.booleans())
