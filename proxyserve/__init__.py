"""proxyserve: an inference server in which small tuned models steer a large frozen one while it decodes."""

from importlib.metadata import version

__version__ = version("proxyserve")
