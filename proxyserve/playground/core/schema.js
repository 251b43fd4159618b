// Reads the fusion rules and their parameters out of the JSON schema of the fusion object, as the OpenAPI document has it,
// so that a new rule or parameter has its form here without anybody writing one.

/** Not set in forms: `rule` and `experts` have controls of their own, `explain` is the page's, the last has one value. */
const ELSEWHERE = new Set(["rule", "experts", "explain", "on_expert_failure"]);

/**
 * `rules`: `[{name, description, experts: "many" | "one" | "none", fields}]`, and `beside`: the fields that stand beside
 * every rule. A field is `{name, label, description, kind, fallback, ...}` with what its kind needs (`fieldOf`).
 */
export function readRules(document) {
  const resolve = (schema) => (schema.$ref ? document.$defs[schema.$ref.split("/").at(-1)] : schema);
  const bodies = (document.oneOf ?? document.anyOf).map(resolve);
  const names = bodies.map((body) => new Set(Object.keys(body.properties)));
  const common = [...names[0]].filter((name) => names.every((each) => each.has(name)) && !ELSEWHERE.has(name));
  const rules = bodies.map((body) => ({
    name: constantOf(body.properties.rule, resolve),
    description: firstParagraph(body.description ?? ""),
    experts: expertsOf(body.properties.experts),
    fields: Object.entries(body.properties)
      .filter(([name]) => !ELSEWHERE.has(name) && !common.includes(name))
      .map(([name, schema]) => fieldOf(name, schema, resolve)),
  }));
  rules.sort((a, b) => (b.name === "proxy") - (a.name === "proxy") || a.name.localeCompare(b.name));
  const beside = common.map((name) => fieldOf(name, bodies[0].properties[name], resolve));
  return { rules, beside };
}

function constantOf(schema, resolve) {
  return withoutNull(schema, resolve).const;
}

function expertsOf(schema) {
  if (!schema) return "none";
  return /^exactly one\b/i.test(schema.description ?? "") ? "one" : "many";
}

function firstParagraph(text) {
  return text.split("\n\n")[0].replaceAll("\n", " ").replace(/:$/, ".");
}

/** The schema of what may be given; null means left out everywhere. */
function withoutNull(schema, resolve) {
  const options = (schema.anyOf ?? []).filter((option) => option.type !== "null");
  return options.length === 1 ? { ...resolve(options[0]), description: schema.description } : resolve(schema);
}

/**
 * Kinds: `choice` (`options`), `number` (`min`, `max`, `whole`), `mixed` (a number, or one of `options`), `text`, `list` (of
 * texts), `pairs` (names and numbers), `group` (`fields`), and `json` for all that is none of these.
 */
export function fieldOf(name, outer, resolve) {
  const schema = withoutNull(outer, resolve);
  const field = {
    name,
    label: name.replaceAll("_", " "),
    description: outer.description ?? schema.description ?? "",
    fallback: outer.default,
  };
  const options = (schema.anyOf ?? [schema]).map(resolve);
  const number = options.find((option) => option.type === "number" || option.type === "integer");
  const words = options.find((option) => option.enum);
  if (number && words) return { ...field, kind: "mixed", options: words.enum };
  if (words) return { ...field, kind: "choice", options: words.enum };
  if (number) {
    const { minimum, exclusiveMinimum, maximum } = number;
    const whole = number.type === "integer";
    return { ...field, kind: "number", min: minimum ?? exclusiveMinimum, max: maximum, whole };
  }
  if (options.some((option) => option.type === "string")) return { ...field, kind: "text" };
  if (schema.type === "array" && resolve(schema.items).type === "string") return { ...field, kind: "list" };
  if (schema.type === "object" && schema.properties) {
    const fields = Object.entries(schema.properties).map(([inner, part]) => fieldOf(inner, part, resolve));
    return { ...field, kind: "group", fields };
  }
  if (schema.type === "object" && schema.additionalProperties?.type === "number") return { ...field, kind: "pairs" };
  return { ...field, kind: "json" };
}
