"""The `proxyserve` command."""

import logging

# transformers imports torchao (extra `quantize`) where it is installed, whatever is served; at its import it lists the
# GPU libraries that a CPU build of torch cannot load, and torch what it will do otherwise one day.
for _noisy in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)
