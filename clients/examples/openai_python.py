"""OpenAI's own package, unmodified: the fusion goes into `extra_body`, the report comes as an extra field."""

import os

from openai import OpenAI

url = os.environ.get("PROXYSERVE_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("PROXYSERVE_API_KEY", "none"))
reply = client.chat.completions.create(
    model="atlas",
    messages=[{"role": "user", "content": "Which instrument does Kustin play?"}],
    temperature=0,
    extra_body={"fusion": {"rule": "dynamic", "experts": {"qa": 1.0}, "max_weight": 1.5}},
)
print("answer:", reply.choices[0].message.content)
print("written by generation:", reply.fusion["generations"], "flips:", reply.fusion["flips"])
print("models that ran:", ", ".join(reply.usage.lane_tokens))
