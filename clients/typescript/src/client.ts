import OpenAI, { APIError, APIUserAbortError, type ClientOptions } from "openai";
import type { Stream } from "openai/streaming";

import { Experts, inPath, Presets } from "./admin.js";
import { FusedStream } from "./stream.js";
import type {
  CallOptions,
  ChatAnswer,
  ChatChunk,
  ChatRequest,
  CompletionAnswer,
  CompletionChunk,
  CompletionRequest,
  Fusion,
  Load,
  Model,
  Score,
  ScoreRequest,
  Tokenized,
  TokenizeRequest,
  TokenizerInfo,
} from "./types.js";

/** Those of the `openai` package, which does the sending: `timeout`, `maxRetries`, `fetch`, `dangerouslyAllowBrowser`. */
export interface ProxyServeOptions extends Omit<ClientOptions, "apiKey" | "baseURL"> {
  /** The server's address, with or without `/v1`; default `http://127.0.0.1:8000`. */
  baseURL?: string;
  /** Default: the environment variable PROXYSERVE_API_KEY. OPENAI_API_KEY is never sent. */
  apiKey?: string;
  /** For requests that name none; default: the server's base. */
  model?: string;
}

/** Whether the server takes requests; `reason` says why not. */
export interface Readiness {
  ready: boolean;
  reason?: string;
}

/** Talks to one server. What has no method here is for `openai`, the client underneath (`openai.responses`, say). */
export class ProxyServe {
  readonly openai: OpenAI;
  readonly experts: Experts;
  readonly presets: Presets;
  readonly #root: string;
  /** For `/ready`, whose answer while it is not is no error in OpenAI's shape, so that the package would drop it. */
  readonly #fetch: NonNullable<ClientOptions["fetch"]>;
  #model: string | undefined;

  constructor({ baseURL = "http://127.0.0.1:8000", apiKey, model, ...options }: ProxyServeOptions = {}) {
    this.#root = baseURL.replace(/\/+$/, "").replace(/\/v1$/, "");
    this.#model = model;
    this.#fetch = options.fetch ?? ((url, init) => fetch(url, init));
    this.openai = new OpenAI({
      // The package would take these from the environment, where they are another server's business.
      organization: null,
      project: null,
      ...options,
      baseURL: `${this.#root}/v1`,
      apiKey: apiKey ?? keyOfEnvironment() ?? "no-key",
    });
    this.experts = new Experts(this.openai, this.#root);
    this.presets = new Presets(this.openai, this.#root);
  }

  /** Answer a conversation. */
  async chat(request: ChatRequest, options?: CallOptions): Promise<ChatAnswer> {
    const body = { ...(await this.#named(request)), stream: false } as OpenAI.ChatCompletionCreateParamsNonStreaming;
    return (await this.openai.chat.completions.create(body, options)) as ChatAnswer;
  }

  /** `chat`, piece by piece. */
  async streamChat(request: ChatRequest, options?: CallOptions): Promise<FusedStream<ChatChunk>> {
    const body = { ...(await this.#named(request)), ...STREAMING } as OpenAI.ChatCompletionCreateParamsStreaming;
    const stream = (await this.openai.chat.completions.create(body, options)) as unknown as Stream<ChatChunk>;
    return new FusedStream(stream, wantsExplanations(request.fusion), options?.signal);
  }

  /** Continue a text or a list of token ids, or several. */
  async complete(request: CompletionRequest, options?: CallOptions): Promise<CompletionAnswer> {
    const body = { ...(await this.#named(request)), stream: false } as OpenAI.CompletionCreateParamsNonStreaming;
    return (await this.openai.completions.create(body, options)) as CompletionAnswer;
  }

  /** `complete`, piece by piece. */
  async streamComplete(request: CompletionRequest, options?: CallOptions): Promise<FusedStream<CompletionChunk>> {
    const body = { ...(await this.#named(request)), ...STREAMING } as OpenAI.CompletionCreateParamsStreaming;
    const stream = (await this.openai.completions.create(body, options)) as unknown as Stream<CompletionChunk>;
    return new FusedStream(stream, wantsExplanations(request.fusion), options?.signal);
  }

  /** How likely given texts or tokens are under the fused law. */
  async score(request: ScoreRequest, options?: CallOptions): Promise<Score> {
    return await this.openai.post<Score>("/score", { ...options, body: await this.#named(request) });
  }

  async tokenize(request: TokenizeRequest, options?: CallOptions): Promise<Tokenized> {
    return await this.openai.post<Tokenized>(`${this.#root}/tokenize`, { ...options, body: request });
  }

  async detokenize(tokens: number[], options?: CallOptions): Promise<string> {
    const path = `${this.#root}/detokenize`;
    return (await this.openai.post<{ prompt: string }>(path, { ...options, body: { tokens } })).prompt;
  }

  /** The base's tokenizer, whose ids all experts share. */
  async tokenizerInfo(options?: CallOptions): Promise<TokenizerInfo> {
    return await this.openai.get<TokenizerInfo>(`${this.#root}/tokenizer_info`, options);
  }

  /** What `model` may be: the base first, then the base with each expert, and presets. */
  async models(options?: CallOptions): Promise<Model[]> {
    return (await this.openai.get<{ data: Model[] }>("/models", options)).data;
  }

  /**
   * Cancel what is being answered under this id: the answer's `id`, or the `x-request-id` that was sent with it. Whoever
   * waits for it gets an error with code `request_cancelled`. Resolves to the number of requests that were cancelled.
   */
  async cancel(id: string, options?: CallOptions): Promise<number> {
    const path = `/requests/${inPath(id)}/cancel`;
    return (await this.openai.post<{ cancelled: number }>(path, { ...options, maxRetries: 0 })).cancelled;
  }

  /** How busy the server is. */
  async load(options?: CallOptions): Promise<Load> {
    return await this.openai.get<Load>(`${this.#root}/load`, options);
  }

  /** Whether the server takes requests now; false, with a reason, also where no server answers. */
  async ready({ signal, timeout = 10_000 }: Pick<CallOptions, "signal" | "timeout"> = {}): Promise<Readiness> {
    const limit = AbortSignal.timeout(timeout);
    let response: Response;
    try {
      response = await this.#fetch(`${this.#root}/ready`, { signal: signal ? AbortSignal.any([signal, limit]) : limit });
    } catch (error) {
      if (signal?.aborted) throw new APIUserAbortError();
      return { ready: false, reason: limit.aborted ? "No answer in time." : "Connection error." };
    }
    const body = (await response.json().catch(() => ({}))) as { status?: string; reason?: string; error?: object };
    if (response.ok) return { ready: true };
    if (response.status !== 503) throw APIError.generate(response.status, body, undefined, response.headers);
    return { ready: false, reason: body.reason ?? body.status ?? "status 503" };
  }

  /** Have the server refuse new work and finish what runs. Takes an administrator's key. */
  async drain(options?: CallOptions): Promise<void> {
    await this.openai.post(`${this.#root}/admin/v1/drain`, { ...options, maxRetries: 0 });
  }

  async #named<Request extends { model?: string }>(request: Request): Promise<Request & { model: string }> {
    return { ...request, model: request.model ?? (this.#model ??= await this.#base()) };
  }

  async #base(): Promise<string> {
    const [base] = await this.models();
    if (!base) throw new TypeError(`${this.#root} lists no model`);
    return base.id;
  }
}

const STREAMING = { stream: true, stream_options: { include_usage: true } } as const;

function wantsExplanations(fusion: Fusion | null | undefined): boolean {
  return (fusion?.explain ?? 0) > 0;
}

/** There is no environment in a browser. */
function keyOfEnvironment(): string | undefined {
  const { process } = globalThis as { process?: { env?: Record<string, string | undefined> } };
  return process?.env?.["PROXYSERVE_API_KEY"];
}
