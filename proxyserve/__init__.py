"""proxyserve: an inference server in which small tuned models steer a large frozen one while it decodes."""

__version__ = "0.1.0"
