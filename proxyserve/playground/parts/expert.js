// One expert: its state, its generations, and the buttons that change it.
import { html, useSignal } from "../lib.js";
import { changes, rollback, STEPS, unload } from "../core/control.js";
import { bytes } from "../core/scale.js";
import { ExpertForm } from "./expert_form.js";

export function Expert({ expert }) {
  const { name, state, generation, previous } = expert;
  const change = changes.value[name];
  const busy = Boolean(change && !change.done);
  const swapping = useSignal(false);
  const sure = useSignal(false);
  return html`<section class="expert" data-expert=${name} aria-labelledby=${`expert-${name}`}>
    <header class="row">
      <h3 id=${`expert-${name}`}>${name}</h3>
      <span class=${`badge ${state}`}>${state}</span>
      <span class="generation">${generation === null ? "no generation serves" : `generation ${generation}`}</span>
      ${expert.protected && html`<span class="badge">protected</span>`}
      <span class="grow"></span>
      <button type="button" disabled=${busy} aria-expanded=${swapping.value} onClick=${() => (swapping.value = !swapping.value)}>
        Swap …
      </button>
      <button
        type="button"
        disabled=${busy || previous === null}
        title=${previous === null ? "There is no earlier generation" : `Back to generation ${previous}`}
        onClick=${() => rollback(name)}
      >
        Roll back
      </button>
      ${sure.value
        ? html`<button type="button" class="danger" disabled=${busy} onClick=${() => (sure.value = false) || unload(name)}>
            Unload ${name}: sure?
          </button>`
        : html`<button type="button" disabled=${busy} onClick=${() => (sure.value = true)}>Unload</button>`}
    </header>
    ${change && html`<${Change} change=${change} />`}
    ${!change && expert.last_error && html`<p class="notice bad">Last error: ${expert.last_error}</p>`}
    ${swapping.value && html`<${ExpertForm} expert=${expert} done=${() => (swapping.value = false)} />`}
    <${Generations} expert=${expert} />
  </section>`;
}

const DONE = { swap: "now serves", rollback: "serves again", unload: "is going" };

function Change({ change }) {
  const { what, generation, phase, progress, error, done } = change;
  if (error) return html`<p class="notice bad" role="alert">${error}</p>`;
  if (done) return html`<p class="notice good" role="status">Generation ${generation} ${DONE[what]}.</p>`;
  const step = STEPS.indexOf(phase);
  const share = step < 0 ? undefined : (step + (progress ?? 0)) / (STEPS.length - 1);
  return html`<div class="change" role="status">
    <progress max="1" value=${share} aria-label="Progress"></progress>
    <span>${generation === null ? "asking …" : `generation ${generation}: ${phase ?? "waiting"} …`}</span>
  </div>`;
}

function Generations({ expert }) {
  return html`<div class="scroll" tabindex="0" role="group" aria-label=${`Generations of ${expert.name}`}>
    <table>
      <thead>
        <tr><th scope="col">generation</th><th scope="col">phase</th><th scope="col">in flight</th><th scope="col">memory</th><th scope="col">since</th><th scope="col">from</th></tr>
      </thead>
      <tbody>
        ${expert.generations.map(
          (each) => html`<tr class=${each.phase}>
            <th scope="row">${each.generation}</th>
            <td>${each.phase}${each.error && html`<br /><span class="error">${each.error}</span>`}</td>
            <td class="num">${each.requests}</td>
            <td class="num">${bytes(each.bytes)}</td>
            <td>${new Date(each.created * 1000).toLocaleTimeString()}</td>
            <td class="from">${Object.entries(each.sources).map(([role, source]) => html`<div>${role}: <code title=${nameOf(source)}>${short(nameOf(source))}</code></div>`)}</td>
          </tr>`,
        )}
      </tbody>
    </table>
  </div>`;
}

/** The end of a long path, which is what tells it from others. */
function short(path) {
  const parts = path.split("/");
  return path.startsWith("/") && parts.length > 4 ? `…/${parts.slice(-2).join("/")}` : path;
}

function nameOf(source) {
  return source === null ? "none" : source.path && Object.keys(source).length === 1 ? source.path : JSON.stringify(source);
}
