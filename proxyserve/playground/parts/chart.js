// KL and weights along the text. The line that follows the pointer is at the token that is looked at, both ways.
import { UPlot, effect, html, useEffect, useRef } from "../lib.js";
import { focused } from "../core/focus.js";
import { theme } from "./theme_button.js";

const HEIGHT = 132;
/** Milliseconds between two drawings while tokens come: each draws all of them. */
const PACE = 200;
const MOST_EXPERTS = 4;

export function Chart({ index, answer }) {
  const box = useRef(null);
  useEffect(() => keep(box.current, answer, index), [answer, index]);
  return html`<figure class="chart">
    <figcaption>
      <span><i class="line kl"></i>KL(fused ‖ base), nats</span>
      ${expertsOf(answer).map((name, at) => html`<span><i class=${`line w${at}`}></i>weight of ${name}</span>`)}
    </figcaption>
    <div class="plot" ref=${box} role="img" aria-label=${summary(answer)}></div>
  </figure>`;
}

/** Of the tokens so far; experts do not change within an answer. */
function expertsOf(answer) {
  answer.version.value;
  const first = answer.tokens.find((token) => token.said);
  return Object.keys(first?.said.weights ?? {}).slice(0, MOST_EXPERTS);
}

function summary(answer) {
  const kl = answer.stats.value?.fusion?.mean_kl;
  return typeof kl === "number" ? `Chart along the text; the mean KL is ${kl.toFixed(2)} nats.` : "Chart along the text, empty.";
}

function keep(box, answer, side) {
  let plot = null;
  let names = "";
  let pending = 0;
  const draw = () => {
    pending = 0;
    const experts = expertsOf(answer);
    const data = dataOf(answer.tokens, experts);
    if (plot && names === experts.join()) plot.setData(data);
    else {
      plot?.destroy();
      names = experts.join();
      plot = new UPlot(options(box, experts, side), data, box);
    }
    look(plot, side);
  };
  const rebuild = () => {
    names = null;
    draw();
  };
  const stops = [
    effect(() => {
      answer.version.value;
      if (!pending) pending = setTimeout(draw, answer.tokens.length > 40 ? PACE : 0);
    }),
    effect(() => {
      theme.value;
      pending ||= setTimeout(rebuild, 0);
    }),
    effect(() => {
      focused.value;
      if (plot) look(plot, side);
    }),
  ];
  const system = matchMedia("(prefers-color-scheme: dark)");
  system.addEventListener("change", rebuild);
  const sizes = new ResizeObserver(() => plot?.setSize({ width: box.clientWidth, height: HEIGHT }));
  sizes.observe(box);
  return () => {
    stops.forEach((stop) => stop());
    clearTimeout(pending);
    system.removeEventListener("change", rebuild);
    sizes.disconnect();
    plot?.destroy();
  };
}

function dataOf(tokens, experts) {
  const lines = experts.map((name) => tokens.map((token) => token.said?.weights[name] ?? null));
  return [tokens.map((_, at) => at), tokens.map((token) => token.said?.kl ?? null), ...lines];
}

/** Puts the line at the token that is looked at, or takes it away. */
function look(plot, side) {
  const at = focused.value?.side === side ? focused.value.index : null;
  if (at === plot.cursor.idx) return;
  const left = at === null ? -10 : plot.valToPos(at, "x");
  plot.setCursor({ left, top: at === null ? -10 : 1 }, false);
}

function options(box, experts, side) {
  const colour = (name) => {
    box.style.color = `var(--${name})`;
    return getComputedStyle(box).color;
  };
  const [text, faint, kl, ...weights] = ["chart-text", "chart-grid", "chart-kl", ...experts.map((_, at) => `chart-w${at}`)].map(colour);
  box.style.color = "";
  const axis = { stroke: text, grid: { stroke: faint, width: 1 }, ticks: { stroke: faint, width: 1 }, font: "11px system-ui" };
  const few = { points: { size: 4 } };
  return {
    width: Math.max(1, box.clientWidth),
    height: HEIGHT,
    legend: { show: false },
    padding: [8, 10, 0, 4],
    cursor: { y: false, drag: { x: false, y: false }, points: { size: 6 } },
    scales: {
      x: { time: false, range: (_, low, high) => [0, Math.max(1, high ?? 1)] },
      y: { range: (_, low, high) => [0, Math.max(0.5, (high ?? 0) * 1.1)] },
      w: { range: (_, low, high) => [Math.min(0, low ?? 0), Math.max(1, (high ?? 0) * 1.1)] },
    },
    series: [
      {},
      { stroke: kl, fill: kl.replace("rgb(", "rgba(").replace(")", ", 0.15)"), width: 1.5, ...few },
      ...weights.map((stroke) => ({ scale: "w", stroke, width: 1.5, dash: [6, 3], ...few })),
    ],
    axes: [
      { ...axis, size: 24, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? tick + 1 : "")) },
      { ...axis, size: 36 },
      { ...axis, scale: "w", side: 1, size: 32, grid: { show: false }, show: experts.length > 0 },
    ],
    hooks: {
      setCursor: [
        (plot) => {
          // Only what the pointer does here: what `look` sets came from elsewhere.
          if (!plot.over.matches(":hover") || focused.value?.held) return;
          const at = plot.cursor.idx;
          if (at === null || at === undefined) focused.value = null;
          else if (focused.value?.index !== at || focused.value.side !== side) focused.value = { side, index: at, held: false };
        },
      ],
    },
  };
}
