"""LangChain's `ChatOpenAI` with a fusion: an answer, a stream, and an answer of a given form."""

import os
from typing import Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel

url = os.environ.get("PROXYSERVE_URL", "http://127.0.0.1:8000")
model = ChatOpenAI(
    base_url=f"{url}/v1",
    api_key=os.environ.get("PROXYSERVE_API_KEY", "none"),
    model="atlas",
    temperature=0,
    extra_body={"fusion": {"rule": "proxy", "experts": {"qa": 1.0}}},
)
question = "Which instrument does Kustin play?"

answer = model.invoke(question)
print("answer:", answer.content)
print("models that ran:", ", ".join(answer.response_metadata["token_usage"]["lane_tokens"]))


class Played(BaseModel):
    """What somebody plays."""

    instrument: Literal["harp", "flute", "drum"]


print("form:", model.with_structured_output(Played, method="json_schema").invoke(question))

# Another fusion for one call.
recorder = model.bind(extra_body={"fusion": {"rule": "dynamic", "experts": {"record": 1.0}}})
for chunk in recorder.stream("Kustin"):
    print(chunk.text, end="", flush=True)
print()

# Where nothing but the model can be set, its name says which experts take part, and how much.
named = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model="atlas+qa:0.8", temperature=0)
print("by name:", named.invoke(question).content)
