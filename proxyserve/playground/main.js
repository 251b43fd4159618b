// Starts the page: reads what the server offers this key, then shows it.
import { effect, html, render } from "./lib.js";
import { App } from "./parts/app.js";
import { connect, phase } from "./core/server.js";
import { readHash } from "./core/view.js";
import { followKeys } from "./core/shortcuts.js";

const root = document.getElementById("app");
root.replaceChildren();
render(html`<${App} />`, root);
followKeys();
// Also where a key comes first: which view the page opens with depends on what the key may use.
const waiting = effect(() => {
  if (phase.value !== "ready") return;
  queueMicrotask(() => waiting());
  readHash();
});
void connect();
