// The weight of one expert: a slider, and the number for who wants it exact. 0 is off: the expert is not run.
import { html, useId } from "../lib.js";
import { change } from "../core/play.js";
import { settings } from "../core/server.js";
import { view } from "../core/view.js";

export function Weight({ index, expert }) {
  const id = useId();
  const { min_weight: low, max_weight: high } = settings.value;
  const weight = view.value.sides[index].weights[expert.name] ?? 0;
  const set = (text) => {
    const value = Number(text);
    if (text === "" || !Number.isFinite(value)) return;
    change(index, { weights: { ...view.value.sides[index].weights, [expert.name]: value } });
  };
  const note = expert.gone ? "not on this server" : expert.untuned ? "" : "no untuned model";
  return html`<div class=${weight === 0 ? "weight off" : "weight"}>
    <label for=${id}>${expert.name}${note && html` <small>${note}</small>`}</label>
    <input
      id=${id}
      type="range"
      min=${low}
      max=${high}
      step="0.05"
      value=${weight}
      aria-valuetext=${weight === 0 ? "0, off" : String(weight)}
      onInput=${(event) => set(event.target.value)}
    />
    <input
      type="number"
      min=${low}
      max=${high}
      step="any"
      value=${weight}
      aria-label=${`Weight of ${expert.name} as a number`}
      onChange=${(event) => set(event.target.value)}
    />
  </div>`;
}
