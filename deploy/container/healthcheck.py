"""Exit with 0 if the server in this container takes requests (`/ready`, which needs no key). With `--live`: if it is
worth keeping, that is unless it does not answer or its engine died; a server that drains is. Standard library only.

It asks on the loopback address and the port of PROXYSERVE_PORT: a server started with another `--port` on its command
line would be missed, so set the variable instead.
"""

import json
import os
import sys
import urllib.error
import urllib.request

SECONDS = 3


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--live"]):
        print("usage: healthcheck.py [--live]")
        return 2
    url = f"http://127.0.0.1:{os.environ.get('PROXYSERVE_PORT', '8000')}/ready"
    # A proxy named by the environment is for the outside, not for this.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=SECONDS):
            return 0
    except urllib.error.HTTPError as error:
        body = error.read().decode(errors="replace")
        if arguments and _status(body) not in (None, "dead"):
            return 0
        print(f"{url}: {error.code} {body}")
    except OSError as error:
        print(f"{url}: {error}")
    return 1


def _status(body: str) -> object:
    """What the server says of itself, None if it says nothing that can be read."""
    try:
        return json.loads(body)["status"]
    except (ValueError, KeyError, TypeError):
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
