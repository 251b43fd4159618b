"""proxyserve's own client: fusion and its reports as types, and which expert moved which token."""

import os

from proxyserve_client import Fusion, ProxyServe

with ProxyServe(os.environ.get("PROXYSERVE_URL", "http://127.0.0.1:8000")) as client:
    fusion = Fusion.proxy(qa=1.0, bio=0.25).with_parameters(explain=3)
    stream = client.stream_chat("Which instrument does Kustin play?", fusion=fusion, temperature=0)
    for token in stream.tokens():
        pushes = ", ".join(f"{entry.expert} {entry.push:.1f}" for entry in token.contributions)
        print(f"{token.token!r} pushed by {pushes}{', a flip' if token.flip else ''}")
    print("answer:", stream.reply.text, stream.reply.fusion.generations)
