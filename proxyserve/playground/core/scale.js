// How far a token was pushed, as one of seven steps, and numbers as people read them.

/** Nats from which a step begins: 1.1, 2 and 10 times as likely. */
const STEPS = [0.1, Math.LN2, Math.log(10)];

/** log fused - log base of the token, in nats; null where the base took no part. */
export function pushOf(said) {
  const base = said?.lanes.base;
  return base ? said.fused.logprob - base.logprob : null;
}

/** `-3` .. `3`; 0 where it was hardly pushed, or nothing is known. */
export function stepOf(push) {
  if (push === null) return 0;
  const size = STEPS.filter((edge) => Math.abs(push) >= edge).length;
  return push < 0 ? -size : size;
}

/** "22 times likelier than under the base". */
export function inWords(push) {
  if (push === null) return "The base took no part.";
  const ratio = Math.exp(Math.abs(push));
  if (ratio < 1.05) return "As likely as under the base.";
  const times = ratio >= 1000 ? "over 1,000" : ratio >= 10 ? ratio.toFixed(0) : ratio.toFixed(1);
  return `${times} times ${push > 0 ? "likelier" : "less likely"} than under the base.`;
}

export function percent(logprob) {
  const share = Math.exp(logprob) * 100;
  if (share >= 99.95) return "100 %";
  if (share >= 10) return `${share.toFixed(1)} %`;
  return share >= 0.01 ? `${share.toFixed(2)} %` : "< 0.01 %";
}

export function signed(value) {
  return `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;
}

/** A token's text where it stands alone: spaces and line ends can be seen. */
export function visible(text) {
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ | $/g, "␣") || "∅";
}

export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB"];
  const unit = count ? Math.min(3, Math.floor(Math.log2(count) / 10)) : 0;
  return `${(count / 2 ** (10 * unit)).toFixed(unit ? 1 : 0)} ${units[unit]}`;
}
