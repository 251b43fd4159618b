// What is asked: the conversation so far, the prompt, and the buttons.
import { html, useId } from "../lib.js";
import { answers, goOn, scorePrompt, send, stop } from "../core/play.js";
import { patch, view } from "../core/view.js";
import { Examples } from "./examples.js";

export function Composer() {
  const id = useId();
  const { mode, system, prompt } = view.value;
  const chat = mode === "chat";
  const busy = answers.map((answer) => answer.busy).some(Boolean); // each is read, so that the buttons follow both
  return html`<section class="composer" aria-label="Prompt">
    <div class="row">
      <div class="switch" role="radiogroup" aria-label="Kind of request">
        ${["chat", "completion"].map(
          (name) => html`<label>
            <input type="radio" name="mode" value=${name} checked=${mode === name} onChange=${() => patch({ mode: name })} />
            <span>${name === "chat" ? "Chat" : "Completion"}</span>
          </label>`,
        )}
      </div>
      <${Examples} />
    </div>
    ${chat &&
    html`<details class="system" open=${system !== ""}>
      <summary>System prompt</summary>
      <textarea aria-label="System prompt" rows="2" value=${system} onInput=${(event) => patch({ system: event.target.value })}></textarea>
    </details>`}
    ${chat && html`<${Turns} />`}
    <label for=${id} class="unseen">${chat ? "Your message" : "Text to continue"}</label>
    <textarea
      id=${id}
      class="prompt"
      rows=${chat ? 2 : 4}
      value=${prompt}
      placeholder=${chat ? "Your message" : "Text to continue, or to score"}
      onInput=${(event) => patch({ prompt: event.target.value })}
    ></textarea>
    <div class="row">
      <button type="button" class="main" disabled=${!prompt} onClick=${send}>Send <kbd>Ctrl ↵</kbd></button>
      <button type="button" disabled=${!busy} onClick=${stop}>Stop <kbd>Esc</kbd></button>
      ${chat
        ? html`<button type="button" disabled=${busy || answers[0].status.value !== "done"} onClick=${goOnFrom}>
            Go on from this answer
          </button>`
        : html`<button type="button" disabled=${!prompt} onClick=${scorePrompt}>Score the text</button>`}
    </div>
  </section>`;
}

function goOnFrom() {
  goOn();
  document.querySelector(".prompt").focus();
}

function Turns() {
  const { turns } = view.value;
  if (!turns.length) return null;
  return html`<div class="turns">
    <ol aria-label="The conversation so far">
      ${turns.map((turn) => html`<li><b>${turn.user}</b><span>${turn.assistant}</span></li>`)}
    </ol>
    <button type="button" class="quiet" onClick=${() => patch({ turns: [] })}>Begin anew</button>
  </div>`;
}
