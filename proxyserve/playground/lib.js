// The one place that names the libraries, so that every other file imports from here.
import { h, render } from "./vendor/preact.js";
import htm from "./vendor/htm.js";

export const html = htm.bind(h);
export { render };
export { useEffect, useLayoutEffect, useRef, useState, useMemo, useId } from "./vendor/preact-hooks.js";
export { signal, computed, effect, batch, useSignal } from "./vendor/preact-signals.js";
export { default as UPlot } from "./vendor/uplot.js";
