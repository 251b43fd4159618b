// One or two answers, the key to their colours, and what belongs to each.
import { html } from "../lib.js";
import { answers } from "../core/play.js";
import { titleOf } from "../core/fusion.js";
import { shown, view } from "../core/view.js";
import { Chart } from "./chart.js";
import { Stats } from "./stats.js";
import { Tokens } from "./tokens.js";

const STATES = {
  idle: "",
  running: "writing …",
  scoring: "scoring …",
  done: "",
  stopped: "stopped",
  failed: "failed",
};

export function Answers() {
  return html`<section aria-label="Answers">
    <${Legend} />
    <div class=${shown.value.length > 1 ? "answers two" : "answers"}>
      ${shown.value.map((index) => html`<${Pane} key=${index} index=${index} />`)}
    </div>
  </section>`;
}

function Pane({ index }) {
  const answer = answers[index];
  const letter = shown.value.length > 1 ? "AB"[index] : "";
  return html`<article class="pane" data-side=${index} data-status=${answer.status.value}>
    <header>
      <h2>${letter && html`<b>${letter}</b>`} <span class="what">${titleOf(view.value.sides[index])}</span></h2>
      <span class="state">${STATES[answer.status.value]}</span>
    </header>
    <${Tokens} index=${index} answer=${answer} />
    <div class="said">
      ${answer.error.value && html`<p class="notice bad" role="alert">${answer.error.value}</p>`}
      ${answer.notes.value.map((note) => html`<p class="notice">${note}</p>`)}
      <${Stats} answer=${answer} />
    </div>
    <${Chart} index=${index} answer=${answer} />
  </article>`;
}

/** Steps of core/scale.js. */
function Legend() {
  const steps = [
    ["n3", "÷ 10"],
    ["n2", "÷ 2"],
    ["n1", ""],
    ["z", "as the base"],
    ["p1", ""],
    ["p2", "× 2"],
    ["p3", "× 10"],
  ];
  return html`<div class="legend" aria-label="Key to the colours">
    <span class="hint">How far experts pushed a token:</span>
    <ul>
      ${steps.map(([name, label]) => html`<li><i class=${`swatch ${name}`}></i>${label}</li>`)}
    </ul>
    <span class="hint"><span class="t flip">flip</span> the base would have chosen another token</span>
  </div>`;
}
