export { Experts, Presets, type WaitOptions } from "./admin.js";
export { ProxyServe, type ProxyServeOptions, type Readiness } from "./client.js";
export { hasCode, type ErrorCode } from "./errors.js";
export { fusion, modelName, type Beside, type Weight, type Weights } from "./fusion.js";
export { contributions, FusedStream, type Contribution, type Piece, type StreamedToken } from "./stream.js";
export type * from "./types.js";
export type { components, paths } from "./openapi.js";
