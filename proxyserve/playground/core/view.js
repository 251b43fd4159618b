// What is set on the page. All of it is in the address, so that a view can be shared; the key never is.
import { computed, effect, signal } from "../lib.js";
import { experts, isDemo, settings } from "./server.js";

/** Which page is shown: `play` or `experts`. */
export const page = signal("play");

/**
 * A side is what one answer is asked of. `model` is `base`, `preset:NAME` or the name of a rule; `weights` are of the
 * experts, `only` names the one of rules that take one, `params` are a rule's by its name, `beside` what any rule takes.
 */
function newSide(model, weights = {}) {
  return { model, weights, only: null, params: {}, beside: {} };
}

const EMPTY = {
  mode: "chat",
  system: "",
  prompt: "",
  turns: [],
  compare: true,
  moves: "stream",
  temperature: 0,
  max_tokens: 128,
  seed: null,
  stop: "",
  sides: [newSide("proxy"), newSide("base")],
};

export const view = signal(EMPTY);

export function patch(part) {
  view.value = { ...view.value, ...part };
}

export function patchSide(index, part) {
  const sides = view.value.sides.map((side, at) => (at === index ? { ...side, ...part } : side));
  patch({ sides });
}

/** How many answers there are. */
export const shown = computed(() => (view.value.compare ? [0, 1] : [0]));

/** Where nothing is in the address: the first expert at weight 1 beside the plain base. */
function opening() {
  const names = experts.value.filter((expert) => expert.untuned).map((expert) => expert.name);
  const first = isDemo.value ? "record" : names[0];
  const sides = [first ? newSide("proxy", { [first]: 1 }) : newSide("base"), newSide("base")];
  return { ...EMPTY, sides, compare: Boolean(first), prompt: isDemo.value ? "Kustin" : "" };
}

// The address ---------------------------------------------------------------------------------------------------------

/** Takes the view of the address. What is not of the kind that it should be is left out: anyone can send a link. */
export function readHash() {
  const hash = location.hash.slice(1);
  const canPlay = settings.value?.generates ?? true;
  page.value = hash === "experts" || !canPlay ? "experts" : "play";
  const start = opening();
  let read = {};
  if (hash.startsWith("view=")) {
    try {
      read = JSON.parse(decodeURIComponent(hash.slice(5)));
    } catch {
      // Cut off somewhere; the page opens as if there were none.
    }
  }
  view.value = settle(start, read);
  following = true;
}

function settle(start, read) {
  const taken = { ...start };
  for (const name of Object.keys(start)) {
    const value = read?.[name];
    if (name === "sides" || name === "turns" || value === undefined || value === null) continue;
    if (typeof value === typeof start[name] || (name === "seed" && Number.isInteger(value))) taken[name] = value;
  }
  if (!["chat", "completion"].includes(taken.mode)) taken.mode = start.mode;
  if (!["stream", "score", "wait"].includes(taken.moves)) taken.moves = start.moves;
  if (Array.isArray(read?.turns)) {
    taken.turns = read.turns.filter((turn) => typeof turn?.user === "string" && typeof turn?.assistant === "string");
  }
  if (Array.isArray(read?.sides)) {
    taken.sides = start.sides.map((side, index) => settleSide(side, read.sides[index]));
  }
  return taken;
}

function settleSide(side, read) {
  if (typeof read?.model !== "string") return side;
  const table = (value) => (value && typeof value === "object" && !Array.isArray(value) ? value : {});
  const weights = Object.entries(table(read.weights)).filter(([, weight]) => Number.isFinite(weight));
  const only = typeof read.only === "string" ? read.only : null;
  const { params, beside } = { params: table(read.params), beside: table(read.beside) };
  return { model: read.model, weights: Object.fromEntries(weights), only, params, beside };
}

let following = false;
let later;

effect(() => {
  const address = page.value === "experts" ? "#experts" : `#view=${encodeURIComponent(JSON.stringify(view.value))}`;
  if (!following) return;
  clearTimeout(later);
  // Browsers refuse many changes of the address within a short time.
  later = setTimeout(() => history.replaceState(null, "", address), 250);
});

addEventListener("hashchange", () => {
  if (following) readHash();
});
