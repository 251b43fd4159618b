"""Bodies of the control plane, `/admin/v1`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, WrapValidator
from pydantic_core import CoreSchema, PydanticCustomError

from proxyserve.api.presets import parse_fusion
from proxyserve.api.schemas.base import AtMost, RequestModel, at_least_one
from proxyserve.api.schemas.common import MAX_NAME
from proxyserve.api.schemas.rule_models import AnyFusion
from proxyserve.errors import InvalidRequest
from proxyserve.experts.generation import Phase
from proxyserve.experts.source import ExpertSpec, Format, LayerScale, Source
from proxyserve.experts.status import Change, ExpertStatus, GenerationStatus

#: Longest path or hub id, in characters; what Linux allows.
_MAX_PATH = 4096

#: Most models in one merge.
_MAX_PARTS = 64


class WaitQuery(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    wait: bool = Field(
        False,
        description="Answer only when the change has succeeded (200) or failed (400). A client that leaves does not "
        "stop it.",
    )


class LayersObject(RequestModel):
    """A diff is multiplied, layer by layer, by factors that go linearly from `first` to `last` (LiNeS)."""

    first: float = Field(
        description="Of the first layer, and of the embeddings, the final norm and the head."
    )
    last: float = Field(description="Of the last layer.")

    def layer_scale(self) -> LayerScale:
        return LayerScale(self.first, self.last)


_Path = Annotated[str, Field(min_length=1, max_length=_MAX_PATH)]
_Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
_PATH = "A folder or file on the server, under its `--expert-root`, or a hub id where the server allows them."
_FORMAT = "`folder` (a whole model), `lora`, `diff` or `compressed`; without it, told from the files."
_OF = "Name of the loaded small model that an adapter or a diff changes; default: the expert's untuned model."
_SCALE = "Multiplies an adapter or a diff; default 1."
_LAYERS = "For diffs: further factors, layer by layer."


class PartObject(RequestModel):
    """One model of a merge."""

    weight: float = Field(description="Multiplies what this model changes.")
    path: _Path = Field(description=_PATH)
    format: Format | None = Field(None, description=_FORMAT)
    scale: float | None = Field(None, description=_SCALE)
    layers: LayersObject | None = Field(None, description=_LAYERS)

    def source(self) -> Source:
        """Raises InvalidRequest with `param` inside this object."""
        return Source(
            path=self.path,
            format=self.format,
            scale=_scale(self.scale),
            layers=None if self.layers is None else self.layers.layer_scale(),
        )


class SourceObject(RequestModel):
    """Where a model's weights come from: a `path`, or a `merge` of several, or `of` alone for a small model that is
    loaded already."""

    model_config = ConfigDict(json_schema_extra=at_least_one("path", "merge", "of"))

    path: _Path | None = Field(None, description=_PATH)
    format: Format | None = Field(None, description=_FORMAT)
    of: _Name | None = Field(None, description=_OF)
    scale: float | None = Field(None, description=_SCALE)
    layers: LayersObject | None = Field(None, description=_LAYERS)
    merge: Annotated[list[PartObject], Field(min_length=1), AtMost(_MAX_PARTS)] | None = Field(
        None,
        description="`of` + sum of weight * (model - `of`): task arithmetic; a soup if the weights sum to 1.",
    )

    def source(self) -> Source:
        """Raises InvalidRequest with `param` inside this object."""
        parts: list[tuple[float, Source]] = []
        for index, part in enumerate(self.merge or ()):
            with _inside(f"merge[{index}]"):
                parts.append((part.weight, part.source()))
        return Source(
            path=self.path,
            format=self.format,
            of=self.of,
            scale=_scale(self.scale),
            layers=None if self.layers is None else self.layers.layer_scale(),
            merge=tuple(parts),
        )


def _scale(value: float | None) -> float:
    return 1.0 if value is None else value


@contextmanager
def _inside(field: str) -> Iterator[None]:
    """What is refused in here is refused of something inside `field`."""
    try:
        yield
    except InvalidRequest as error:
        error.param = field if error.param is None else f"{field}.{error.param}"
        raise


def _path_or_object(value: Any) -> Any:
    if isinstance(value, str):
        return {"path": value}
    if isinstance(value, Mapping | SourceObject):
        return value
    raise PydanticCustomError(
        "source_type", "It must be a path or hub id, or an object with 'path', 'merge' or 'of'"
    )


class _OrPath:
    """Annotates a source: the OpenAPI document says that a string will do."""

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [{"type": "string", "minLength": 1, "maxLength": _MAX_PATH}, handler(schema)]}


SourceEntry = Annotated[SourceObject, BeforeValidator(_path_or_object), _OrPath()]


class ExpertRequest(RequestModel):
    """What the expert is from now on; nothing is taken over from its last generation."""

    tuned: SourceEntry
    untuned: SourceEntry | None = Field(
        None,
        description="Default: the model that `tuned` changes; none if that is a folder.",
    )
    protected: bool | None = Field(
        None, description="Only administrators may give the expert negative weights. Default false."
    )

    def spec(self) -> ExpertSpec:
        """Raises InvalidRequest, naming the field in this body."""
        with _inside("tuned"):
            tuned = self.tuned.source()
        with _inside("untuned"):
            untuned = None if self.untuned is None else self.untuned.source()
        return ExpertSpec(tuned, untuned, bool(self.protected))


class GenerationBody(BaseModel):
    """One version of an expert."""

    generation: int
    phase: Phase
    formats: dict[str, str] = Field(
        description="Of `tuned` and `untuned`: `folder`, `lora`, `diff`, `compressed` or `merge`."
    )
    sources: dict[str, Any] = Field(description="`tuned` and `untuned` as they were asked for.")
    bytes: int = Field(
        description="Of weights that only this generation holds in memory; what is shared counts with its first "
        "holder. 0 where it holds none."
    )
    requests: int = Field(description="Choices in flight on it.")
    progress: float | None = Field(description="Within the phase, from 0 to 1; null where it does not move.")
    content_hash: str = Field(description="SHA-256 of all its files; empty until they have been read.")
    created: float = Field(description="Seconds since the epoch.")
    error: str | None = Field(description="Why it failed.")
    seconds: dict[str, float] = Field(description="How long each phase took that it has gone through.")

    @classmethod
    def of(cls, status: GenerationStatus) -> GenerationBody:
        sources = status.spec.as_json()
        return cls(
            generation=status.generation,
            phase=status.phase,
            formats=status.formats,
            sources={name: sources[name] for name in ("tuned", "untuned") if name in sources},
            bytes=status.bytes,
            requests=status.requests,
            progress=status.progress,
            content_hash=status.content_hash,
            created=status.created,
            error=status.error,
            seconds=status.seconds,
        )


class ExpertBody(BaseModel):
    object: Literal["expert"] = "expert"
    name: str
    state: str = Field(
        description="`published` (requests are served), `parked` (loaded when the next request comes), `loading` (the "
        "first generation is on its way), `failed` (no generation ever served) or `draining` (it was deleted, and what "
        "runs finishes)."
    )
    generation: int | None = Field(description="The one that new requests get; null if none serves.")
    previous: int | None = Field(
        description="The one that a rollback would bring back; null if there is none."
    )
    protected: bool
    last_error: str | None = Field(
        description="Of the newest generation that failed; null once a newer one has been published."
    )
    generations: list[GenerationBody] = Field(description="The newest first.")

    @classmethod
    def of(cls, status: ExpertStatus) -> ExpertBody:
        return cls(
            name=status.name,
            state=status.state,
            generation=status.generation,
            previous=status.previous,
            protected=status.protected,
            last_error=status.last_error,
            generations=[GenerationBody.of(generation) for generation in status.generations],
        )


class ExpertList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ExpertBody]


class ChangeBody(BaseModel):
    """A change that has begun."""

    expert: str
    generation: int = Field(description="The one that is loaded, brought back or taken away.")
    status: ExpertBody | None = Field(description="The expert now; null if it is gone already.")

    @classmethod
    def of(cls, change: Change, status: ExpertStatus | None) -> ChangeBody:
        return cls(
            expert=change.expert,
            generation=change.generation,
            status=None if status is None else ExpertBody.of(status),
        )


def _as_given(value: Any, handler: Any) -> Any:
    """The object as it came, which is how it is kept and shown, once it is known to be a fusion. Raises
    InvalidRequest."""
    parse_fusion(value)
    return value


if TYPE_CHECKING:
    PresetFusion = Mapping[str, Any]
else:
    PresetFusion = Annotated[AnyFusion, WrapValidator(_as_given)]


class PresetBody(BaseModel):
    object: Literal["preset"] = "preset"
    name: str
    fusion: dict[str, Any] = Field(description="A fusion object, as it was given.")


class PresetList(BaseModel):
    object: Literal["list"] = "list"
    data: list[PresetBody]


class PresetDeleted(BaseModel):
    object: Literal["preset"] = "preset"
    name: str
    deleted: Literal[True] = True


class Draining(BaseModel):
    status: Literal["draining"] = "draining"
