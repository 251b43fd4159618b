// Keys that work everywhere on the page.
import { send, stop, anyBusy } from "./play.js";
import { focused } from "./focus.js";
import { page } from "./view.js";

export function followKeys() {
  addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && page.value === "play") {
      event.preventDefault();
      void send();
    }
    if (event.key === "Escape" && !event.defaultPrevented) {
      if (anyBusy()) stop();
      else focused.value = null;
    }
  });
}
