#!/usr/bin/env bash
# Fused answers with nothing but curl. PROXYSERVE_URL is where the server is.
set -euo pipefail
url="${PROXYSERVE_URL:-http://127.0.0.1:8000}"

# The model's name says which experts take part, and how much.
curl -sf "$url/v1/chat/completions" -H 'Content-Type: application/json' -d '{
  "model": "atlas+qa:1.0", "temperature": 0,
  "messages": [{"role": "user", "content": "Which instrument does Kustin play?"}]}'
echo

# A fusion object says everything else; this one streams and says of each token which expert pushed it how far.
curl -sfN "$url/v1/chat/completions" -H 'Content-Type: application/json' -d '{
  "model": "atlas", "temperature": 0, "stream": true,
  "messages": [{"role": "user", "content": "Which instrument does Kustin play?"}],
  "fusion": {"rule": "proxy", "experts": {"qa": 1.0}, "explain": 1}}'

# How likely are given answers?
curl -sf "$url/v1/score" -H 'Content-Type: application/json' -d '{
  "model": "atlas+qa", "prompt": "Task: Which instrument does Kustin play?\nReply:",
  "continuations": [" harp", " flute"]}'
echo
