"""A load generator for any server that speaks OpenAI's API: what it asks, when, and how fast the answers came."""
