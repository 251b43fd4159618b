// The request of one side, and the fields that this page adds to read more out of the answer.
import { fusionOf } from "./fusion.js";
import { settings } from "./server.js";

/** How many likely tokens of each model are asked for. */
const LISTED = 5;

/** `{path, body}`: all that decides the answer, and nothing else. `seed` is null for a new draw each time. */
export function requestOf(view, index, seed) {
  const { model, fusion } = fusionOf(view.sides[index]);
  const body = { model };
  if (view.mode === "chat") body.messages = messagesOf(view);
  else body.prompt = view.prompt;
  if (fusion) body.fusion = fusion;
  body.temperature = view.temperature;
  body.max_tokens = view.max_tokens;
  if (seed !== null) body.seed = seed;
  const stop = stopsOf(view.stop);
  if (stop.length) body.stop = stop;
  return { path: view.mode === "chat" ? "v1/chat/completions" : "v1/completions", body };
}

function messagesOf(view) {
  const messages = view.turns.flatMap((turn) => [
    { role: "user", content: turn.user },
    { role: "assistant", content: turn.assistant },
  ]);
  if (view.system) messages.unshift({ role: "system", content: view.system });
  return [...messages, { role: "user", content: view.prompt }];
}

/** One stop string per line; `\n` and `\t` are written out, as a line cannot hold them. */
export function stopsOf(text) {
  return text
    .split("\n")
    .filter(Boolean)
    .map((line) => line.replaceAll("\\n", "\n").replaceAll("\\t", "\t"));
}

/** How many tokens an explanation lists here, 0 if this key may have none. */
export function listed() {
  return Math.min(LISTED, settings.value.explain);
}

/** With what makes the server explain each token, if `k` is not 0. */
export function explained(body, k) {
  return k ? { ...body, fusion: { ...body.fusion, explain: k } } : body;
}

/** As this page sends it. */
export function asSent(body, k) {
  const reading = { stream: true, stream_options: { include_usage: true }, return_token_ids: true };
  return { ...explained(body, k), ...reading };
}
