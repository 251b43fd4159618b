// The token that is looked at, by pointer, keyboard or chart.
import { signal } from "../lib.js";

/** `{side, index, held}` or null. `held`: it stays when the pointer leaves. */
export const focused = signal(null);
