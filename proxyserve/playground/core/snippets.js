// The same request for a shell, for Python and for TypeScript. The key is never in it: it is read from the environment.
import { key, urlOf } from "./api.js";

const VARIABLE = "PROXYSERVE_API_KEY";

export const LANGUAGES = { curl, Python: python, TypeScript: typescript };

function curl({ path, body }) {
  const lines = [`curl -s ${quote(urlOf(path))}`, `-H 'Content-Type: application/json'`];
  if (key.value) lines.push(`-H "Authorization: Bearer $${VARIABLE}"`);
  lines.push(`-d ${quote(JSON.stringify(body, null, 2))}`);
  return lines.join(" \\\n  ");
}

/** A word of a POSIX shell. */
function quote(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function python({ path, body }) {
  const { fusion, ...plain } = body;
  const extra = fusion ? { extra_body: { fusion } } : {};
  const given = Object.entries({ ...plain, ...extra });
  return [
    ...(key.value ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(urlOf("v1"))}, api_key=${key.value ? `os.environ["${VARIABLE}"]` : '"none"'})`,
    `reply = client.${resourceOf(path)}.create(`,
    ...given.map(([name, value]) => `    ${name}=${literal(value)},`),
    ")",
    `print(reply.choices[0].${path.includes("chat") ? "message.content" : "text"})`,
  ].join("\n");
}

function resourceOf(path) {
  return path.includes("chat") ? "chat.completions" : "completions";
}

/** JSON as Python writes it. */
function literal(value) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object") {
    const pairs = Object.entries(value).map(([name, part]) => `${JSON.stringify(name)}: ${literal(part)}`);
    return `{${pairs.join(", ")}}`;
  }
  return JSON.stringify(value);
}

function typescript({ path, body }) {
  const kind = path.includes("chat") ? "Chat.ChatCompletionCreateParamsNonStreaming" : "CompletionCreateParamsNonStreaming";
  return [
    'import OpenAI from "openai";',
    "",
    `const client = new OpenAI({ baseURL: ${JSON.stringify(urlOf("v1"))}, apiKey: ${key.value ? `process.env.${VARIABLE}` : '"none"'} });`,
    "// `fusion` is proxyserve's own field, which OpenAI's types do not know.",
    `const request: OpenAI.${kind} & { fusion?: unknown } = ${JSON.stringify(body, null, 2)};`,
    `const reply = await client.${resourceOf(path)}.create(request);`,
    `console.log(reply.choices[0].${path.includes("chat") ? "message.content" : "text"});`,
  ].join("\n");
}
