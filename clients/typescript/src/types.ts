/**
 * Requests and answers. Fields of OpenAI have the types of the `openai` package; all others come from the server's
 * OpenAPI document (`openapi.ts`, which is generated).
 */
import type OpenAI from "openai";

import type { components } from "./openapi.js";

type Schemas = components["schemas"];
type Beyond<Ours, Theirs> = Omit<Ours, keyof Theirs>;

/** What a fusion did to an answer: rule, generations, mean KL to the base, flips, drafted and accepted tokens. */
export type FusionReport = Schemas["FusionSummary"];
/** OpenAI's counts, and `lane_tokens`: tokens that ran through each model. */
export type Usage = Schemas["UsageBody"];
/** What every lane thought of one token, which weights were used, and how far each expert pushed it. */
export type ExplainedToken = Schemas["ExplainedToken"];
/** One law's log-prob of a token, and its likeliest tokens. */
export type LawOfToken = Schemas["LawOfToken"];

export type Score = Schemas["Score"];
export type TextScore = Schemas["TextScore"];
export type LabelScore = Schemas["LabelScore"];
export type Expert = Schemas["ExpertBody"];
/** One version of an expert. */
export type Generation = Schemas["GenerationBody"];
/** A change of an expert that has begun. */
export type Change = Schemas["ChangeBody"];
export type Preset = Schemas["PresetBody"];
export type Load = Schemas["Load"];
export type TokenizerInfo = Schemas["TokenizerInfo"];
export type Tokenized = Schemas["TokenizeResponse"];
/** A model's name and the length of its context. */
export type Model = Schemas["ModelBody"];

/** Where a model's weights come from: a `path`, a `merge` of several, or `of` alone for a model that is loaded. */
export type Source = Exclude<Schemas["SourceObject"], { path: unknown } | { merge: unknown } | { of: unknown }>;
/** What an expert is to be; a string is a path or hub id. */
export type ExpertSpec = { tuned: string | Source; untuned?: string | Source; protected?: boolean };

/** The fusion object of a request, of any rule. `fusion` has a builder for each. */
export type Fusion = NonNullable<Schemas["ChatRequest"]["fusion"]>;

type ChatParameters = OpenAI.ChatCompletionCreateParamsNonStreaming;
type CompletionParameters = OpenAI.CompletionCreateParamsNonStreaming;
type Unsent = "model" | "stream" | "stream_options";
/** Without one, the client's own model, or else the server's base. */
type OptionalModel = { model?: string };

/** OpenAI's fields and the server's, `fusion` among them. What the server does not support it refuses by name. */
export type ChatRequest = OptionalModel &
  Omit<ChatParameters, Unsent> &
  Beyond<Schemas["ChatRequest"], ChatParameters>;
export type CompletionRequest = OptionalModel &
  Omit<CompletionParameters, Unsent> &
  Beyond<Schemas["CompletionRequest"], CompletionParameters>;

type ChatChoice = Omit<OpenAI.ChatCompletion.Choice, "message"> &
  Beyond<Schemas["ChatChoice"], OpenAI.ChatCompletion.Choice> & {
    message: OpenAI.ChatCompletionMessage & Beyond<Schemas["AssistantMessage"], OpenAI.ChatCompletionMessage>;
  };
type ChatChunkChoice = Omit<OpenAI.ChatCompletionChunk.Choice, "delta"> &
  Beyond<Schemas["ChatChunkChoice"], OpenAI.ChatCompletionChunk.Choice> & {
    delta: OpenAI.ChatCompletionChunk.Choice.Delta &
      Beyond<Schemas["ChatDelta"], OpenAI.ChatCompletionChunk.Choice.Delta>;
  };
type CompletionChoice = OpenAI.CompletionChoice & Beyond<Schemas["CompletionChoice"], OpenAI.CompletionChoice>;

/** OpenAI's answer with what the server adds: `fusion`, `usage.lane_tokens`, and on choices `explain` and the like. */
export type ChatAnswer = Omit<OpenAI.ChatCompletion, "choices" | "usage"> &
  Beyond<Schemas["ChatCompletion"], OpenAI.ChatCompletion> & { choices: ChatChoice[]; usage: Usage };
export type CompletionAnswer = Omit<OpenAI.Completion, "choices" | "usage"> &
  Beyond<Schemas["Completion"], OpenAI.Completion> & { choices: CompletionChoice[]; usage: Usage };
export type ChatChunk = Omit<OpenAI.ChatCompletionChunk, "choices" | "usage"> &
  Beyond<Schemas["ChatChunk"], OpenAI.ChatCompletionChunk> & { choices: ChatChunkChoice[]; usage?: Usage | null };
/** In a stream, `finish_reason` is null until a choice's last chunk. */
export type CompletionChunk = Omit<CompletionAnswer, "choices" | "usage"> & {
  choices: (Omit<CompletionChoice, "finish_reason"> & { finish_reason: CompletionChoice["finish_reason"] | null })[];
  usage?: Usage | null;
};

type TextOrIds = string | number[];
/** The fields of a way to score, and none of those that belong to another way. */
type Way<Fields> = Fields & {
  [Name in Exclude<"prompt" | "continuations" | "label_token_ids" | "normalize" | "texts" | "logprobs", keyof Fields>]?: never;
};
/** Continuations of a prompt, single tokens after it, or whole texts; nothing is generated. */
export type ScoreRequest = OptionalModel &
  Omit<Schemas["ScoreRequest"], "model" | "prompt" | "continuations" | "label_token_ids" | "normalize" | "texts" | "logprobs"> &
  (
    | Way<{ prompt: TextOrIds; continuations: TextOrIds[]; logprobs?: number }>
    | Way<{ prompt: TextOrIds; label_token_ids: number[]; normalize?: boolean }>
    | Way<{ texts: TextOrIds[]; logprobs?: number }>
  );
export type TokenizeRequest = { model?: string; return_token_strs?: boolean } & (
  | { prompt: string; add_special_tokens?: boolean }
  | { messages: OpenAI.ChatCompletionMessageParam[] }
);

/** How a call is sent: OpenAI's options. */
export type CallOptions = Pick<OpenAI.RequestOptions, "signal" | "timeout" | "maxRetries" | "headers">;
