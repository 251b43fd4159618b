/** The server that the tests talk to: `proxyserve demo`, started by whoever runs them. */
import { ProxyServe } from "@proxyserve/client";

export const url = process.env["PROXYSERVE_TEST_URL"] ?? "http://127.0.0.1:8000";
export const client = new ProxyServe({ baseURL: url });
export const question = {
  model: "atlas",
  messages: [{ role: "user" as const, content: "Which instrument does Kustin play?" }],
  temperature: 0,
  max_tokens: 24,
};
