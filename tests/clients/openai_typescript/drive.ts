// Uses a server (its address is the only argument) as an application would, and prints what it saw as JSON.
import assert from "node:assert/strict";

import OpenAI, { APIError, NotFoundError } from "openai";

const url = process.argv[2];
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0 });
const messages: OpenAI.ChatCompletionMessageParam[] = [{ role: "user", content: "Where was Bremi Zale born?" }];
const question = { model: "atlas+qa", messages, max_tokens: 24, temperature: 0 } as const;

async function listing(): Promise<string[]> {
  const names: string[] = [];
  for await (const model of client.models.list()) names.push(model.id);
  assert.equal((await client.models.retrieve("atlas+qa")).id, "atlas+qa");
  return names;
}

async function chat(): Promise<string> {
  const whole = await client.chat.completions.create({ ...question, logprobs: true, top_logprobs: 2 });
  const [choice] = whole.choices;
  assert.ok(choice?.message.content);
  assert.equal(choice.logprobs?.content?.[0]?.top_logprobs.length, 2);
  assert.equal(whole.usage?.total_tokens, whole.usage!.prompt_tokens + whole.usage!.completion_tokens);
  return choice.message.content;
}

async function streamed(): Promise<string> {
  let text = "";
  let usage: OpenAI.CompletionUsage | null | undefined;
  const stream = await client.chat.completions.create({
    ...question,
    stream: true,
    stream_options: { include_usage: true },
  });
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage;
  }
  assert.ok(usage && usage.completion_tokens > 0);
  return text;
}

async function helper(): Promise<string> {
  const runner = client.chat.completions.stream(question);
  let pieces = 0;
  runner.on("content", () => pieces++);
  const answer = await runner.finalChatCompletion();
  assert.ok(pieces > 0);
  return answer.choices[0]?.message.content ?? "";
}

async function extension(): Promise<unknown> {
  // The one field that OpenAI does not have; its package passes on what it does not know.
  const request = { ...question, model: "atlas", fusion: { rule: "proxy", experts: { qa: 1.0 } } };
  const answer = await client.chat.completions.create(request);
  return (answer as unknown as { fusion: unknown }).fusion;
}

const form = {
  type: "object",
  properties: { instrument: { enum: ["harp", "flute"] } },
  required: ["instrument"],
  additionalProperties: false,
};
const tools: OpenAI.ChatCompletionTool[] = [{ type: "function", function: { name: "play", parameters: form } }];

async function called(): Promise<unknown> {
  const runner = client.chat.completions.stream({ ...question, max_tokens: 60, tools, tool_choice: "required" });
  const answer = await runner.finalChatCompletion();
  const call = answer.choices[0]?.message.tool_calls?.[0];
  assert.ok(call?.type === "function");
  return { name: call.function.name, arguments: JSON.parse(call.function.arguments) };
}

async function formed(): Promise<unknown> {
  const answer = await client.chat.completions.create({
    ...question,
    max_tokens: 60,
    response_format: { type: "json_schema", json_schema: { name: "answer", strict: true, schema: form } },
  });
  return JSON.parse(answer.choices[0]?.message.content ?? "");
}

async function responded(): Promise<string[]> {
  const request = { model: "atlas+qa", input: "Where was Bremi Zale born?", temperature: 0 } as const;
  const whole = await client.responses.create(request);
  assert.equal(whole.status, "completed");
  const streamed = await client.responses.stream(request).finalResponse();
  return [whole.output_text, streamed.output_text];
}

async function completion(): Promise<number> {
  const answer = await client.completions.create({ model: "atlas", prompt: "Bremi Zale", max_tokens: 4, logprobs: 1 });
  return answer.choices[0]?.logprobs?.tokens?.length ?? 0;
}

async function refusals(): Promise<{ status: number | undefined; param: unknown; code: unknown }[]> {
  const seen = [];
  for (const body of [{ ...question, model: "nobody" }, { ...question, temperature: -1 }]) {
    try {
      await client.chat.completions.create(body);
      assert.fail("it was not refused");
    } catch (error) {
      assert.ok(error instanceof APIError);
      seen.push({ status: error.status, param: error.param, code: error.code });
    }
  }
  await assert.rejects(client.models.retrieve("nobody"), NotFoundError);
  return seen;
}

async function abandoned(): Promise<number> {
  const endless = { model: "atlas", prompt: "Bremi", max_tokens: 200, ignore_eos: true, stream: true } as const;
  const stream = await client.completions.create(endless);
  let chunks = 0;
  for await (const _ of stream) if (++chunks === 2) break; // leaves the loop, which aborts the request
  return chunks;
}

console.log(
  JSON.stringify({
    models: await listing(),
    chat: await chat(),
    streamed: await streamed(),
    helper: await helper(),
    fusion: await extension(),
    called: await called(),
    formed: await formed(),
    responded: await responded(),
    completion: await completion(),
    refusals: await refusals(),
    abandoned: await abandoned(),
  }),
);
