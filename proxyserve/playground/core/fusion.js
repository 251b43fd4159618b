// From what is set for a side to the `model` and `fusion` of a request.
import { schema, settings } from "./server.js";

export function ruleOf(side) {
  return schema.value.rules.find((rule) => rule.name === side.model) ?? null;
}

/** The expert of a rule that takes one: the chosen one, or else the first. */
export function onlyExpert(side) {
  const names = settings.value.experts.map((expert) => expert.name);
  if (names.includes(side.only)) return side.only;
  return names.find((name) => side.weights[name]) ?? names[0] ?? null;
}

/** What a rule that cannot go without a parameter begins with. */
export function starters(rule) {
  const [first] = settings.value.experts.filter((expert) => expert.untuned);
  if (!first) return {};
  if (rule === "mixture") return { models: { base: 0.5, [`${first.name}.tuned`]: 0.5 } };
  if (rule === "formula") return { formula: `base + 1.0*${first.name}` };
  return {};
}

/** `{model, fusion}`; `fusion` is null where the model's name says everything. */
export function fusionOf(side) {
  const base = settings.value.base;
  if (side.model.startsWith("preset:")) return { model: side.model.slice(7), fusion: null };
  const rule = ruleOf(side);
  if (!rule) return { model: base, fusion: null };
  const fusion = { rule: rule.name, ...expertsOf(rule, side), ...tidy(side.params[rule.name]), ...tidy(side.beside) };
  const says = rule.name !== "proxy" || fusion.experts || Object.keys(fusion).length > 1;
  return { model: base, fusion: says ? fusion : null };
}

function expertsOf(rule, side) {
  if (rule.experts === "none") return {};
  if (rule.experts === "one") {
    const name = onlyExpert(side);
    return name ? { experts: { [name]: 1 } } : {};
  }
  const experts = Object.fromEntries(Object.entries(side.weights).filter(([, weight]) => weight !== 0));
  return Object.keys(experts).length ? { experts } : {};
}

/** Without what was left empty, in groups as well. */
function tidy(values) {
  const kept = {};
  for (const [name, value] of Object.entries(values ?? {})) {
    const inner = value && typeof value === "object" && !Array.isArray(value) ? tidy(value) : value;
    const empty = inner === undefined || inner === null || inner === "";
    if (!empty && !(typeof inner === "object" && !Object.keys(inner).length)) kept[name] = inner;
  }
  return kept;
}

/** A few words for headings. */
export function titleOf(side) {
  const { model, fusion } = fusionOf(side);
  if (!fusion) return model;
  const experts = Object.entries(fusion.experts ?? {}).map(([name, weight]) =>
    ruleOf(side).experts === "one" ? name : `${name} ${weight}`,
  );
  return [fusion.rule, ...experts].join(" · ");
}
