"""The models that steps can run, and their KV memory."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from proxyserve.config import PairsChoice
from proxyserve.engine.arena import Arena, Layout
from proxyserve.engine.grouped.groups import Groups
from proxyserve.engine.remote_runner import RemoteRunner
from proxyserve.engine.runner import Runner, RunnerStats
from proxyserve.kv.block_pool import BlockPool
from proxyserve.models.loaded_model import LoadedModel
from proxyserve.types import ModelKey

AnyRunner = Runner | RemoteRunner


class Residents:
    """Runners by trunk, arenas by layout, and the pool that each trunk's lanes take their blocks from. Changed between
    steps only. Other threads may read: mappings are replaced, never changed."""

    def __init__(self, pairs: PairsChoice = "apart") -> None:
        #: The runners that run together.
        self.groups = Groups(pairs)
        self.runners: Mapping[ModelKey, AnyRunner] = MappingProxyType({})
        self.arenas: Mapping[Layout, Arena] = MappingProxyType({})
        self.pools: Mapping[ModelKey, BlockPool] = MappingProxyType({})
        #: Of pools, after the first model that used them.
        self.pool_names: Mapping[BlockPool, str] = MappingProxyType({})
        #: By the trunk's name: all generations of it count together, and go on counting after it has left.
        self.stats: Mapping[str, RunnerStats] = MappingProxyType({})

    def adopt(self, runner: Runner, arena: Arena) -> None:
        """Let steps run this model. `arena` is that of its layout: the one that is here, or a new one."""
        present = self.arenas.get(runner.layout)
        if present is not None and present is not arena:
            raise ValueError("another arena of this layout is here already")
        runner.attach(arena.storage)
        self.arenas = MappingProxyType({**self.arenas, runner.layout: arena})
        self._add(runner, arena.pool)
        self.groups.join(self.local)

    def adopt_remote(self, runner: RemoteRunner, pool: BlockPool) -> None:
        self._add(runner, pool)

    def _add(self, runner: AnyRunner, pool: BlockPool) -> None:
        key = runner.model.key
        runner.stats = self.stats.get(key.name, RunnerStats())
        runner.stats.tokens[key.name] += 0  # known from now on
        self.stats = MappingProxyType({**self.stats, key.name: runner.stats})
        self.runners = MappingProxyType({**self.runners, key: runner})
        self.pools = MappingProxyType({**self.pools, key: pool})
        if pool not in self.pool_names:
            name = str(key) if key.name in self.pool_names.values() else key.name
            self.pool_names = MappingProxyType({**self.pool_names, pool: name})

    def drop(self, trunk: ModelKey) -> None:
        """No step will run this model again, and nothing is over it any more. An arena goes with its last model.
        Nothing happens if it never came."""
        if trunk not in self.runners:
            return
        self.groups.leave(self._local(trunk))
        self.pools[trunk].forget(trunk)
        runners = {key: other for key, other in self.runners.items() if key != trunk}
        self.runners = MappingProxyType(runners)
        self.pools = MappingProxyType({key: pool for key, pool in self.pools.items() if key != trunk})
        left = set(self.pools.values())
        self.pool_names = MappingProxyType(
            {pool: name for pool, name in self.pool_names.items() if pool in left}
        )
        kept = {other.layout for other in self.local}
        self.arenas = MappingProxyType(
            {layout: arena for layout, arena in self.arenas.items() if layout in kept}
        )

    def adopt_over(self, model: LoadedModel) -> None:
        """Let lanes of a model run as rows of its trunk, which is here."""
        runner = self._local(model.trunk.key)
        runner.stats.tokens[model.name] += 0  # known from now on
        if model.adapter is not None:
            runner.adapters.add(model.key, model.adapter)

    def drop_over(self, model: LoadedModel) -> None:
        """No lane will run this model again, but its trunk stays. Nothing happens if it never came."""
        if model.trunk.key not in self.runners:
            return
        adapters = self._local(model.trunk.key).adapters
        if model.key in adapters:
            adapters.remove(model.key)
        self.pools[model.trunk.key].forget(model.key)

    def _local(self, trunk: ModelKey) -> Runner:
        runner = self.runners[trunk]
        if isinstance(runner, RemoteRunner):
            raise ValueError("nothing runs over a remote model, and it stays")
        return runner

    @property
    def local(self) -> list[Runner]:
        """Those that are no other server's. Any thread may ask."""
        return [runner for runner in self.runners.values() if isinstance(runner, Runner)]

    @property
    def bytes(self) -> int:
        """Of all weights, adapters and KV blocks here."""
        return sum(runner.bytes for runner in self.local) + sum(arena.bytes for arena in self.arenas.values())
