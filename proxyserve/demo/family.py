"""Where the models of a family lie: the shipped one, or one that was trained again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from proxyserve.demo.skills import SKILLS

BASE, SMALL = "atlas", "small"
_SHIPPED = Path(__file__).parent / "family"


@dataclass(frozen=True, slots=True)
class FamilyPaths:
    """Folders of a family: a large base, a small untuned model, a small tuned model per skill, and (for evaluation
    only) the base tuned directly on each skill."""

    base: Path
    untuned: Path
    experts: Mapping[str, Path]
    oracles: Mapping[str, Path]

    def as_json(self) -> str:
        def named(folders: Mapping[str, Path]) -> dict[str, str]:
            return {name: str(folder) for name, folder in folders.items()}

        return json.dumps(
            {
                "base": str(self.base),
                "untuned": str(self.untuned),
                "experts": named(self.experts),
                "oracles": named(self.oracles),
            },
            indent=2,
        )


def family_paths(root: Path | None = None) -> FamilyPaths:
    """Folders under `root`, or of the family that comes with the package."""
    root = _SHIPPED if root is None else root
    return FamilyPaths(
        base=root / BASE,
        untuned=root / SMALL,
        experts={name: root / "experts" / name for name in SKILLS},
        oracles={name: root / "oracles" / name for name in SKILLS},
    )
