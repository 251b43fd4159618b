// What each model thought of the token that is looked at: beside it where there is room, at the foot of a small screen.
import { html, useLayoutEffect, useRef } from "../lib.js";
import { answers } from "../core/play.js";
import { focused } from "../core/focus.js";
import { inWords, percent, pushOf, signed, visible } from "../core/scale.js";

export function TokenCard() {
  const card = useRef(null);
  const at = focused.value;
  const answer = at && answers[at.side];
  const token = answer && (answer.version.value, answer.tokens[at.index]);
  useLayoutEffect(() => {
    if (token) place(card.current, at);
  });
  if (!token) return html`<div ref=${card} class="card" hidden></div>`;
  return html`<div
    ref=${card}
    class=${at.held ? "card held" : "card"}
    role="region"
    aria-label="Token"
    data-side=${at.side}
    data-index=${at.index}
  >
    <p class="unseen" aria-live=${at.held ? "polite" : "off"}>${inOneLine(token)}</p>
    <div class="head">
      <code class="name">${token.text ? visible(token.text) : visible(token.said?.token ?? "")}</code>
      <span class="hint">token ${at.index + 1} of ${answer.tokens.length}${token.id === undefined ? "" : `, id ${token.id}`}</span>
      ${at.held &&
      html`<button type="button" class="quiet close" aria-label="Close" onClick=${() => (focused.value = null)}>✕</button>`}
    </div>
    ${token.said
      ? html`<${Explained} said=${token.said} />`
      : html`<p class="hint">Nothing is known of this token: it is the first, or the key may not ask for explanations.</p>`}
  </div>`;
}

function inOneLine({ text, said }) {
  if (!said) return `${visible(text)}: not explained.`;
  const flip = said.flip ? ` Flip: the base would have chosen ${visible(said.lanes.base.top[0].token)}.` : "";
  return `${visible(text || said.token)}: ${inWords(pushOf(said))}${flip}`;
}

function Explained({ said }) {
  const push = pushOf(said);
  // The fused law first, then base, tuned and untuned as the server lists them.
  const laws = [["fused", said.fused], ...Object.entries(said.lanes)];
  return html`
    <p class="verdict">
      ${inWords(push)} ${push !== null && html`<span class="num">${signed(push)} nats</span>`}
      ${said.flip && html`<strong class="flipped">Flip: the base would have chosen <code>${visible(said.lanes.base.top[0].token)}</code>.</strong>`}
      ${said.gated && html`<span> The base was sure and decided alone.</span>`}
    </p>
    <div class="laws">
      ${laws.map(([name, law]) => html`<${Law} key=${name} name=${name} law=${law} id=${said.token_id} />`)}
    </div>
    <${Pushes} said=${said} />
  `;
}

function Law({ name, law, id }) {
  const listed = law.top.some((each) => each.token_id === id);
  const rows = listed ? law.top : [...law.top, { token: null, token_id: id, logprob: law.logprob }];
  return html`<table class="law">
    <caption>${name}</caption>
    <tbody>
      ${rows.map(
        (row) => html`<tr class=${row.token_id === id ? "chosen" : ""}>
          <th scope="row">${row.token === null ? html`<i>chosen</i>` : html`<code>${visible(row.token)}</code>`}</th>
          <td><meter min="0" max="1" value=${Math.exp(row.logprob)} aria-hidden="true"></meter></td>
          <td class="num">${percent(row.logprob)}</td>
        </tr>`,
      )}
    </tbody>
  </table>`;
}

/** Which expert pushed how far. */
function Pushes({ said }) {
  const experts = Object.entries(said.weights);
  return html`<dl class="pushes">
    ${experts.map(
      ([name, weight]) => html`<div>
        <dt>${name}</dt>
        <dd>
          weight <span class="num">${weight.toFixed(2)}</span>, pushed <span class="num">${signed(said.push[name] ?? 0)}</span> nats
        </dd>
      </div>`,
    )}
    ${said.kl !== null && html`<div><dt>KL(fused ‖ base)</dt><dd><span class="num">${said.kl.toFixed(3)}</span> nats</dd></div>`}
  </dl>`;
}

/** Below the token, or above it where there is more room. Small screens have a place for it in the styles. */
function place(card, { side, index }) {
  const token = document.querySelector(`.pane[data-side="${side}"] .tokens`)?.children[index];
  if (!token) return;
  const rect = token.getBoundingClientRect();
  if (matchMedia("(max-width: 700px)").matches) {
    card.style.cssText = "";
    const hidden = rect.bottom + 12 - card.getBoundingClientRect().top;
    if (hidden > 0) scrollBy({ top: hidden });
    return;
  }
  const { offsetWidth: width, offsetHeight: height } = card;
  const left = Math.max(8, Math.min(innerWidth - width - 8, rect.left - 24));
  const below = rect.bottom + 8;
  const top = below + height < innerHeight ? below : Math.max(8, rect.top - height - 8);
  card.style.left = `${left}px`;
  card.style.top = `${top}px`;
}
