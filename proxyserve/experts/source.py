"""Where the weights of an expert come from, as the control plane and the state folder write it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from proxyserve.errors import InvalidRequest

#: A whole Hugging Face folder; a PEFT LoRA adapter; a diff vector (tuned minus untuned); a compressed one.
Format = Literal["folder", "lora", "diff", "compressed"]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True, slots=True)
class LayerScale:
    """LiNeS (arXiv 2410.17146): a diff is multiplied, layer by layer, by factors that go linearly from `first` to
    `last`; what lies outside the layers (embeddings, final norm, head) by `first`."""

    first: float
    last: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.first) and math.isfinite(self.last)):
            raise InvalidRequest("Layer scales must be finite numbers.", param="layers")


@dataclass(frozen=True, slots=True)
class Source:
    """One model's weights: exactly one of

    - `path`: a folder, a file or a hub id, of the given `format` (None: seen from its files). All formats but "folder"
      change a small model that is loaded already and that `of` names (None: the expert's untuned model). `scale`
      multiplies the change, and `layers` as well, layer by layer (not for adapters);
    - `merge`: several sources with weights, all changes of `of`: `of + sum of weight * (source - of)` (task arithmetic;
      with weights that sum to 1 a soup);
    - `of` alone: that loaded model itself.

    Raises InvalidRequest for what cannot be meant, with `param` inside the source.
    """

    path: str | None = None
    format: Format | None = None
    of: str | None = None
    scale: float = 1.0
    layers: LayerScale | None = None
    merge: tuple[tuple[float, Source], ...] = ()

    def __post_init__(self) -> None:
        if (self.path is not None) + bool(self.merge) > 1:
            raise InvalidRequest("A source has a 'path' or a 'merge', not both.", param="merge")
        if self.path is None and not self.merge and self.of is None:
            raise InvalidRequest(
                "A source needs a 'path', a 'merge', or 'of' to name a loaded model.", param="path"
            )
        if self.path is not None and not self.path.strip():
            raise InvalidRequest("The path of a source is empty.", param="path")
        if self.format is not None and self.format not in FORMATS:
            raise InvalidRequest(f"'format' is one of {', '.join(FORMATS)}.", param="format")
        if not math.isfinite(self.scale):
            raise InvalidRequest("'scale' must be a finite number.", param="scale")
        for name, given in (("scale", self.scale != 1.0), ("layers", self.layers is not None)):
            if given and (self.path is None or self.format == "folder"):
                raise InvalidRequest(
                    f"'{name}' is for adapters and diffs, which have something to be scaled.", param=name
                )
        if self.format is not None and self.path is None:
            raise InvalidRequest("'format' is that of a 'path', and there is none.", param="format")
        if self.format == "lora" and self.layers is not None:
            raise InvalidRequest("'layers' is for diffs; adapters have none.", param="layers")
        for weight, source in self.merge:
            if not math.isfinite(weight):
                raise InvalidRequest("The weights of a merge must be finite.", param="merge")
            if source.merge or source.path is None:
                raise InvalidRequest("Each part of a merge has a 'path' of its own.", param="merge")

    def as_json(self) -> dict[str, Any]:
        """What `of_json` reads; defaults are left out."""
        value: dict[str, Any] = {}
        for name in ("path", "format", "of"):
            if getattr(self, name) is not None:
                value[name] = getattr(self, name)
        if self.scale != 1.0:
            value["scale"] = self.scale
        if self.layers is not None:
            value["layers"] = {"first": self.layers.first, "last": self.layers.last}
        if self.merge:
            value["merge"] = [{"weight": weight, **source.as_json()} for weight, source in self.merge]
        return value

    @classmethod
    def of_json(cls, value: str | Mapping[str, Any]) -> Source:
        """From a string (a path or hub id) or an object. Its types must be right already."""
        if isinstance(value, str):
            return cls(path=value)
        layers = value.get("layers")
        return cls(
            path=value.get("path"),
            format=value.get("format"),
            of=value.get("of"),
            scale=float(value.get("scale", 1.0)),
            layers=None if layers is None else LayerScale(float(layers["first"]), float(layers["last"])),
            merge=tuple(
                (
                    float(part["weight"]),
                    cls.of_json({key: part[key] for key in part if key != "weight"}),
                )
                for part in value.get("merge") or ()
            ),
        )


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """What `PUT /admin/v1/experts/{name}` asks for. `untuned` None: the model that the tuned one changes, or none if
    that is a folder. `protected`: only administrators may weigh against the expert. `trusted`: its files may lie
    anywhere, since the command line named them. `origins` has, for each model that an `of` names, the folder that it
    was read from: should it be gone when the expert is loaded again, it is read from there. No request can say either.
    """

    tuned: Source
    untuned: Source | None = None
    protected: bool = False
    trusted: bool = False
    origins: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {"tuned": self.tuned.as_json()}
        if self.untuned is not None:
            value["untuned"] = self.untuned.as_json()
        for name in ("protected", "trusted"):
            if getattr(self, name):
                value[name] = True
        if self.origins:
            value["origins"] = dict(self.origins)
        return value

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> ExpertSpec:
        untuned = value.get("untuned")
        return cls(
            Source.of_json(value["tuned"]),
            None if untuned is None else Source.of_json(untuned),
            bool(value.get("protected", False)),
            bool(value.get("trusted", False)),
            dict(value.get("origins") or {}),
        )
