/** The control plane, for administrators' keys. A change is sent once and never again by itself. */
import type OpenAI from "openai";

import type { CallOptions, Change, Expert, ExpertSpec, Fusion, Generation, Preset } from "./types.js";

/** How to follow a change that is waited for. */
export interface WaitOptions extends CallOptions {
  /** Called with the newest generation, whose `phase` and `progress` say how far it is, about every `pollMs`. */
  onProgress?: (generation: Generation) => void;
  /** Milliseconds between two looks at the expert; default 250. */
  pollMs?: number;
}

/**
 * Experts that come and go. Changes resolve when they are done: `load` and `rollback` when the generation serves,
 * `unload` when the last request that runs on the expert has ended. A generation that fails rejects with a
 * `BadRequestError` of code `load_failed`, and what served goes on serving. A wait that ends early, by a signal or a
 * timeout, leaves the change alone. `begin...` resolve as soon as the server has accepted the change.
 */
export class Experts {
  readonly #openai: OpenAI;
  readonly #root: string;

  constructor(openai: OpenAI, root: string) {
    this.#openai = openai;
    this.#root = `${root}/admin/v1/experts`;
  }

  /** All of them, by name. */
  async list(options?: CallOptions): Promise<Expert[]> {
    return (await this.#openai.get<{ data: Expert[] }>(this.#root, options)).data;
  }

  async get(name: string, options?: CallOptions): Promise<Expert> {
    return await this.#openai.get<Expert>(this.#path(name), options);
  }

  /** Load a new expert, or swap one for a new generation. */
  async load(name: string, spec: ExpertSpec, options: WaitOptions = {}): Promise<Expert> {
    return await this.#waited(name, options, (call) => this.#openai.put<Expert>(this.#path(name), { ...call, body: spec }));
  }

  async beginLoad(name: string, spec: ExpertSpec, options?: CallOptions): Promise<Change> {
    return await this.#openai.put<Change>(this.#path(name), { ...options, body: spec, maxRetries: 0 });
  }

  /** Give new requests the previous generation again. */
  async rollback(name: string, options: WaitOptions = {}): Promise<Expert> {
    const path = `${this.#path(name)}/rollback`;
    return await this.#waited(name, options, (call) => this.#openai.post<Expert>(path, call));
  }

  async beginRollback(name: string, options?: CallOptions): Promise<Change> {
    return await this.#openai.post<Change>(`${this.#path(name)}/rollback`, { ...options, maxRetries: 0 });
  }

  /** Take an expert away. */
  async unload(name: string, options: CallOptions = {}): Promise<void> {
    await this.#openai.delete(this.#path(name), { ...options, query: { wait: true }, maxRetries: 0 });
  }

  async beginUnload(name: string, options?: CallOptions): Promise<Change> {
    return await this.#openai.delete<Change>(this.#path(name), { ...options, maxRetries: 0 });
  }

  async #waited(
    name: string,
    { onProgress, pollMs = 250, ...call }: WaitOptions,
    send: (call: OpenAI.RequestOptions) => Promise<Expert>,
  ): Promise<Expert> {
    let settled = false;
    const change = send({ ...call, query: { wait: true }, maxRetries: 0 }).finally(() => {
      settled = true;
    });
    if (!onProgress) return await change;
    const ended = change.then(
      () => undefined,
      () => undefined,
    );
    while (!settled) {
      await Promise.race([ended, new Promise((resolve) => setTimeout(resolve, pollMs))]);
      // The change says what became of it; a look in between may find the expert not there yet.
      const expert = settled ? undefined : await this.get(name, call).catch(() => undefined);
      if (expert?.generations[0] && !settled) onProgress(expert.generations[0]);
    }
    return await change;
  }

  #path(name: string): string {
    return `${this.#root}/${inPath(name)}`;
  }
}

/** Fusions with names, callable as models. */
export class Presets {
  readonly #openai: OpenAI;
  readonly #root: string;

  constructor(openai: OpenAI, root: string) {
    this.#openai = openai;
    this.#root = `${root}/admin/v1/presets`;
  }

  async list(options?: CallOptions): Promise<Preset[]> {
    return (await this.#openai.get<{ data: Preset[] }>(this.#root, options)).data;
  }

  async get(name: string, options?: CallOptions): Promise<Preset> {
    return await this.#openai.get<Preset>(`${this.#root}/${inPath(name)}`, options);
  }

  /** Save a fusion; an older preset of that name is replaced. */
  async put(name: string, fusion: Fusion, options?: CallOptions): Promise<Preset> {
    return await this.#openai.put<Preset>(`${this.#root}/${inPath(name)}`, { ...options, body: fusion, maxRetries: 0 });
  }

  async delete(name: string, options?: CallOptions): Promise<void> {
    await this.#openai.delete(`${this.#root}/${inPath(name)}`, { ...options, maxRetries: 0 });
  }
}

/** Throws a RangeError for names that would be another path. */
export function inPath(name: string): string {
  if (["", ".", ".."].includes(name)) throw new RangeError(`'${name}' cannot be a name`);
  return encodeURIComponent(name);
}
