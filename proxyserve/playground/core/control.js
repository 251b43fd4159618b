// The control plane: experts that come and go.
import { signal } from "../lib.js";
import { ApiError, call } from "./api.js";
import { refresh } from "./server.js";

/** Milliseconds between looks at a change that is under way, and at all experts otherwise. */
const PACE = 200;
export const CALM_PACE = 5000;

/** Phases of a generation on its way, in order. */
export const STEPS = ["loading", "verifying", "warming", "published"];

export const list = signal(null);
export const listError = signal("");
/** By expert: `{what, generation, phase, progress, error, done}` of the last change made here. */
export const changes = signal({});

export async function load() {
  try {
    list.value = (await call("GET", "admin/v1/experts")).data;
    listError.value = "";
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    listError.value = error.message;
  }
}

function report(name, part) {
  changes.value = { ...changes.value, [name]: { ...changes.value[name], ...part } };
}

/** `body` as `PUT /admin/v1/experts/{name}` takes it. */
export function publish(name, body) {
  return make(name, "swap", () => call("PUT", pathOf(name), body));
}

export function rollback(name) {
  return make(name, "rollback", () => call("POST", `${pathOf(name)}/rollback`));
}

export function unload(name) {
  return make(name, "unload", () => call("DELETE", pathOf(name)));
}

function pathOf(name) {
  return `admin/v1/experts/${encodeURIComponent(name)}`;
}

/** Begins a change and follows it to its end. Returns whether it succeeded. */
async function make(name, what, begin) {
  report(name, { what, generation: null, phase: null, progress: null, error: "", done: false });
  try {
    const { generation } = await begin();
    report(name, { generation });
    await followed(name, what, generation);
    report(name, { done: true });
    return true;
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    const unnamed = error.param && !error.message.includes(`'${error.param}'`);
    report(name, { error: unnamed ? `${error.param}: ${error.message}` : error.message, done: true });
    return false;
  } finally {
    await load();
    await refresh().catch(() => {}); // the panel says itself when the server is gone
  }
}

async function followed(name, what, generation) {
  for (;;) {
    const status = await look(name);
    if (status === null && what === "unload") return;
    if (status === null) throw new ApiError(`Expert '${name}' is gone: somebody has unloaded it.`);
    list.value = list.value?.map((expert) => (expert.name === name ? status : expert)) ?? null;
    const own = status.generations.find((each) => each.generation === generation);
    report(name, { phase: own?.phase ?? null, progress: own?.progress ?? null });
    if (own?.phase === "failed" || own?.error) throw new ApiError(failure(status, own));
    if (what !== "unload" && (status.generation === generation || !own)) return;
    await new Promise((resolve) => setTimeout(resolve, PACE));
  }
}

function failure(status, own) {
  const serving = status.generation === null ? "No generation serves." : `Generation ${status.generation} goes on serving.`;
  return `Generation ${own.generation} failed: ${own.error}. ${serving}`.replace("..", ".");
}

async function look(name) {
  try {
    return await call("GET", pathOf(name));
  } catch (error) {
    if (error.status === 404) return null;
    throw error;
  }
}
