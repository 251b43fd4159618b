import assert from "node:assert/strict";
import { test } from "node:test";

import { fusion, type Fusion } from "@proxyserve/client";

import { client, question } from "./live.js";

const qa = fusion.proxy({ qa: 1 });

test("a chat says what fusion did", async () => {
  const answer = await client.chat({ ...question, fusion: fusion.proxy({ qa: 1 }, { explain: 2 }) });
  const [choice] = answer.choices;
  assert.equal(choice?.message.content, " harp");
  assert.deepEqual(answer.fusion?.generations, { qa: 1 });
  assert.ok((answer.fusion?.mean_kl ?? 0) > 0);
  assert.ok((answer.usage.lane_tokens["qa.tuned"] ?? 0) > 0);
  assert.ok(choice.explain && choice.explain.length === answer.usage.completion_tokens);
  for (const token of choice.explain) {
    const { base, "qa.tuned": tuned, "qa.untuned": small } = token.lanes;
    assert.ok(base && tuned && small && base.top.length === 2);
    assert.ok(Math.abs((token.push["qa"] ?? NaN) - (tuned.logprob - small.logprob)) < 1e-4);
  }
});

test("streamed text is the whole text, token by token explained", async () => {
  const explained = fusion.proxy({ qa: 1 }, { explain: 1 });
  const whole = await client.chat({ ...question, fusion: explained });
  const stream = await client.streamChat({ ...question, fusion: explained });
  const tokens = [];
  for await (const token of stream.tokens()) {
    assert.equal(token.contributions[0]?.expert, "qa");
    assert.equal(token.contributions[0].push, token.push["qa"]);
    tokens.push(token);
  }
  assert.deepEqual(
    tokens.map(({ token_id, flip }) => [token_id, flip]),
    whole.choices[0]?.explain?.map(({ token_id, flip }) => [token_id, flip]),
  );
  assert.equal(stream.text, whole.choices[0]?.message.content);
  assert.deepEqual(stream.finishReasons, ["stop"]);
  assert.equal(stream.fusion?.flips, whole.fusion?.flips);
  assert.equal(stream.usage?.total_tokens, whole.usage.total_tokens);
  await assert.rejects(async () => {
    for await (const _ of (await client.streamChat({ ...question, fusion: qa })).tokens()) assert.fail();
  }, /needs explanations/);
});

test("completions, whole and streamed", async () => {
  const request = { model: "atlas", prompt: "Page: Kustin\n", max_tokens: 12, temperature: 0, fusion: qa };
  const whole = await client.complete({ ...request, return_token_ids: true, prompt_logprobs: 0 });
  assert.equal(whole.choices[0]?.token_ids?.length, whole.usage.completion_tokens);
  assert.equal(whole.choices[0]?.prompt_logprobs?.[0], null);
  const stream = await client.streamComplete(request);
  let text = "";
  for await (const piece of stream) text += piece.text;
  assert.equal(text, whole.choices[0]?.text);
  assert.equal(stream.text, text);
});

test("calls of tools stream in pieces of their own", async () => {
  const parameters = {
    type: "object",
    properties: { instrument: { enum: ["harp", "flute"] } },
    required: ["instrument"],
    additionalProperties: false,
  };
  const tools = [{ type: "function" as const, function: { name: "play", parameters } }];
  const asked = { ...question, model: "atlas+qa", max_tokens: 99, tools, parallel_tool_calls: false };
  const stream = await client.streamChat({ ...asked, tool_choice: "required" });
  let given = "";
  for await (const { text, reasoning, chunk } of stream) {
    assert.equal(text + reasoning, "");
    for (const call of chunk.choices[0]?.delta.tool_calls ?? []) given += call.function?.arguments ?? "";
  }
  assert.equal(stream.finishReasons[0], "tool_calls");
  assert.ok(["harp", "flute"].includes((JSON.parse(given) as { instrument: string }).instrument));
});

test("the plain base has no report", async () => {
  const answer = await client.complete({ prompt: "Page: Kustin\n", max_tokens: 4, temperature: 0 });
  assert.equal(answer.model, "atlas");
  assert.equal(answer.fusion, undefined);
  assert.deepEqual(Object.keys(answer.usage.lane_tokens), ["atlas"]);
});

test("every rule is understood", async () => {
  const rules: Fusion[] = [
    fusion.proxy({ qa: { weight: 1, schedule: [[0, 1], [4, 0.5]] } }, { gate: { confidence: 0.99 } }),
    fusion.upscale("qa", { beta: 1.5, top_p: 0.95 }),
    fusion.dynamic("qa", { mode: "budget", kl: 0.5 }),
    fusion.dynamic({ qa: 1, bio: 0.5 }, { max_weight: 1.5 }),
    fusion.contrast("qa", { gamma: 0.5 }),
    fusion.unlearn("qa", { alpha: 2 }),
    fusion.guidance({ negative_prompt: "I do not know", scale: 2 }),
    fusion.mixture({ base: 0.5, "qa.tuned": 0.5 }, { r: 0 }),
    fusion.arm({ qa: 0.5 }),
    fusion.formula("base + 0.5*(qa.tuned - small)", { support: { of: ["base"], top_p: 0.9, outside: "mask" } }),
  ];
  for (const rule of rules) {
    const answer = await client.complete({ model: "atlas", prompt: "Kustin", max_tokens: 2, fusion: rule });
    assert.equal(answer.fusion?.rule, rule.rule);
  }
  // The demo has no calibration: the server has read the request and says what it lacks.
  const edited = client.complete({ model: "atlas", prompt: "Kustin", max_tokens: 2, fusion: fusion.edit("qa") });
  await assert.rejects(edited, /has no calibration/);
});

test("scores", async () => {
  const prompt = "Task: Which instrument does Kustin play?\nReply:";
  const scored = await client.score({ model: "atlas+qa", prompt, continuations: [" harp", " flute"] });
  assert.deepEqual(
    scored.continuations?.map(({ is_greedy }) => is_greedy),
    [true, false],
  );
  const { tokens } = await client.tokenize({ prompt: " harp", add_special_tokens: false });
  assert.equal(await client.detokenize(tokens), " harp");
  const labels = await client.score({ prompt, label_token_ids: tokens.slice(0, 1), normalize: true, fusion: qa });
  assert.equal(labels.labels?.[0]?.probability, 1);
  const texts = await client.score({ texts: [`${prompt} harp`], fusion: qa });
  assert.ok((texts.texts?.[0]?.perplexity ?? 0) > 1);
});

test("small routes", async () => {
  assert.deepEqual(await client.ready(), { ready: true });
  const names = (await client.models()).map(({ id }) => id);
  assert.equal(names[0], "atlas");
  assert.ok(names.includes("atlas+qa"));
  assert.ok((await client.tokenizerInfo()).vocab_size > 0);
  assert.ok((await client.load()).kv_use >= 0);
  const messages = await client.tokenize({ model: "atlas+qa", messages: question.messages, return_token_strs: true });
  assert.equal(messages.token_strs?.length, messages.count);
});
