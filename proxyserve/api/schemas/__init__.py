"""The bodies of requests and responses, one file per route family."""
