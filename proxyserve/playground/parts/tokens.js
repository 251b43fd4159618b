// The text of an answer, token by token. Preact makes the frame; the tokens are appended to it by hand, a frame's worth at
// a time, so that the thousandth costs what the first did.
import { effect, html, useEffect, useId, useRef } from "../lib.js";
import { focused } from "../core/focus.js";
import { pushOf, stepOf } from "../core/scale.js";

const CLASSES = { "-3": "n3", "-2": "n2", "-1": "n1", 0: "z", 1: "p1", 2: "p2", 3: "p3" };

export function Tokens({ index, answer }) {
  const box = useRef(null);
  const hint = useId();
  useEffect(() => follow(box.current, answer), [answer]);
  useEffect(() => mark(box.current, index), [index]);
  const point = (event) => {
    const at = indexOf(event.target);
    if (at !== null && !focused.value?.held) focused.value = { side: index, index: at, held: false };
  };
  const leave = () => {
    if (focused.value && !focused.value.held) focused.value = null;
  };
  const hold = (event) => {
    const at = indexOf(event.target);
    const same = focused.value?.held && focused.value.side === index && focused.value.index === at;
    focused.value = at === null || same ? null : { side: index, index: at, held: true };
  };
  return html`<div
      ref=${box}
      class="tokens"
      role="group"
      tabindex="0"
      aria-label=${`Text of answer ${"AB"[index]}`}
      aria-describedby=${hint}
      onPointerOver=${point}
      onPointerLeave=${leave}
      onClick=${hold}
      onKeyDown=${(event) => move(event, box.current, index)}
    ></div>
    <span id=${hint} class="unseen">Arrow keys move between tokens and show what each model thought of them.</span>`;
}

function indexOf(element) {
  const at = element.dataset?.at;
  return at === undefined ? null : Number(at);
}

/** Keeps the box showing the answer; returns what ends it. */
function follow(box, answer) {
  let epoch = -1;
  let drawn = 0;
  return effect(() => {
    answer.version.value; // what this waits for
    const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    const { tokens } = answer;
    if (answer.epoch !== epoch) {
      epoch = answer.epoch;
      // The same text under another law keeps its elements, and with them selection and place.
      const same = drawn === tokens.length && drawn > 0 && box.textContent === answer.text;
      if (same) for (let at = 0; at < drawn; at += 1) paint(box.children[at], tokens[at], at);
      else {
        box.replaceChildren();
        drawn = 0;
      }
    }
    const fresh = document.createDocumentFragment();
    for (; drawn < tokens.length; drawn += 1) {
      fresh.append(paint(document.createElement("span"), tokens[drawn], drawn));
    }
    if (fresh.childNodes.length) {
      box.append(fresh);
      if (atEnd) box.scrollTop = box.scrollHeight;
    }
  });
}

function paint(span, token, at) {
  const { said, text } = token;
  if (span.textContent !== text) span.textContent = text;
  span.dataset.at = at;
  const classes = ["t", CLASSES[stepOf(pushOf(said))]];
  if (said?.flip) classes.push("flip");
  if (!text) classes.push("end");
  if (/^\s*\n\s*$/.test(text)) classes.push("newline");
  span.className = classes.join(" ");
  return span;
}

/** Rings the token that is looked at. */
function mark(box, side) {
  let ringed = null;
  return effect(() => {
    const at = focused.value?.side === side ? focused.value.index : null;
    ringed?.classList.remove("looked");
    ringed = at === null ? null : (box.children[at] ?? null);
    ringed?.classList.add("looked");
  });
}

function move(event, box, side) {
  const last = box.children.length - 1;
  if (last < 0) return;
  const now = focused.value?.side === side ? focused.value.index : null;
  const to = {
    ArrowRight: () => (now === null ? 0 : Math.min(last, now + 1)),
    ArrowLeft: () => (now === null ? last : Math.max(0, now - 1)),
    ArrowDown: () => (now === null ? 0 : inLine(box, now, 1)),
    ArrowUp: () => (now === null ? last : inLine(box, now, -1)),
    Home: () => 0,
    End: () => last,
  }[event.key];
  if (!to || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const index = to();
  box.children[index].scrollIntoView({ block: "nearest" });
  focused.value = { side, index, held: true };
}

/** The token above or below, or the same one where there is no such line. */
function inLine(box, now, way) {
  const from = box.children[now].getBoundingClientRect();
  let best = now;
  let line = null;
  for (let at = now + way; at >= 0 && at < box.children.length; at += way) {
    const rect = box.children[at].getBoundingClientRect();
    if (Math.abs(rect.top - from.top) < 4) continue;
    line ??= rect.top;
    if (Math.abs(rect.top - line) > 4) break;
    const nearer = best === now || Math.abs(rect.left - from.left) < Math.abs(box.children[best].getBoundingClientRect().left - from.left);
    if (nearer) best = at;
  }
  return best;
}
