"""proxyserve: an inference server in which small tuned models steer a large frozen one while it decodes."""

import logging

__version__ = "0.1.0"

# transformers imports torchao where it is installed, which then warns of each of its compiled extensions that is for
# another Python or device, and has torch warn of a deprecation of its own.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
