// How tokens are drawn, for both answers.
import { html, useId } from "../lib.js";
import { patch, view } from "../core/view.js";

export function Sampling() {
  const id = useId();
  const { temperature, max_tokens, seed, stop } = view.value;
  const number = (event, name, { low, whole, empty = null }) => {
    const text = event.target.value.trim();
    const value = Number(text);
    const valid = text !== "" && Number.isFinite(value) && value >= low && (!whole || Number.isInteger(value));
    patch({ [name]: valid ? value : empty });
  };
  return html`<section class="sampling" aria-labelledby=${`${id}-title`}>
    <h2 id=${`${id}-title`}>Drawing</h2>
    <div class="weight">
      <label for=${`${id}-temperature`}>temperature</label>
      <input id=${`${id}-temperature`} type="range" min="0" max="2" step="0.05" value=${temperature} aria-valuetext=${temperature === 0 ? "0, greedy" : String(temperature)}
        onInput=${(event) => patch({ temperature: Number(event.target.value) })} />
      <span class="value" aria-hidden="true">${temperature === 0 ? "0, greedy" : temperature}</span>
    </div>
    <div class="pair">
      <div class="field">
        <label for=${`${id}-max`}>max tokens</label>
        <input id=${`${id}-max`} type="number" min="1" step="1" value=${max_tokens}
          onChange=${(event) => number(event, "max_tokens", { low: 1, whole: true, empty: 128 })} />
      </div>
      <div class="field">
        <label for=${`${id}-seed`}>seed</label>
        <input id=${`${id}-seed`} type="number" step="1" value=${seed ?? ""} placeholder="new each time"
          onChange=${(event) => number(event, "seed", { low: -(2 ** 53), whole: true })} />
      </div>
    </div>
    <div class="field">
      <label for=${`${id}-stop`}>stop</label>
      <textarea id=${`${id}-stop`} rows="1" spellcheck=${false} value=${stop} placeholder="one per line; \\n is a line end"
        onChange=${(event) => patch({ stop: event.target.value })}></textarea>
    </div>
  </section>`;
}
