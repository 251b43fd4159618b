"""A typed helper over the `openai` package for proxyserve.

    from proxyserve_client import Fusion, ProxyServe

    with ProxyServe("http://127.0.0.1:8000", model="atlas") as client:
        reply = client.chat("Where was Mira born?", fusion=Fusion.proxy(qa=0.8), max_tokens=32)
        print(reply.text, reply.fusion.flips, reply.usage.lane_tokens)

Errors are the exception classes of `openai` itself (`openai.BadRequestError`, `openai.NotFoundError`, ...): their
`message`, `param` and `code` are what the server answered.
"""

from proxyserve_client.admin import AsyncExperts, AsyncPresets, Experts, Presets
from proxyserve_client.async_client import AsyncProxyServe
from proxyserve_client.client import ProxyServe
from proxyserve_client.connection import Readiness
from proxyserve_client.experts import Expert, ExpertGeneration, GenerationFailed, Source
from proxyserve_client.explain import Contribution, ExplainedToken, LawOfToken, ListedToken
from proxyserve_client.fusion import ExpertWeight, Fusion
from proxyserve_client.options import ChatOptions, CompletionOptions, Message, ScoreOptions
from proxyserve_client.reply import Choice, FusionReport, PromptToken, Reply, ToolCall, Usage
from proxyserve_client.routes import Load, TokenizerInfo, Tokens
from proxyserve_client.score import LabelScore, Scores, TextScore
from proxyserve_client.stream import AsyncTextStream, Piece, TextStream

__all__ = [
    "AsyncExperts",
    "AsyncPresets",
    "AsyncProxyServe",
    "AsyncTextStream",
    "ChatOptions",
    "Choice",
    "CompletionOptions",
    "Contribution",
    "Expert",
    "ExpertGeneration",
    "ExpertWeight",
    "Experts",
    "ExplainedToken",
    "Fusion",
    "FusionReport",
    "GenerationFailed",
    "LabelScore",
    "LawOfToken",
    "ListedToken",
    "Load",
    "Message",
    "Piece",
    "Presets",
    "PromptToken",
    "ProxyServe",
    "Readiness",
    "Reply",
    "ScoreOptions",
    "Scores",
    "Source",
    "TextScore",
    "TextStream",
    "TokenizerInfo",
    "Tokens",
    "ToolCall",
    "Usage",
]
