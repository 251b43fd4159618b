// Name, pages, key and theme.
import { html, useSignal } from "../lib.js";
import { key } from "../core/api.js";
import { phase, settings } from "../core/server.js";
import { page } from "../core/view.js";
import { KeyForm } from "./key.js";
import { ThemeButton } from "./theme_button.js";

export function Header() {
  const open = useSignal(false);
  const offered = settings.value;
  const tab = (name, label) => html`<a
    href=${`#${name}`}
    aria-current=${page.value === name ? "page" : undefined}
    onClick=${(event) => {
      event.preventDefault();
      page.value = name;
    }}
    >${label}</a
  >`;
  return html`<header class="top">
    <h1><span class="mark" aria-hidden="true"></span><span class="title">proxyserve</span></h1>
    <nav aria-label="Pages">
      ${(offered?.generates ?? true) && tab("play", "Playground")} ${tab("experts", "Experts")}
    </nav>
    <span class="grow"></span>
    <span class="about">${offered && `${offered.base} · ${offered.version}`}</span>
    ${phase.value === "ready" &&
    html`<button
      type="button"
      class="quiet"
      aria-expanded=${open.value}
      onClick=${() => (open.value = !open.value)}
    >
      ${key.value ? "Key: set" : "Key"}
    </button>`}
    <${ThemeButton} />
    ${open.value && html`<div class="drop"><${KeyForm} done=${() => (open.value = false)} /></div>`}
  </header>`;
}
