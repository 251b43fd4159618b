/** Answers that arrive piece by piece. */
import { APIUserAbortError } from "openai";
import type { Stream } from "openai/streaming";

import type { ChatChunk, CompletionChunk, ExplainedToken, FusionReport, Usage } from "./types.js";

/** How far one expert moved a token: `push` is `weight` times the expert's delta of it, in nats. */
export interface Contribution {
  expert: string;
  weight: number;
  push: number;
}

/** What each expert did to a token, the strongest first. */
export function contributions(token: ExplainedToken): Contribution[] {
  return Object.entries(token.push)
    .map(([expert, push]) => ({ expert, weight: token.weights[expert] ?? 0, push }))
    .sort((one, other) => Math.abs(other.push) - Math.abs(one.push));
}

/** A token of choice `index`, what moved it, and how likely base and fused law found it. */
export interface StreamedToken extends ExplainedToken {
  index: number;
  contributions: Contribution[];
}

/**
 * Text that choice `index` grew by, or `reasoning` in front of it, with an entry per token in `explain` where the request
 * asked for it. `chunk` has log-probs and calls of tools; a piece may be of these alone.
 */
export interface Piece<Chunk> {
  index: number;
  text: string;
  reasoning: string;
  finish_reason: string | null;
  explain: ExplainedToken[];
  chunk: Chunk;
}

/**
 * Iterates over pieces of text, or with `tokens()` over explained tokens: either, and once. Leaving the loop or
 * `close()` ends the request, and the server stops generating. After the end, `text`, `usage` and `fusion` are those of
 * the whole answer. Aborting the request's signal makes the loop throw an `APIUserAbortError`.
 */
export class FusedStream<Chunk extends ChatChunk | CompletionChunk> implements AsyncIterable<Piece<Chunk>> {
  /** Of the answer, which `client.cancel` takes; known from the first piece on. */
  id: string | undefined;
  /** Texts of the choices so far. */
  readonly texts: string[] = [];
  /** Why each choice ended; null while it has not. */
  readonly finishReasons: (string | null)[] = [];
  usage: Usage | undefined;
  fusion: FusionReport | undefined;

  readonly #stream: Stream<Chunk>;
  readonly #explained: boolean;
  readonly #signal: AbortSignal | null | undefined;

  /** `explained`: whether the request asked for explanations. */
  constructor(stream: Stream<Chunk>, explained: boolean, signal?: AbortSignal | null) {
    this.#stream = stream;
    this.#explained = explained;
    this.#signal = signal;
  }

  /** Text of the first choice so far. */
  get text(): string {
    return this.texts[0] ?? "";
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<Piece<Chunk>, void, undefined> {
    for await (const chunk of this.#stream) {
      this.id = chunk.id;
      if (chunk.usage) this.usage = chunk.usage;
      if (chunk.fusion) this.fusion = chunk.fusion;
      for (const choice of chunk.choices) {
        const delta = "delta" in choice ? choice.delta : undefined;
        const text = "delta" in choice ? (choice.delta.content ?? "") : choice.text;
        const reasoning = delta?.reasoning ?? "";
        const { index, finish_reason, explain } = choice;
        this.texts[index] = (this.texts[index] ?? "") + text;
        this.finishReasons[index] = finish_reason;
        if (text || reasoning || finish_reason || explain?.length || delta?.tool_calls?.length) {
          yield { index, text, reasoning, finish_reason, explain: explain ?? [], chunk };
        }
      }
    }
    // The package underneath ends an aborted stream as if it were complete.
    if (this.#signal?.aborted) throw new APIUserAbortError();
  }

  /** Every generated token with what moved it. The request's fusion must have `explain`. */
  async *tokens(): AsyncGenerator<StreamedToken, void, undefined> {
    if (!this.#explained) {
      this.close();
      throw new TypeError("tokens() needs explanations: give the request a fusion with explain, 1 or more");
    }
    for await (const { index, explain } of this) {
      for (const token of explain) yield { ...token, index, contributions: contributions(token) };
    }
  }

  /** End the request, finished or not. */
  close(): void {
    this.#stream.controller.abort();
  }
}
