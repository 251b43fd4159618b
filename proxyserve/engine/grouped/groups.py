"""Which models run in one forward.

learn (any thread): two models of a new kind are tried ──▶ join (between steps): each model to the group of its kind
                                                           leave: it runs alone again, and nothing holds its weights
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable
from weakref import WeakKeyDictionary

from proxyserve.config import PairsChoice
from proxyserve.engine.arena import Layout
from proxyserve.engine.grouped.group import Group
from proxyserve.engine.grouped.shell import NotAlike, Seat
from proxyserve.engine.grouped.trial import Trial
from proxyserve.engine.runner import Runner

logger = logging.getLogger(__name__)

#: What a configuration says of names and special tokens, which no forward depends on.
_NAMES = (
    "_name_or_path",
    "architectures",
    "transformers_version",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)

#: Models of one kind may run in one forward.
Kind = tuple[type, str, Layout]


class Groups:
    """Groups by kind. `learn` may be called from one thread besides that of the steps, everything else between steps
    only."""

    def __init__(self, choice: PairsChoice) -> None:
        self._choice = choice
        #: None for a kind whose members are to run alone.
        self._groups: dict[Kind, Group | None] = {}
        self._seats: WeakKeyDictionary[Runner, tuple[Group, Seat]] = WeakKeyDictionary()

    def learn(
        self,
        runners: Iterable[Runner],
        progress: Callable[[str], None] = logger.info,
        *,
        busy: Callable[[], bool] = lambda: False,
    ) -> None:
        """Prepare for models to join. Of kinds of which there are two or more, and of which nothing is known yet, find
        out whether they should; `progress` is told. Beside steps, which are under way while `busy` says so, in small
        portions."""
        if self._choice == "apart":
            return
        alike: dict[Kind, list[Runner]] = {}
        for runner in runners:
            alike.setdefault(kind_of(runner), []).append(runner)
        for kind, members in alike.items():
            if kind not in self._groups and len(members) > 1:
                self._groups[kind] = self._try(members[0], members[1], progress, busy)
            group = self._groups.get(kind)
            for runner in members:
                if group is not None and runner.group is None:
                    try:
                        self._seats[runner] = (group, group.seat(runner))
                    except NotAlike as reason:
                        progress(f"'{runner.model.name}' runs apart: {reason}")

    def _try(
        self, first: Runner, second: Runner, progress: Callable[[str], None], busy: Callable[[], bool]
    ) -> Group | None:
        names = f"'{first.model.name}' and '{second.model.name}'"
        try:
            trial = Trial((first, second), busy)
            trial.verify()
            if self._choice == "together":
                return Group(trial.release(), sys.maxsize)
            speedups = trial.measure()
        except NotAlike as reason:
            progress(f"{names} run apart: {reason}")
            return None
        except Exception as error:  # whatever a class does that no shell can; apart it was verified
            logger.info("models cannot run together", exc_info=error)
            progress(f"{names} run apart: {type(error).__name__}: {error}")
            return None
        most = speedups.most_tokens
        if not most:
            progress(f"{names} run apart: together {speedups or 'they are too slow for it to matter'}")
            return None
        progress(f"{names} run together up to {most} tokens of each: {speedups}")
        return Group(trial.release(), most)

    def join(self, runners: Iterable[Runner]) -> None:
        """Bring models to the groups that there are for them, those that were prepared for it."""
        for runner in runners:
            group, seat = self._seats.pop(runner, (None, []))
            if group is not None:
                group.join(runner, seat)

    def leave(self, runner: Runner) -> None:
        if runner.group is not None:
            runner.group.leave(runner)


def kind_of(runner: Runner) -> Kind:
    module = runner.model.module
    config = {name: value for name, value in module.config.to_dict().items() if name not in _NAMES}
    return type(module), json.dumps(config, sort_keys=True, default=str), runner.layout
