/**
 * Errors are the classes of the `openai` package: `BadRequestError` (400), `AuthenticationError` (401),
 * `PermissionDeniedError` (403), `NotFoundError` (404), `ConflictError` (409), `RateLimitError` (429),
 * `InternalServerError` (500 and above), `APIError` for others and for what ends a stream. `error.message` says what to
 * change, `error.param` names the field, and `error.code` is for programs.
 */
import { APIError } from "openai";

/** What programs may want to act on; the server has more. */
export type ErrorCode =
  /** 404: no such model, expert or preset. */
  | "model_not_found"
  /** 400: a generation could not be published; the message says why, and what served before goes on. */
  | "load_failed"
  /** 409: another change of this expert is under way. */
  | "swap_conflict"
  /** 409: there is nothing to roll back to. */
  | "no_previous_generation"
  /** 409: a preset needs what is to go. */
  | "in_use"
  /** 409: the memory plan has no room; the message has the numbers. */
  | "insufficient_memory"
  /** 499: somebody cancelled the request by its id. */
  | "request_cancelled"
  /** 504: the request's `timeout`, or the server's, is over. */
  | "deadline_exceeded"
  /** 429: too much is waiting, on the server or of this key. */
  | "queue_full"
  | "key_limit"
  /** 429: the key's rate. */
  | "rate_limit"
  /** 503: loading, draining or stopping. */
  | "not_ready";

/** Whether the server refused, or ended a stream, with this code. */
export function hasCode<Code extends ErrorCode>(error: unknown, code: Code): error is APIError & { code: Code } {
  return error instanceof APIError && error.code === code;
}
