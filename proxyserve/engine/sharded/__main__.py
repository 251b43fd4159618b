"""Where a follower starts: `python -m proxyserve.engine.sharded`, called by `ranks`."""

import logging
import sys


def _main() -> None:
    for noisy in ("torchao", "torch.utils._pytree"):  # as for the command, and before it imports transformers
        logging.getLogger(noisy).setLevel(logging.ERROR)
    from proxyserve.engine.sharded.follower import main

    main(sys.argv[1:])


if __name__ == "__main__":
    _main()
