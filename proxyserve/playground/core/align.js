// Which part of the text each token is. The server sends text and explanations of tokens beside each other: text may come
// later (a character is not whole yet, or could be the beginning of a stop string), and some tokens are none of it.

const BROKEN = "\ufffd";

/** Takes tokens and text as they come and gives back tokens with their `text`, in order. */
export class Aligner {
  #tokens = [];
  #text = "";

  /** The tokens whose text is known by now. */
  push(tokens, text) {
    this.#tokens.push(...tokens);
    this.#text += text;
    const placed = [];
    while (this.#tokens.length && this.#place(placed));
    return placed;
  }

  /** The rest: what text is left belongs to the first of them, the others have none (an end of text, a stop string). */
  finish() {
    const placed = this.#tokens.map((token, index) => ({ ...token, text: index ? "" : this.#text }));
    if (!placed.length && this.#text) placed.push({ text: this.#text });
    this.#tokens = [];
    this.#text = "";
    return placed;
  }

  #place(placed) {
    const [token] = this.#tokens;
    const name = token.name;
    if (!this.#text) return false;
    if (name && !name.includes(BROKEN) && this.#text.startsWith(name)) return this.#take(placed, name.length);
    // The first token of a text may lose its leading space.
    const bare = name.trimStart();
    if (bare && !bare.includes(BROKEN) && this.#text.startsWith(bare)) return this.#take(placed, bare.length);
    // Parts of one character: the text up to the next whole token is theirs, and the first of them shows it.
    const next = this.#tokens.findIndex((other, index) => index && other.name && !other.name.includes(BROKEN));
    const end = next > 0 ? this.#text.indexOf(this.#tokens[next].name) : -1;
    if (end < 0) return false;
    return this.#take(placed, end);
  }

  #take(placed, length) {
    placed.push({ ...this.#tokens.shift(), text: this.#text.slice(0, length) });
    this.#text = this.#text.slice(length);
    return true;
  }
}
