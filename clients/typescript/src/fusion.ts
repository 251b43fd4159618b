/** Builders of the `fusion` object of a request, one per rule. The server's docs say when to use which. */
import type { components } from "./openapi.js";

type Schemas = components["schemas"];
type Prompt = Schemas["LanePromptObject"] | "chat" | "plain";

/** A number, or a number times the factors of a schedule: pairs of a generated token's number and a factor. */
export type Weight = number | { weight?: number; schedule?: [token: number, factor: number][] };
/** Weights by the names of experts. */
export type Weights = { [expert: string]: Weight };

/** What may stand beside the parameters of any rule. */
export type Beside = {
  /** Keep only tokens that are plausible under the named laws. */
  support?: Schemas["SupportObject"];
  /** Nats: the temperature is solved at each position. */
  target_entropy?: number;
  /** Let the base decide alone where it is this sure. */
  gate?: Schemas["GateObject"];
  /** Per lane (`base`, `qa.tuned`, ...): `chat`, `plain`, or a prompt of its own. */
  prompts?: { [lane: string]: Prompt };
  /** k > 0: say of each token what every lane thought of it, with its k likeliest tokens. */
  explain?: number;
};

/** A rule's own parameters, none of which has to be given, and what may stand beside them. */
type ParametersOf<Rule extends keyof Schemas> = {
  [Name in Exclude<keyof Schemas[Rule], keyof Schemas["ProxyFusion"]>]?: NonNullable<Schemas[Rule][Name]>;
} & Beside;

/** `base + sum of weight * (tuned - untuned)` */
function proxy(experts: Weights, beside?: Beside): Schemas["ProxyFusion"] {
  return built("proxy", { experts: checked(experts), ...beside });
}

/** `tuned + beta * (base - untuned)` inside the tuned model's nucleus: emulated fine-tuning. */
function upscale(expert: string, parameters?: ParametersOf<"UpscaleFusion">): Schemas["UpscaleFusion"] {
  return built("upscale", { experts: { [expert]: 1 }, ...numbers(parameters) });
}

/** `proxy` with weights that are solved at each position. For several experts their weights are a direction. */
function dynamic(experts: string | { [expert: string]: number }, parameters?: ParametersOf<"DynamicFusion">): Schemas["DynamicFusion"] {
  const direction = typeof experts === "string" ? { [experts]: 1 } : checked(experts);
  return built("dynamic", { experts: direction, ...numbers(parameters) });
}

/** `tuned - gamma * untuned` where the tuned model finds a token plausible: what tuning added. */
function contrast(expert: string, parameters?: ParametersOf<"ContrastFusion">): Schemas["ContrastFusion"] {
  return built("contrast", { experts: { [expert]: 1 }, ...numbers(parameters) });
}

/** `base - alpha * max(0, tuned - base)`: away from what the expert was reinforced on. */
function unlearn(expert: string, parameters?: ParametersOf<"UnlearnFusion">): Schemas["UnlearnFusion"] {
  return built("unlearn", { experts: { [expert]: 1 }, ...numbers(parameters) });
}

type Negative =
  | { negative_prompt: string | number[]; negative_messages?: never }
  | { negative_messages: Schemas["Message"][]; negative_prompt?: never };

/** `negative + scale * (positive - negative)`, both the base: away from a prompt. */
function guidance(parameters: Negative & { scale?: number } & Beside): Schemas["GuidanceFusion"] {
  return built("guidance", numbers(parameters));
}

/** A power mean of the laws of models (`base`, `qa.tuned`, `qa.untuned`), by weights that sum to 1. */
function mixture(models: { [lane: string]: number }, parameters?: { r?: number | "inf" | "-inf" } & Beside): Schemas["MixtureFusion"] {
  return built("mixture", { models: checked(models), ...numbers(parameters) });
}

/** `base + sum of weight * tuned`: small reward models of tokens, without untuned ones. */
function arm(experts: Weights, beside?: Beside): Schemas["ArmFusion"] {
  return built("arm", { experts: checked(experts), ...beside });
}

/** `proxy` at the largest weight that the server's calibration allows within a loss budget. */
function edit(expert: string, parameters?: ParametersOf<"EditFusion">): Schemas["EditFusion"] {
  return built("edit", { experts: { [expert]: 1 }, ...numbers(parameters) });
}

/** Any sum of models as text: `base + 0.8*(qa.tuned - small)`. */
function formula(text: string, beside?: Beside): Schemas["FormulaFusion"] {
  return built("formula", { formula: text, ...beside });
}

/** `fusion.proxy({ qa: 0.8 }, { explain: 3 })`, and the same for every other rule. */
export const fusion = { proxy, upscale, dynamic, contrast, unlearn, guidance, mixture, arm, edit, formula };

/** The plain sum of rule `proxy` as a model's name, `atlas+qa:0.8`, for tools that can set nothing else. */
export function modelName(base: string, experts: { [expert: string]: number }): string {
  const parts = Object.entries(checked(experts)).map(([expert, weight]) => {
    if (/[+:]/.test(expert)) throw new RangeError(`'${expert}' cannot be part of a model name; use fusion.proxy`);
    return `+${expert}:${weight}`;
  });
  return base + parts.join("");
}

type Short<Body> = Omit<Body, "prompts"> & { prompts?: { [lane: string]: Prompt } };

/** The rule beside its parameters. A lane's prompt may be a word, which the server's OpenAPI has in its long form. */
function built<Rule extends string, Body extends Short<object>>(rule: Rule, body: Body) {
  const { prompts, ...rest } = body;
  const long =
    prompts &&
    Object.fromEntries(
      Object.entries(prompts).map(([lane, prompt]) => [
        lane,
        typeof prompt === "string" ? { route: prompt } : prompt,
      ]),
    );
  return { rule, ...rest, ...(long && { prompts: long }) };
}

/** JSON has no infinities and no NaN: they would arrive as null. */
function numbers<Type extends object>(parameters: Type | undefined): Type {
  for (const [name, value] of Object.entries(parameters ?? {})) {
    if (typeof value === "number") finite(name, value);
  }
  return parameters ?? ({} as Type);
}

function checked<Type extends Weights>(weights: Type): Type {
  for (const [name, entry] of Object.entries(weights)) {
    if (name === "") throw new RangeError("the name of an expert or a lane must not be empty");
    if (typeof entry === "number") finite(`the weight of '${name}'`, entry);
    else for (const number of [entry.weight ?? 1, ...(entry.schedule ?? []).flat()]) finite(`'${name}'`, number);
  }
  return weights;
}

function finite(name: string, value: number): void {
  if (!Number.isFinite(value)) throw new RangeError(`${name} must be finite, not ${value}`);
}
