// Loading a new expert, or another generation of one.
import { html, useId, useSignal } from "../lib.js";
import { changes, publish } from "../core/control.js";

/** `expert`: the one to swap; without it a new one is loaded. `done` is called when the server has taken the order. */
export function ExpertForm({ expert, done }) {
  const id = useId();
  const newest = expert?.generations[0];
  const name = useSignal(expert?.name ?? "");
  const tuned = useSignal("");
  const untuned = useSignal(textOf(newest?.sources.untuned));
  const guarded = useSignal(expert?.protected ?? false);
  const problem = useSignal("");
  const submit = async (event) => {
    event.preventDefault();
    problem.value = "";
    const body = { tuned: sourceOf(tuned.value), protected: guarded.value };
    if (untuned.value.trim()) body.untuned = sourceOf(untuned.value);
    const target = name.value.trim();
    if (expert) done();
    const succeeded = await publish(target, body);
    if (!expert && !succeeded) problem.value = changes.value[target].error;
    else if (!expert) name.value = tuned.value = "";
  };
  const field = (signal, key, label, hint, more = {}) => html`<div class="field">
    <label for=${`${id}-${key}`}>${label}</label>
    <input id=${`${id}-${key}`} type="text" spellcheck=${false} autocomplete="off" value=${signal.value}
      aria-describedby=${`${id}-${key}-hint`} onInput=${(event) => (signal.value = event.target.value)} ...${more} />
    <p class="hint" id=${`${id}-${key}-hint`}>${hint}</p>
  </div>`;
  return html`<form class="load" onSubmit=${submit} aria-label=${expert ? `Swap ${expert.name}` : "Load an expert"}>
    ${!expert && html`<h3>Load an expert</h3>`}
    <div class="fields">
      ${!expert && field(name, "name", "Name", "Letters, digits, _ and -.", { required: true })}
      ${field(tuned, "tuned", "Tuned", "A folder under the server's --expert-root, a hub id where it allows them, or a source object as JSON.", { required: true })}
      ${field(untuned, "untuned", "Untuned", "The model that it was tuned from, also by the name of a loaded one's folder; empty for none.")}
    </div>
    <label class="check">
      <input type="checkbox" checked=${guarded.value} onChange=${(event) => (guarded.value = event.target.checked)} />
      Protected: only administrators may weigh against it
    </label>
    <div class="row"><button type="submit" class="main">${expert ? `Swap ${expert.name}` : "Load"}</button></div>
    ${problem.value && html`<p class="notice bad" role="alert">${problem.value}</p>`}
  </form>`;
}

/** A path as it is, an object as JSON. */
function sourceOf(text) {
  const trimmed = text.trim();
  if (!trimmed.startsWith("{")) return trimmed;
  try {
    return JSON.parse(trimmed);
  } catch {
    return trimmed; // the server says what is wrong with it
  }
}

function textOf(source) {
  if (!source) return "";
  return source.path && Object.keys(source).length === 1 ? source.path : JSON.stringify(source);
}
