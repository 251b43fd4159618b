// Starts the page: reads what the server offers this key, then shows it.
import { html, render } from "./lib.js";
import { App } from "./parts/app.js";
import { connect } from "./core/server.js";
import { readHash } from "./core/view.js";
import { followKeys } from "./core/shortcuts.js";

const root = document.getElementById("app");
root.replaceChildren();
render(html`<${App} />`, root);
followKeys();
await connect();
readHash();
