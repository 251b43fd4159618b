// A form for fields that the OpenAPI document describes (core/schema.js).
import { html, useId, useSignal } from "../lib.js";

/** `values` by field name; `onChange` gets all of them anew. */
export function Fields({ fields, values, onChange }) {
  return fields.map(
    (field) => html`<${Field}
      key=${field.name}
      field=${field}
      value=${values[field.name]}
      onChange=${(value) => onChange({ ...values, [field.name]: value })}
    />`,
  );
}

function Field({ field, value, onChange }) {
  const id = useId();
  const problem = useSignal("");
  if (field.kind === "group") {
    return html`<fieldset class="group">
      <legend title=${field.description}>${field.label}</legend>
      <${Fields} fields=${field.fields} values=${value ?? {}} onChange=${onChange} />
    </fieldset>`;
  }
  const commit = (text) => {
    try {
      const read = READ[field.kind](text.trim(), field);
      problem.value = "";
      onChange(read);
    } catch (error) {
      problem.value = error.message;
    }
  };
  const shared = {
    id,
    "aria-describedby": `${id}-hint`,
    "aria-invalid": problem.value ? "true" : undefined,
    onChange: (event) => commit(event.target.value),
  };
  return html`<div class="field">
    <label for=${id}>${field.label}</label>
    ${control(field, value, shared)}
    <p class="hint" id=${`${id}-hint`}>
      ${problem.value ? html`<span class="error" role="alert">${problem.value}</span>` : field.description}
    </p>
  </div>`;
}

function control(field, value, shared) {
  const shownDefault = field.fallback === undefined || field.fallback === null ? "" : String(field.fallback);
  if (field.kind === "choice") {
    return html`<select ...${shared} value=${value ?? ""}>
      <option value="">${shownDefault ? `default (${shownDefault})` : "default"}</option>
      ${field.options.map((option) => html`<option value=${option}>${option}</option>`)}
    </select>`;
  }
  if (field.kind === "number") {
    const { min, max, whole } = field;
    return html`<input ...${shared} type="number" step=${whole ? 1 : "any"} min=${min} max=${max} value=${value ?? ""} placeholder=${shownDefault} />`;
  }
  if (field.kind === "text" || field.kind === "json") {
    const text = field.kind === "json" && value !== undefined ? JSON.stringify(value) : value ?? "";
    return html`<textarea ...${shared} rows="2" spellcheck=${false} value=${text} placeholder=${field.kind === "json" ? "JSON" : shownDefault}></textarea>`;
  }
  const text = field.kind === "pairs" ? pairsText(value) : (value ?? "").toString();
  return html`<input ...${shared} type="text" spellcheck=${false} value=${text} placeholder=${PLACEHOLDERS[field.kind] ?? shownDefault} />`;
}

const PLACEHOLDERS = { pairs: "base=0.5, qa.tuned=0.5", list: "base, tuned" };

/** From what was typed to a value; an empty text is undefined. Throws Error with what to write instead. */
const READ = {
  choice: (text) => text || undefined,
  text: (text) => text || undefined,
  number: (text) => (text === "" ? undefined : readNumber(text)),
  mixed: (text, { options }) => (text === "" ? undefined : options.includes(text) ? text : readNumber(text, options)),
  list: (text) => (text ? text.split(",").map((each) => each.trim()).filter(Boolean) : undefined),
  pairs: (text) => (text ? readPairs(text) : undefined),
  json: (text) => {
    if (!text) return undefined;
    try {
      return JSON.parse(text);
    } catch {
      throw new Error("This is not JSON.");
    }
  },
};

function readNumber(text, words = []) {
  const value = Number(text);
  if (Number.isFinite(value)) return value;
  throw new Error(["Write a number", ...words.map((word) => `or “${word}”`)].join(" ") + ".");
}

function readPairs(text) {
  const pairs = text.split(",").map((pair) => pair.split("=").map((part) => part.trim()));
  if (pairs.some(([name, number]) => !name || !number)) throw new Error("Write NAME=NUMBER, separated by commas.");
  return Object.fromEntries(pairs.map(([name, number]) => [name, readNumber(number)]));
}

function pairsText(value) {
  return Object.entries(value ?? {})
    .map(([name, number]) => `${name}=${number}`)
    .join(", ");
}
