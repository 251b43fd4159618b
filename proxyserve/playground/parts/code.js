// The request as code to copy.
import { html, useRef, useSignal } from "../lib.js";
import { answers, announcement } from "../core/play.js";
import { requestOf } from "../core/request.js";
import { LANGUAGES } from "../core/snippets.js";
import { shown, view } from "../core/view.js";

export function Code() {
  const language = useSignal("curl");
  const side = useSignal(0);
  const copied = useSignal(false);
  const box = useRef(null);
  const index = shown.value.includes(side.value) ? side.value : 0;
  const code = LANGUAGES[language.value](requestFor(index));
  const copy = async () => {
    if (navigator.clipboard) await navigator.clipboard.writeText(code);
    else select(box.current); // pages of other hosts without TLS have no clipboard
    copied.value = true;
    announcement.value = "Copied.";
    setTimeout(() => (copied.value = false), 1500);
  };
  return html`<details class="code">
    <summary>The request as code</summary>
    <div class="row">
      <div class="switch" role="radiogroup" aria-label="Language">
        ${Object.keys(LANGUAGES).map(
          (name) => html`<label>
            <input type="radio" name="language" value=${name} checked=${language.value === name} onChange=${() => (language.value = name)} />
            <span>${name}</span>
          </label>`,
        )}
      </div>
      ${shown.value.length > 1 &&
      html`<div class="switch" role="radiogroup" aria-label="Answer">
        ${shown.value.map(
          (at) => html`<label>
            <input type="radio" name="code-side" value=${at} checked=${index === at} onChange=${() => (side.value = at)} />
            <span>${"AB"[at]}</span>
          </label>`,
        )}
      </div>`}
      <button type="button" class="copy" onClick=${copy}>${copied.value ? "Copied" : "Copy"}</button>
    </div>
    <pre tabindex="0" aria-label="Code"><code ref=${box}>${code}</code></pre>
    <p class="hint">
      The page itself also asks for a stream and for explanations, which change nothing in the text.
    </p>
  </details>`;
}

/** What would be asked now; with the seed that was drawn, and as it was really sent where the prompt had to be rendered. */
function requestFor(index) {
  const asked = answers[index].asked.value;
  const now = requestOf(view.value, index, asked?.body.seed ?? view.value.seed);
  return asked?.instead && JSON.stringify(asked.instead) === JSON.stringify(now.body) ? asked : now;
}

function select(element) {
  getSelection().selectAllChildren(element);
  document.execCommand("copy");
}
