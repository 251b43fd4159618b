// What one answer is asked of: the base, a preset, or a rule with its experts and parameters.
import { html, useId } from "../lib.js";
import { change } from "../core/play.js";
import { onlyExpert, ruleOf, starters } from "../core/fusion.js";
import { schema, settings } from "../core/server.js";
import { shown, view } from "../core/view.js";
import { Fields } from "./fields.js";
import { Weight } from "./weight.js";

export function Side({ index }) {
  const side = view.value.sides[index];
  const rule = ruleOf(side);
  const { base, presets, experts } = settings.value;
  const id = useId();
  const name = shown.value.length > 1 ? `Answer ${"AB"[index]}` : "Answer";
  const choose = (model) => {
    const params = { ...side.params };
    params[model] ??= starters(model);
    change(index, { model, params });
  };
  const known = rule || side.model === "base" || (side.model.startsWith("preset:") && presets.includes(side.model.slice(7)));
  return html`<section class="side" aria-labelledby=${`${id}-title`}>
    <h2 id=${`${id}-title`}>${name}</h2>
    <label for=${id} class="unseen">Model of ${name}</label>
    <select id=${id} value=${side.model} onChange=${(event) => choose(event.target.value)}>
      <optgroup label="Without experts"><option value="base">${base} alone</option></optgroup>
      ${presets.length > 0 &&
      html`<optgroup label="Presets">
        ${presets.map((preset) => html`<option value=${`preset:${preset}`}>${preset}</option>`)}
      </optgroup>`}
      <optgroup label="Rules">
        ${schema.value.rules.map(({ name }) => html`<option value=${name}>${name}</option>`)}
      </optgroup>
      ${!known && html`<option value=${side.model}>${side.model} (not here)</option>`}
    </select>
    <p class="hint formula">${rule ? marked(rule.description) : side.model === "base" ? "No expert is run." : "A saved fusion."}</p>
    ${rule?.experts === "many" &&
    html`<div class="weights">
      ${experts.map((expert) => html`<${Weight} key=${expert.name} index=${index} expert=${expert} />`)}
      ${strangers(side, experts).map(
        (name) => html`<${Weight} key=${name} index=${index} expert=${{ name, untuned: true, gone: true }} />`,
      )}
      ${!experts.length && html`<p class="hint">There is no expert that this key may use.</p>`}
    </div>`}
    ${rule?.experts === "one" && html`<${OneExpert} index=${index} side=${side} experts=${experts} />`}
    ${rule &&
    html`<${Fields}
      fields=${rule.fields}
      values=${side.params[rule.name] ?? {}}
      onChange=${(values) => change(index, { params: { ...side.params, [rule.name]: values } })}
    />`}
    ${rule &&
    html`<details class="more">
      <summary>Beside the rule</summary>
      <${Fields}
        fields=${schema.value.beside}
        values=${side.beside}
        onChange=${(beside) => change(index, { beside })}
      />
    </details>`}
  </section>`;
}

/** What stands between backticks is a formula. */
function marked(text) {
  return text.split("`").map((part, at) => (at % 2 ? html`<code>${part}</code>` : part));
}

/** Experts that a shared address names and this server does not have; they can be seen and set to 0. */
function strangers(side, experts) {
  const here = new Set(experts.map((expert) => expert.name));
  return Object.keys(side.weights).filter((name) => side.weights[name] !== 0 && !here.has(name));
}

function OneExpert({ index, side, experts }) {
  const id = useId();
  return html`<div class="field">
    <label for=${id}>expert</label>
    <select id=${id} value=${onlyExpert(side)} onChange=${(event) => change(index, { only: event.target.value })}>
      ${experts.map((expert) => html`<option value=${expert.name}>${expert.name}</option>`)}
    </select>
  </div>`;
}
