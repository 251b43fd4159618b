"""Who owns which KV block: bookkeeping only, no tensors (those are in `engine.kv_storage`)."""
