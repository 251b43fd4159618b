// What the clock and the server say of an answer.
import { html } from "../lib.js";

export function Stats({ answer }) {
  const stats = answer.stats.value;
  if (!stats) return html`<p class="stats" aria-hidden="true"> </p>`;
  return html`<dl class="stats">
    ${facts(stats).map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}
  </dl>`;
}

function facts({ tokens, first, rate, seconds, usage, fusion, scored }) {
  const found = [];
  if (tokens !== undefined) found.push(["tokens", tokens]);
  if (first !== null && first !== undefined) found.push(["first after", `${Math.round(first * 1000)} ms`]);
  if (rate) found.push(["speed", `${rate.toFixed(0)} tokens/s`]);
  if (seconds !== undefined) found.push(["all in", `${seconds.toFixed(2)} s`]);
  if (scored) found.push(["log p of the text", `${scored.logprob.toFixed(2)} nats`]);
  if (scored) found.push(["perplexity", Math.exp(-scored.logprob / Math.max(1, scored.tokens)).toFixed(2)]);
  const lanes = Object.entries(usage?.lane_tokens ?? {});
  if (lanes.length) found.push(["lane tokens", lanes.map(([name, count]) => `${name} ${count}`).join(", ")]);
  if (!fusion) return found;
  if (fusion.drafted !== undefined && fusion.drafted !== null) {
    found.push(["drafted", `${fusion.drafted}, accepted ${fusion.accepted}`]);
  }
  if (typeof fusion.mean_kl === "number") found.push(["mean KL", `${fusion.mean_kl.toFixed(3)} nats`]);
  if (typeof fusion.flips === "number") found.push(["flips", fusion.flips]);
  const means = Object.entries(fusion.mean_weights ?? {});
  if (means.length) found.push(["mean weight", means.map(([name, mean]) => `${name} ${mean.toFixed(2)}`).join(", ")]);
  const versions = Object.entries(fusion.generations ?? {});
  if (versions.length) found.push(["generation", versions.map(([name, number]) => `${name} ${number}`).join(", ")]);
  return found;
}
