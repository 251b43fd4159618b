"""What a response says about why each token was chosen."""

from __future__ import annotations

from pydantic import BaseModel, Field


class ListedToken(BaseModel):
    """A token and its log-prob in nats; -9999.0 stands for minus infinity."""

    token: str
    token_id: int
    logprob: float


class LawOfToken(BaseModel):
    """One law's log-prob of the chosen token, and its likeliest tokens, before bias, penalties and temperature."""

    logprob: float
    top: list[ListedToken]


class ExplainedToken(BaseModel):
    """`lanes` maps `base`, `EXPERT.tuned`, `EXPERT.untuned` and other lanes that ran to their laws."""

    token: str
    token_id: int
    fused: LawOfToken
    lanes: dict[str, LawOfToken]
    weights: dict[str, float] = Field(description="Per expert: what multiplied its delta at this position.")
    push: dict[str, float] = Field(description="Per expert: weight times delta of this token, in nats.")
    kl: float | None = Field(description="KL(fused || base) in nats; null where the base did not run.")
    flip: bool | None = Field(description="Whether the fused argmax differs from the base's.")
    gated: bool = Field(description="Whether the base was sure enough and decided alone.")
