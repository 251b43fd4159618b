"""A process that changes a store until it is killed: `python restless.py FOLDER SEED`.

It writes one JSON line when it starts to open the store, one before each change ("do") and one after it ("done").
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from random import Random
from typing import Any

from proxyserve.experts.store import StateStore
from tests.experts.store_twin import perform


def say(value: dict[str, Any]) -> None:
    os.write(1, f"{json.dumps(value)}\n".encode())


def main(folder: Path, seed: int) -> None:
    say({"opening": str(folder)})
    random = Random(seed)
    store = StateStore.open(folder)

    def do(method: str, **arguments: Any) -> Any:
        say({"do": method, "with": arguments})
        result = perform(store, method, arguments)
        say({"done": result})
        return result

    while True:
        name = random.choice(["qa", "record", "bio"])
        kind = random.random()
        if kind < 0.5:
            generation = do("next_generation", expert=name)
            spec = {"tuned": {"path": f"/experts/{name}/{random.random()}" * random.choice([1, 200])}}
            do("begin", expert=name, generation=generation, spec=spec)
            if random.random() < 0.2:
                do("fail", expert=name, generation=generation, error="NaN on the probe")
                continue
            do(
                "publish",
                expert=name,
                generation=generation,
                spec=spec,
                content_hash=f"{random.getrandbits(256):064x}",
                created=random.random(),
                origin=random.choice([None, f"{name}=/experts/{name}"]),
            )
        elif kind < 0.7:
            do("roll_back", expert=name)
        elif kind < 0.8:
            do("delete", expert=name)
        elif kind < 0.95:
            value = {
                "rule": "proxy",
                "experts": {name: random.random()},
                "note": "x" * random.choice([1, 9000]),
            }
            do("put_preset", name=f"preset-{random.randrange(4)}", value=value)
        else:
            do("delete_preset", name=f"preset-{random.randrange(4)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
