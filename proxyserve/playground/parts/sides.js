// The panel of settings: what each answer is asked of, and how it is drawn.
import { html, useSignal } from "../lib.js";
import { patch, shown, view } from "../core/view.js";
import { Sampling } from "./sampling.js";
import { Side } from "./side.js";

const MOVES = [
  ["stream", "Write the answer again"],
  ["score", "Score the same text at once"],
  ["wait", "Nothing until Send"],
];

export function SidePanel() {
  return html`<aside class="panel" aria-label="Settings">
    ${shown.value.map((index) => html`<${Side} key=${index} index=${index} />`)}
    <label class="check">
      <input type="checkbox" checked=${view.value.compare} onChange=${(event) => patch({ compare: event.target.checked })} />
      Two answers side by side
    </label>
    <fieldset class="moves">
      <legend>When a weight is moved</legend>
      ${MOVES.map(
        ([name, label]) => html`<label class="check">
          <input
            type="radio"
            name="moves"
            value=${name}
            checked=${view.value.moves === name}
            onChange=${() => patch({ moves: name })}
          />
          ${label}
        </label>`,
      )}
    </fieldset>
    <${Sampling} />
  </aside>`;
}
