// Server-sent events of a response, as the API sends them.
import { ApiError } from "./api.js";

/** Yields the data of each event as JSON until `[DONE]`. Throws ApiError where the stream says so, or breaks off. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let complete = false;
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        if (error.name === "AbortError") throw error;
        return { done: true };
      });
      if (done && complete) return;
      if (done) throw new ApiError("The connection broke off in the middle of the answer.", { code: "broken" });
      rest += value;
      let end;
      let start = 0;
      while ((end = rest.indexOf("\n\n", start)) >= 0) {
        const frame = rest.slice(start, end);
        start = end + 2;
        if (!frame.startsWith("data: ")) continue; // a comment that keeps the connection open
        const data = frame.slice(6);
        complete = data === "[DONE]"; // then the connection is read to its end, which follows at once
        if (complete) break;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(event.error.message, event.error);
        yield event;
      }
      rest = rest.slice(start);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
