"""The pictures are what their script draws, and the numbers in them those of the models."""

from __future__ import annotations

import runpy
import xml.etree.ElementTree as ElementTree

from tests.docs.blocks import REPOSITORY

FOLDER = REPOSITORY / "docs" / "pictures"


def test_pictures_are_current() -> None:
    pictures = runpy.run_path(str(FOLDER / "draw.py"), run_name="draw")["pictures"]()
    page = (REPOSITORY / "docs" / "concepts.md").read_text(encoding="utf-8")
    for name, picture in pictures.items():
        drawn = (FOLDER / name).read_text(encoding="utf-8")
        assert drawn == picture.svg(), f"run: python docs/pictures/draw.py (for {name})"
        ElementTree.fromstring(drawn)
        assert f"(pictures/{name})" in page, "no page shows it"
