import assert from "node:assert/strict";
import { test } from "node:test";

import {
  contributions,
  fusion,
  modelName,
  type ChatRequest,
  type ExpertSpec,
  type ExplainedToken,
  type Fusion,
  type ScoreRequest,
} from "@proxyserve/client";

const BUILT: [Fusion, unknown][] = [
  [fusion.proxy({ qa: 0.8 }, { explain: 3 }), { rule: "proxy", experts: { qa: 0.8 }, explain: 3 }],
  [
    fusion.proxy({ qa: { weight: 0.8, schedule: [[0, 1], [32, 0.25]] } }),
    { rule: "proxy", experts: { qa: { weight: 0.8, schedule: [[0, 1], [32, 0.25]] } } },
  ],
  [fusion.upscale("qa", { beta: 1.5, top_p: 0.9 }), { rule: "upscale", experts: { qa: 1 }, beta: 1.5, top_p: 0.9 }],
  [fusion.dynamic("qa", { match: "forward" }), { rule: "dynamic", experts: { qa: 1 }, match: "forward" }],
  [fusion.dynamic({ qa: 1, bio: 0.5 }), { rule: "dynamic", experts: { qa: 1, bio: 0.5 } }],
  [fusion.contrast("qa", { gamma: 0.5 }), { rule: "contrast", experts: { qa: 1 }, gamma: 0.5 }],
  [fusion.unlearn("qa", { alpha: 2 }), { rule: "unlearn", experts: { qa: 1 }, alpha: 2 }],
  [fusion.guidance({ negative_prompt: "no", scale: 2 }), { rule: "guidance", negative_prompt: "no", scale: 2 }],
  [
    fusion.mixture({ base: 0.5, "qa.tuned": 0.5 }, { r: "-inf" }),
    { rule: "mixture", models: { base: 0.5, "qa.tuned": 0.5 }, r: "-inf" },
  ],
  [fusion.arm({ qa: 0.5 }), { rule: "arm", experts: { qa: 0.5 } }],
  [fusion.edit("qa", { budget: 0.1 }), { rule: "edit", experts: { qa: 1 }, budget: 0.1 }],
  [fusion.formula("base + 0.5*qa"), { rule: "formula", formula: "base + 0.5*qa" }],
  [
    fusion.proxy({ qa: 1 }, { prompts: { base: "plain", "qa.tuned": { prefix: "Be short. " } } }),
    { rule: "proxy", experts: { qa: 1 }, prompts: { base: { route: "plain" }, "qa.tuned": { prefix: "Be short. " } } },
  ],
];

for (const [built, expected] of BUILT) {
  test(`built: ${JSON.stringify(expected)}`, () => assert.deepEqual(built, expected));
}

test("what another rule takes is found by the compiler", () => {
  // @ts-expect-error `beta` belongs to rule `upscale`
  fusion.contrast("qa", { beta: 1 });
  // @ts-expect-error a negative prompt or negative messages, not neither
  fusion.guidance({ scale: 2 });
  // @ts-expect-error one of three
  fusion.dynamic("qa", { match: "sideways" });
});

test("what no request can have is found by the compiler", () => {
  const messages = [{ role: "user" as const, content: "Hello" }];
  const requests: ChatRequest[] = [
    { messages, top_k: 5, fusion: { explain: 1 } },
    // @ts-expect-error a misspelt field
    { messages, temprature: 0 },
    // @ts-expect-error `streamChat` streams
    { messages, stream: true },
    // @ts-expect-error a field of the server has its type
    { messages, top_k: "5" },
    // @ts-expect-error there is no such rule
    { messages, fusion: { rule: "dynamite" } },
  ];
  // @ts-expect-error texts are scored without a prompt
  const scored: ScoreRequest = { texts: ["a"], normalize: true };
  // @ts-expect-error a path is a text
  const spec: ExpertSpec = { tuned: { path: 3 } };
  assert.equal(requests.length + Object.keys(scored).length + Object.keys(spec).length, 8);
});

test("numbers that JSON has no word for are refused", () => {
  assert.throws(() => fusion.proxy({ qa: NaN }), /weight of 'qa' must be finite, not NaN/);
  assert.throws(() => fusion.proxy({ qa: { schedule: [[0, Infinity]] } }), /'qa' must be finite/);
  assert.throws(() => fusion.upscale("qa", { beta: Infinity }), /beta must be finite/);
  assert.throws(() => fusion.proxy({ "": 1 }), /must not be empty/);
});

test("model names", () => {
  assert.equal(modelName("atlas", { qa: 0.8, bio: -1 }), "atlas+qa:0.8+bio:-1");
  assert.equal(modelName("atlas", {}), "atlas");
  assert.throws(() => modelName("atlas", { "a+b": 1 }), /'a\+b' cannot be part/);
});

test("contributions come with the strongest first", () => {
  const token = { push: { qa: 0.5, bio: -2 }, weights: { qa: 1, bio: 0.25 } } as unknown as ExplainedToken;
  assert.deepEqual(contributions(token), [
    { expert: "bio", weight: 0.25, push: -2 },
    { expert: "qa", weight: 1, push: 0.5 },
  ]);
});
