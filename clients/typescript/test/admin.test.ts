import assert from "node:assert/strict";
import { test } from "node:test";

import { fusion, hasCode } from "@proxyserve/client";
import { NotFoundError } from "openai";

import { client, question } from "./live.js";

const NAME = "typed";

test("an expert is loaded with progress, swapped, rolled back and unloaded", async () => {
  const phases = new Set<string>();
  const spec = { tuned: { path: "experts/qa" }, untuned: "small" };
  const first = await client.experts.load(NAME, spec, { pollMs: 1, onProgress: ({ phase }) => phases.add(phase) });
  assert.equal(first.state, "published");
  assert.ok(phases.size > 0 && [...phases].every((phase) => /^(loading|verifying|warming|published)$/.test(phase)));
  const answer = await client.chat({ ...question, fusion: fusion.proxy({ [NAME]: 1 }) });
  assert.equal(answer.choices[0]?.message.content, " harp");

  const second = await client.experts.load(NAME, { tuned: "experts/bio", untuned: "small" });
  assert.deepEqual([second.generation, second.previous], [(first.generation ?? 0) + 1, first.generation]);
  const back = await client.experts.rollback(NAME);
  assert.equal(back.generation, first.generation);
  assert.ok((await client.experts.list()).some(({ name }) => name === NAME));

  await client.experts.unload(NAME);
  await assert.rejects(client.experts.get(NAME), NotFoundError);
});

test("a load that fails says why, and can be followed without waiting", async () => {
  const broken = client.experts.load(NAME, { tuned: "experts", untuned: "small" });
  await assert.rejects(broken, (error) => hasCode(error, "load_failed") && /experts/.test(error.message));
  const change = await client.experts.beginLoad(NAME, { tuned: "experts/qa", untuned: "small" });
  assert.equal(change.expert, NAME);
  for (;;) {
    const expert = await client.experts.get(NAME);
    if (expert.generation === change.generation) break;
    assert.equal(expert.last_error, null);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  const gone = await client.experts.beginUnload(NAME);
  assert.equal(gone.generation, change.generation);
});

test("presets are models", async () => {
  const saved = await client.presets.put("typed-preset", fusion.dynamic("qa", { max_weight: 1.5 }));
  assert.deepEqual((await client.presets.get("typed-preset")).fusion, saved.fusion);
  assert.ok((await client.presets.list()).some(({ name }) => name === "typed-preset"));
  const answer = await client.chat({ ...question, model: "typed-preset", fusion: { explain: 1 } });
  assert.equal(answer.fusion?.rule, "dynamic");
  assert.ok((answer.choices[0]?.explain?.length ?? 0) > 0);
  await client.presets.delete("typed-preset");
  await assert.rejects(client.presets.get("typed-preset"), NotFoundError);
  for (const name of ["", ".", ".."]) await assert.rejects(client.presets.get(name), /cannot be a name/);
});
