// The same with the TypeScript client.
import { fusion, ProxyServe } from "@proxyserve/client";

const client = new ProxyServe({ baseURL: process.env["PROXYSERVE_URL"] ?? "http://127.0.0.1:8000" });
const stream = await client.streamChat({
  messages: [{ role: "user", content: "Which instrument does Kustin play?" }],
  temperature: 0,
  fusion: fusion.proxy({ qa: 1, bio: 0.25 }, { explain: 3 }),
});
for await (const token of stream.tokens()) {
  const pushes = token.contributions.map(({ expert, push }) => `${expert} ${push.toFixed(1)}`).join(", ");
  console.log(`'${token.token}' pushed by ${pushes}${token.flip ? ", a flip" : ""}`);
}
console.log("answer:", stream.text, stream.fusion?.generations);
