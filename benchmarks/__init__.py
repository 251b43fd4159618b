"""Proxyserve beside other servers, on the same machine, with the same models and requests."""
