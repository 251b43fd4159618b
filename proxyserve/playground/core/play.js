// What the buttons do: asking for both answers, stopping, and following a weight that is moved.
import { signal } from "../lib.js";
import { Answer } from "./answer.js";
import { fusionOf, onlyExpert, ruleOf } from "./fusion.js";
import { requestOf } from "./request.js";
import { rescore, scoreText, stream } from "./run.js";
import { settings } from "./server.js";
import { patch, patchSide, shown, view } from "./view.js";

/** How long a slider must rest, in milliseconds, before its answer is asked for again. */
const REST = { stream: 250, score: 60 };

export const answers = [new Answer(), new Answer()];
/** Said to who cannot see the answers come. */
export const announcement = signal("");

const aborts = [null, null];
const timers = [0, 0];
/** The draw that both sides share, so that what differs between them is the fusion alone. */
let seed = null;

export function anyBusy() {
  return answers.some((answer) => answer.busy);
}

/** Asks for the answers of all sides at once. */
export async function send() {
  if (!view.value.prompt) return;
  seed = view.value.seed ?? (view.value.temperature > 0 ? Math.floor(Math.random() * 2 ** 31) : null);
  announcement.value = shown.value.length > 1 ? "Two answers are being written." : "An answer is being written.";
  await Promise.all(shown.value.map((index) => begin(index, ask)));
  if (anyBusy()) return;
  announcement.value = shown.value.map((index) => outcome(index)).join(" ");
}

function outcome(index) {
  const answer = answers[index];
  const name = shown.value.length > 1 ? `Answer ${"AB"[index]}` : "The answer";
  if (answer.error.value) return `${name} failed: ${answer.error.value}`;
  return `${name} has ${answer.tokens.length} tokens.`;
}

/** Scores the prompt itself, of a plain completion. */
export async function scorePrompt() {
  if (!view.value.prompt) return;
  await Promise.all(shown.value.map((index) => begin(index, scoreText)));
  announcement.value = "The text has been scored.";
}

export function stop() {
  for (const index of [0, 1]) halt(index);
}

/** The turn becomes history, with the first answer. */
export function goOn() {
  const { turns, prompt } = view.value;
  patch({ turns: [...turns, { user: prompt, assistant: answers[0].text }], prompt: "" });
}

/** Changes a side, and what was answered for it as the user chose: again, scored anew, or not at all. */
export function change(index, part) {
  patchSide(index, part);
  const answer = answers[index];
  if (answer.status.value === "idle" || view.value.moves === "wait" || !shown.value.includes(index)) return;
  clearTimeout(timers[index]);
  timers[index] = setTimeout(() => follow(index), REST[view.value.moves]);
}

/** The side's last answer under what the side says now. */
function follow(index) {
  const answer = answers[index];
  if (view.value.moves === "stream") return void begin(index, answer.stats.value?.scored ? scoreText : ask);
  if (answer.status.value === "running" || !answer.tokens.length) return;
  void begin(index, rescore);
}

async function begin(index, how) {
  halt(index);
  const abort = new AbortController();
  aborts[index] = abort;
  const asked = requestOf(view.value, index, seed);
  await how(answers[index], asked, { abort: abort.signal, template: templateOf(index) });
}

const ask = stream;

function halt(index) {
  clearTimeout(timers[index]);
  aborts[index]?.abort();
  aborts[index] = null;
}

/** An expert whose chat template stands in for the base's: of this side, the other one, or any. */
function templateOf(index) {
  const { sides } = view.value;
  for (const side of [sides[index], sides[1 - index]]) {
    const [named] = Object.keys(fusionOf(side).fusion?.experts ?? {});
    if (named) return named;
    if (ruleOf(side)?.experts === "one") return onlyExpert(side);
  }
  return settings.value.experts[0]?.name ?? null;
}
