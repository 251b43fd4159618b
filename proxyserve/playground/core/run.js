// Asking the server for one answer, and scoring one again.
import { Aligner } from "./align.js";
import { ApiError, call, request } from "./api.js";
import { asSent, explained, listed } from "./request.js";
import { settings } from "./server.js";
import { events } from "./sse.js";

const NO_EXPLANATIONS =
  "This key may not ask for explanations, so the answer is plain text: the server's operator grants them (a key's " +
  "“explain”, or --explain-to-all).";

/** Streams the answer to `asked` into `answer`. `template`: an expert whose chat template a base without one borrows. */
export async function stream(answer, asked, { abort, template }) {
  const run = answer.begin(asked);
  const watch = new Stopwatch();
  try {
    const { response, k } = await open(answer, asked, abort, template);
    await read(answer, response, watch, k > 0, abort);
    answer.status.value = "done";
  } catch (error) {
    if (answer.run === run) end(answer, error);
  } finally {
    if (answer.run === run && answer.stats.value === null && answer.tokens.length) {
      answer.stats.value = { ...watch.read(answer.tokens.length), usage: null, fusion: null };
    }
  }
}

function end(answer, error) {
  if (error.name === "AbortError") {
    answer.status.value = "stopped";
  } else if (error instanceof ApiError) {
    const kept = error.code === "broken" && answer.tokens.length ? " What had come until then is kept." : "";
    answer.fail(error.message + kept);
  } else {
    answer.fail("The answer could not be read.");
    throw error;
  }
}

/** The response, and how many tokens its explanations list. */
async function open(answer, asked, abort, template) {
  const post = async ({ path, body }, k) => ({
    response: await request("POST", path, asSent(body, k), { signal: abort }),
    k,
  });
  const k = listed();
  if (!k) answer.note(NO_EXPLANATIONS);
  const { messages, ...body } = asked.body;
  const borrow = async () => {
    const prompt = await rendered(messages, template, abort);
    answer.asked.value = { path: "v1/completions", body: { ...body, prompt }, instead: asked.body };
    answer.note(`The base has no chat template of its own: it continues the prompt as '${template}' writes it.`);
    return post(answer.asked.value, k);
  };
  const plain = body.model === settings.value.base && !body.fusion;
  if (messages && plain && template && !settings.value.chats) return borrow();
  try {
    return await post(asked, k);
  } catch (error) {
    if (error.status === 403 && error.param === "fusion.explain") {
      answer.note(NO_EXPLANATIONS);
      return post(asked, 0);
    }
    if (error.status === 400 && error.param === "messages" && template && !body.fusion?.experts) return borrow();
    throw error;
  }
}

/** The ids of a conversation in the template that the base borrows from an expert. */
async function rendered(messages, template, abort) {
  const body = { model: `${settings.value.base}+${template}`, messages };
  return (await call("POST", "tokenize", body, { signal: abort })).tokens;
}

async function read(answer, response, watch, explains, abort) {
  const aligner = new Aligner();
  let count = 0;
  for await (const event of events(response)) {
    abort.throwIfAborted(); // what had come before, and was not read yet
    const [choice] = event.choices;
    answer.prompt ??= event.prompt_token_ids ?? choice?.prompt_token_ids ?? null;
    if (choice) {
      const delta = choice.delta ?? {};
      const text = (delta.reasoning ?? "") + (delta.content ?? choice.text ?? "");
      const ids = choice.token_ids ?? [];
      if (ids.length) watch.tick();
      count += ids.length;
      const said = choice.explain ?? [];
      const tokens = ids.map((id, index) => ({ id, said: said[index] ?? null, name: said[index]?.token ?? "" }));
      if (explains) answer.append(aligner.push(tokens, text));
      // Otherwise tokens have no names: what came together is shown together.
      else if (text || ids.length) answer.append([{ ids, said: null, text }]);
    }
    if (event.usage) answer.stats.value = { ...watch.read(count), usage: event.usage, fusion: event.fusion ?? null };
  }
  answer.append(aligner.finish());
}

/**
 * Scores the tokens of `answer` again under another `asked`. They are sent as ids, after the ids of their prompt, so that
 * the text is the same token for token.
 */
export async function rescore(answer, asked, { abort }) {
  const ids = answer.tokens.flatMap((token) => token.ids ?? [token.id]);
  const prompt = answer.prompt;
  if (!prompt || ids.some((id) => id === undefined)) return;
  const prior = answer.status.value === "scoring" ? "done" : answer.status.value;
  const run = answer.take("scoring");
  try {
    const { model, fusion } = asked.body;
    const body = { model, prompt: [...prompt, ...ids], ...(fusion ? { fusion } : {}) };
    const scored = await score(body, abort);
    answer.asked.value = asked;
    answer.judge(scored.said.slice(prompt.length));
    answer.stats.value = { ...(answer.stats.value ?? {}), ...summary(scored, prompt.length) };
    answer.error.value = "";
    answer.status.value = "done";
  } catch (error) {
    if (answer.run !== run) return;
    answer.status.value = prior;
    if (error.name !== "AbortError") end(answer, error);
  }
}

/** Scores a text of the user's own as a whole. */
export async function scoreText(answer, asked, { abort }) {
  const run = answer.begin(asked, "scoring");
  try {
    const { model, fusion, prompt } = asked.body;
    const scored = await score({ model, prompt, ...(fusion ? { fusion } : {}) }, abort);
    answer.prompt = [];
    answer.append(
      scored.ids.map((id, index) => ({ id, said: scored.said[index], text: scored.texts[index] })),
    );
    answer.stats.value = summary(scored, 0);
    answer.status.value = "done";
  } catch (error) {
    if (answer.run === run) end(answer, error);
  }
}

async function score(body, abort) {
  const asking = { ...body, echo: true, max_tokens: 0, logprobs: 0, return_token_ids: true };
  const reply = await call("POST", "v1/completions", explained(asking, listed()), { signal: abort });
  const [choice] = reply.choices;
  const characters = [...choice.text]; // offsets count characters, where strings here count halves of some
  const offsets = choice.logprobs.text_offset;
  const texts = offsets.map((start, index) => characters.slice(start, offsets[index + 1]).join(""));
  const said = choice.prompt_explain ?? [];
  return { ids: choice.prompt_token_ids, texts, said, logprobs: choice.logprobs.token_logprobs, reply };
}

function summary(scored, from) {
  const own = scored.logprobs.slice(from).filter((value) => value !== null);
  const said = scored.said.slice(from).filter(Boolean);
  const kls = said.map((each) => each.kl).filter((kl) => kl !== null);
  const flips = said.filter((each) => each.flip).length;
  const mean_kl = kls.length ? kls.reduce((sum, kl) => sum + kl, 0) / kls.length : null;
  return {
    scored: { logprob: own.reduce((sum, value) => sum + value, 0), tokens: own.length },
    usage: scored.reply.usage,
    fusion: { ...scored.reply.fusion, mean_kl, flips: kls.length ? flips : null },
  };
}

/** Times in seconds. */
class Stopwatch {
  #start = performance.now();
  #first = null;

  tick() {
    this.#first ??= performance.now();
  }

  read(tokens) {
    const now = performance.now();
    const after = this.#first === null ? null : (this.#first - this.#start) / 1000;
    const seconds = (now - this.#start) / 1000;
    const decoding = this.#first === null ? 0 : (now - this.#first) / 1000;
    return { tokens, first: after, seconds, rate: tokens > 1 && decoding > 0 ? (tokens - 1) / decoding : null };
  }
}
