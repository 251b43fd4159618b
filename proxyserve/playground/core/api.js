// Requests to the server that this page came from, with the key that was typed in.
import { signal } from "../lib.js";

const STORED = "proxyserve-key";

/** The key, "" for none. It is kept for this tab alone, and is in no address and no copied request. */
export const key = signal(sessionStorage.getItem(STORED) ?? "");

export function setKey(value) {
  key.value = value.trim();
  if (key.value) sessionStorage.setItem(STORED, key.value);
  else sessionStorage.removeItem(STORED);
}

/** What the server refused, or a connection that broke (`status` 0). */
export class ApiError extends Error {
  constructor(message, { status = 0, param = null, code = null } = {}) {
    super(message);
    this.status = status;
    this.param = param;
    this.code = code;
  }
}

/** The address of a route, also where a proxy serves all of this under a path of its own. */
export function urlOf(path) {
  return new URL(path.replace(/^\//, ""), new URL(".", document.baseURI)).href;
}

/** The response, once it is known to be none of refusal. Throws ApiError. */
export async function request(method, path, body, { signal: abort } = {}) {
  const headers = {};
  if (key.value) headers.Authorization = `Bearer ${key.value}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(urlOf(path), {
      method,
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal: abort,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (key.value && /[^\x20-\x7e]/.test(key.value)) {
      throw new ApiError("The key has characters that no key has; copy it again.");
    }
    throw new ApiError("The server cannot be reached. Is it running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/** The JSON of an answer. Throws ApiError. */
export async function call(method, path, body, options) {
  return (await request(method, path, body, options)).json();
}

async function refusal(response) {
  let detail = {};
  try {
    detail = (await response.json()).error ?? {};
  } catch {
    // A proxy in between answers in a shape of its own; the status is all there is.
  }
  const after = response.headers.get("retry-after");
  const message = detail.message ?? `The server answered ${response.status}.`;
  return new ApiError(after ? `${message} Try again in ${after} s.` : message, {
    status: response.status,
    param: detail.param ?? null,
    code: detail.code ?? null,
  });
}
