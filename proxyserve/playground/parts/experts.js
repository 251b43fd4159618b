// The page of experts: what serves, what is on its way, and changing it.
import { html, useEffect } from "../lib.js";
import { CALM_PACE, list, listError, load } from "../core/control.js";
import { settings } from "../core/server.js";
import { Expert } from "./expert.js";
import { ExpertForm } from "./expert_form.js";

export function Experts() {
  const { control_plane: plane, admin, admin_port: port } = settings.value;
  const usable = plane === "here" && admin;
  useEffect(() => {
    if (!usable) return undefined;
    void load();
    const timer = setInterval(() => document.hidden || load(), CALM_PACE);
    return () => clearInterval(timer);
  }, [usable]);
  if (plane === "none") return says("Experts of this server are fixed: it was started without a control plane.");
  if (plane === "elsewhere") {
    const there = `${location.protocol}//${location.hostname}:${port}/#experts`;
    return says(html`Experts are changed on port ${port} of this server (--admin-port): <a href=${there}>${there}</a>.`);
  }
  if (!admin) return says("Experts are changed with an administrator's key; the one that is set is a user's. Use “Key” above.");
  return html`<div class="experts">
    <div class="row">
      <h2>Experts</h2>
      <span class="grow"></span>
      <button type="button" onClick=${load}>Refresh</button>
    </div>
    ${listError.value && html`<p class="notice bad" role="alert">${listError.value}</p>`}
    ${list.value?.map((expert) => html`<${Expert} key=${expert.name} expert=${expert} />`)}
    ${list.value?.length === 0 && html`<p class="notice">There is no expert yet; load one below.</p>`}
    <${ExpertForm} />
  </div>`;
}

function says(sentence) {
  return html`<div class="experts"><h2>Experts</h2><p class="notice">${sentence}</p></div>`;
}
