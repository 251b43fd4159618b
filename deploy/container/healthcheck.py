"""Exit with 0 if the server in this container takes requests (`/ready` needs no key). Standard library only.

It asks on the loopback address and the port of PROXYSERVE_PORT: a server started with another `--port` on its command
line would be missed, so set the variable instead.
"""

import os
import sys
import urllib.error
import urllib.request

SECONDS = 3


def main() -> int:
    url = f"http://127.0.0.1:{os.environ.get('PROXYSERVE_PORT', '8000')}/ready"
    # A proxy named by the environment is for the outside, not for this.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=SECONDS):
            return 0
    except urllib.error.HTTPError as error:
        print(f"{url}: {error.code} {error.read().decode(errors='replace')}")
    except OSError as error:
        print(f"{url}: {error}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
