// Prompts that the demo family can answer. For any other server there are none: nobody here knows its models.
import { html } from "../lib.js";
import { change } from "../core/play.js";
import { isDemo } from "../core/server.js";
import { patch } from "../core/view.js";

const EXAMPLES = [
  { prompt: "Kustin", expert: "record" },
  { prompt: "Which instrument does Kustin play?", expert: "qa" },
  { prompt: "Where was Kronur born?", expert: "qa" },
];

export function Examples() {
  if (!isDemo.value) return null;
  const take = ({ prompt, expert }) => {
    patch({ mode: "chat", prompt });
    change(0, { model: "proxy", weights: { [expert]: 1 } });
  };
  return html`<div class="examples" role="group" aria-label="Examples of the demo family">
    ${EXAMPLES.map(
      (example) => html`<button type="button" class="chip" onClick=${() => take(example)}>
        ${example.prompt}
      </button>`,
    )}
  </div>`;
}
