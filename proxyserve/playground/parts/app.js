// The page as a whole.
import { html } from "../lib.js";
import { page } from "../core/view.js";
import { connect, phase, problem, settings } from "../core/server.js";
import { announcement } from "../core/play.js";
import { Answers } from "./answers.js";
import { Composer } from "./composer.js";
import { Experts } from "./experts.js";
import { Header } from "./header.js";
import { KeyForm } from "./key.js";
import { SidePanel } from "./sides.js";
import { TokenCard } from "./card.js";
import { Code } from "./code.js";

export function App() {
  return html`
    <${Header} />
    <main>${content()}</main>
    <div class="unseen" aria-live="polite" role="status">${announcement.value}</div>
  `;
}

function content() {
  if (phase.value === "starting") return html`<p class="starting">Loading the playground …</p>`;
  if (phase.value === "key") return html`<${KeyForm} wanted />`;
  if (phase.value === "failed") {
    return html`<div class="notice bad" role="alert">
      <p>${problem.value}</p>
      <button type="button" onClick=${connect}>Try again</button>
    </div>`;
  }
  if (page.value === "experts") return html`<${Experts} />`;
  return html`<div class="play">
    <${SidePanel} />
    <div class="work">
      <${Composer} />
      <${Answers} />
      <${Code} />
    </div>
    <${TokenCard} />
  </div>`;
}
