// What the server offers this key: models, limits, and fusion rules.
import { computed, signal } from "../lib.js";
import { ApiError, call } from "./api.js";
import { readRules } from "./schema.js";

/** `starting`, `ready`, `key` (one is wanted) or `failed`. */
export const phase = signal("starting");
export const problem = signal("");
/** The answer of /playground/settings. */
export const settings = signal(null);
/** `{rules, beside}` of core/schema.js. */
export const schema = signal(null);

/** Reads all that, again after a key was given. */
export async function connect() {
  problem.value = "";
  try {
    const offered = await call("GET", "playground/settings");
    schema.value = readRules(offered.fusion);
    settings.value = offered;
    phase.value = "ready";
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    problem.value = error.message;
    phase.value = error.status === 401 || error.status === 403 ? "key" : "failed";
  }
}

/** After experts or presets have changed. */
export async function refresh() {
  settings.value = await call("GET", "playground/settings");
}

export const experts = computed(() => settings.value?.experts ?? []);

/** The family of small models that `proxyserve demo` serves, known by its names: only it has answers to its examples. */
export const isDemo = computed(
  () =>
    settings.value?.base === "atlas" &&
    ["bio", "guard", "qa", "record"].every((name) => experts.value.some((expert) => expert.name === name)),
);
