"""LlamaIndex's `OpenAILike` with a fusion: an answer with the server's report, and a stream."""

import os

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

url = os.environ.get("PROXYSERVE_URL", "http://127.0.0.1:8000")


def steered_by(expert: str) -> OpenAILike:
    return OpenAILike(
        model="atlas",
        api_base=f"{url}/v1",
        api_key=os.environ.get("PROXYSERVE_API_KEY", "none"),
        is_chat_model=True,
        context_window=256,  # of the demo family
        temperature=0,
        additional_kwargs={"extra_body": {"fusion": {"rule": "dynamic", "experts": {expert: 1.0}}}},
    )


answer = steered_by("qa").chat([ChatMessage(role="user", content="Which instrument does Kustin play?")])
print("answer:", answer.message.content)
print("written by generation:", answer.raw.fusion["generations"], "flips:", answer.raw.fusion["flips"])

for piece in steered_by("record").stream_chat([ChatMessage(role="user", content="Kustin")]):
    print(piece.delta, end="", flush=True)
print()
