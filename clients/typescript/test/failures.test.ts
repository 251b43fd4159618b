import assert from "node:assert/strict";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { test } from "node:test";

import { fusion, hasCode, ProxyServe } from "@proxyserve/client";
import { APIConnectionTimeoutError, APIUserAbortError, BadRequestError, NotFoundError, RateLimitError } from "openai";

import { client, question } from "./live.js";

/** Enough work that it is not over before anybody can end it. */
const endless = {
  model: "atlas",
  prompt: "Kustin",
  n: 16,
  max_tokens: 200,
  ignore_eos: true,
  fusion: fusion.proxy({ qa: 1, bio: 0.5, record: 0.5, guard: 0.5 }),
};

test("refusals are the classes of openai and name the field", async () => {
  const heavy = client.chat({ ...question, fusion: fusion.proxy({ qa: 99 }) });
  await assert.rejects(heavy, (error) => error instanceof BadRequestError && error.param === "fusion.experts.qa");
  await assert.rejects(client.chat({ ...question, model: "nobody" }), (error) => {
    assert.ok(error instanceof NotFoundError && hasCode(error, "model_not_found"));
    return !hasCode(error, "load_failed");
  });
});

test("a signal ends a stream, and says so", async () => {
  const controller = new AbortController();
  const stream = await client.streamComplete(endless, { signal: controller.signal });
  await assert.rejects(async () => {
    for await (const _ of stream) controller.abort();
  }, APIUserAbortError);
  assert.ok(stream.text.length > 0 && stream.usage === undefined);
  await assert.rejects(client.chat(question, { signal: AbortSignal.abort() }), APIUserAbortError);
});

test("leaving the loop and closing end a stream quietly", async () => {
  const left = await client.streamComplete(endless);
  for await (const _ of left) break;
  const closed = await client.streamComplete(endless);
  for await (const _ of closed) closed.close();
  assert.deepEqual([left.usage, closed.usage], [undefined, undefined]);
});

test("cancelling by id ends what is being answered", async () => {
  const stream = await client.streamComplete(endless);
  let cancelled = 0;
  await assert.rejects(
    async () => {
      for await (const _ of stream) cancelled ||= await client.cancel(stream.id ?? "");
    },
    (error) => hasCode(error, "request_cancelled"),
  );
  assert.equal(cancelled, 1);
  await assert.rejects(client.cancel("nothing"), NotFoundError);
});

test("retries, timeouts and keys", async (t) => {
  const seen: { path: string | undefined; key: string | undefined }[] = [];
  const busy = JSON.stringify({ error: { message: "Full.", type: "rate_limit_error", param: null, code: "queue_full" } });
  const server = createServer((request, response) => {
    seen.push({ path: request.url, key: request.headers.authorization });
    if (request.url === "/slow/v1/models") return; // never answered
    response.writeHead(request.url === "/ready" ? 503 : 429, { "content-type": "application/json", "retry-after-ms": "1" });
    response.end(request.url === "/ready" ? '{"status": "loading", "reason": "Loading atlas."}' : busy);
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  t.after(() => (server.closeAllConnections(), server.close()));
  const baseURL = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;

  const patient = new ProxyServe({ baseURL: `${baseURL}/v1/`, apiKey: "mine", model: "atlas", maxRetries: 2 });
  await assert.rejects(patient.chat(question), (error) => error instanceof RateLimitError && hasCode(error, "queue_full"));
  assert.deepEqual(seen, Array(3).fill({ path: "/v1/chat/completions", key: "Bearer mine" }));
  seen.length = 0;
  await assert.rejects(patient.experts.load("qa", { tuned: "x" }), RateLimitError);
  assert.deepEqual(seen, [{ path: "/admin/v1/experts/qa?wait=true", key: "Bearer mine" }], "changes are sent once");
  assert.deepEqual(await patient.ready(), { ready: false, reason: "Loading atlas." });

  process.env["OPENAI_API_KEY"] = "must-not-leave";
  const keyless = new ProxyServe({ baseURL: `${baseURL}/slow`, maxRetries: 0, timeout: 100 });
  await assert.rejects(keyless.models(), APIConnectionTimeoutError);
  assert.equal(seen.at(-1)?.key, "Bearer no-key");
  const nowhere = new ProxyServe({ baseURL: "http://127.0.0.1:9" });
  assert.deepEqual(await nowhere.ready(), { ready: false, reason: "Connection error." });
});
