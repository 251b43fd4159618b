// Where the key is typed in.
import { html, useId, useSignal } from "../lib.js";
import { key, setKey } from "../core/api.js";
import { connect, phase, problem } from "../core/server.js";

/** `wanted`: nothing works without one. `done` is called when a key has been taken. */
export function KeyForm({ wanted, done }) {
  const typed = useSignal(key.value);
  const id = useId();
  const take = async (event) => {
    event.preventDefault();
    setKey(typed.value);
    await connect();
    if (phase.value === "ready") done?.();
  };
  return html`<form class=${wanted ? "key wanted" : "key"} onSubmit=${take}>
    ${wanted && html`<h2>This server needs a key</h2>`}
    <label for=${id}>API key</label>
    <div class="row">
      <input
        id=${id}
        type="password"
        autocomplete="off"
        spellcheck=${false}
        value=${typed.value}
        aria-describedby=${`${id}-hint`}
        onInput=${(event) => (typed.value = event.target.value)}
      />
      <button type="submit" class="main">Use</button>
    </div>
    <p class="hint" id=${`${id}-hint`}>
      Kept in this tab until it is closed, and sent to this server alone. Experts are changed with an administrator's key.
    </p>
    ${wanted && key.value && html`<p class="error" role="alert">${problem.value}</p>`}
  </form>`;
}
