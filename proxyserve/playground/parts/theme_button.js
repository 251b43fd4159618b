// Light, dark, or as the system has it.
import { html, signal } from "../lib.js";

const STORED = "proxyserve-theme";
const ORDER = ["auto", "light", "dark"];

/** What is drawn by script, not by styles, is drawn again when this changes. */
export const theme = signal(document.documentElement.dataset.theme ?? "auto");

export function ThemeButton() {
  const next = ORDER[(ORDER.indexOf(theme.value) + 1) % ORDER.length];
  const choose = () => {
    if (next === "auto") {
      delete document.documentElement.dataset.theme;
      localStorage.removeItem(STORED);
    } else {
      document.documentElement.dataset.theme = next;
      localStorage.setItem(STORED, next);
    }
    theme.value = next;
  };
  return html`<button type="button" class="quiet theme" onClick=${choose} aria-label=${`Theme: ${theme.value}; change to ${next}`}>
    <span aria-hidden="true">${{ auto: "◐", light: "☀", dark: "☾" }[theme.value]}</span> <span class="name">${theme.value}</span>
  </button>`;
}
