// One answer as it grows. Its tokens are in a plain array that is only appended to; who shows them is told how far it has
// come once per frame, so that a fast stream costs no more than a slow one.
import { signal } from "../lib.js";

/**
 * A token is `{text, id, said}`; `said` is the server's explanation of it, null where there is none. `prompt` are the ids
 * before the answer, with which it can be scored again.
 */
export class Answer {
  /** `idle`, `running`, `scoring`, `done`, `stopped` or `failed`. */
  status = signal("idle");
  error = signal("");
  /** Sentences about how this answer came to be. */
  notes = signal([]);
  /** What the server and the clock say of the whole; null before. */
  stats = signal(null);
  /** What was asked, as `{path, body}`; null before. `instead` is the body that it stands for, where it is another one. */
  asked = signal(null);
  /** Counts what is shown: changes once per frame at most. */
  version = signal(0);
  tokens = [];
  prompt = null;
  /** Counts how often everything was replaced or judged anew. */
  epoch = 0;
  /** Counts requests. The end of one that another has taken the place of changes nothing any more. */
  run = 0;
  #frame = 0;

  get text() {
    return this.tokens.map((token) => token.text).join("");
  }

  get explained() {
    return this.tokens.some((token) => token.said);
  }

  get busy() {
    return this.status.value === "running" || this.status.value === "scoring";
  }

  /** A new answer; returns its run. */
  begin(asked, status = "running") {
    this.tokens = [];
    this.prompt = null;
    this.epoch += 1;
    this.asked.value = asked;
    this.error.value = "";
    this.notes.value = [];
    this.stats.value = null;
    this.#touch();
    return this.take(status);
  }

  /** A request about what is here already; returns its run. */
  take(status) {
    this.status.value = status;
    this.run += 1;
    return this.run;
  }

  append(tokens) {
    this.tokens.push(...tokens);
    this.#touch();
  }

  /** The same text under another law. */
  judge(said) {
    this.tokens = this.tokens.map((token, index) => ({ ...token, said: said[index] ?? null }));
    this.epoch += 1;
    this.#touch();
  }

  note(sentence) {
    if (!this.notes.value.includes(sentence)) this.notes.value = [...this.notes.value, sentence];
  }

  fail(message) {
    this.error.value = message;
    this.status.value = "failed";
  }

  #touch() {
    if (this.#frame) return;
    const show = () => {
      this.#frame = 0;
      this.version.value += 1;
    };
    // No frames come where the page is not seen, but it should be right when it is looked at.
    this.#frame = document.hidden ? setTimeout(show, 50) : requestAnimationFrame(show);
  }
}
