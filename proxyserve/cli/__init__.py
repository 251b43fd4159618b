"""The `proxyserve` command."""
