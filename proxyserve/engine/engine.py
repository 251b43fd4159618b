"""The engine: one plain `step()` that advances every running request.

    submission ─prepare─▶ choices ─enqueue─▶ scheduler.schedule() ─▶ drafts ─▶ per model: runner.run(packed tokens)
        events ◀─accept─ tokens ◀─ backend.pick (one call for the whole batch) ◀─ solved weights ◀─ logits rows

No thread lives here; `engine.loop` owns the one that calls `step`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter

import torch

from proxyserve.config import EngineConfig, Limits
from proxyserve.engine.adjustments import NO_FINITE_SCORE, Adjuster, Halt, RowAdjustments
from proxyserve.engine.arena import Arena, Layout
from proxyserve.engine.batch import (
    FusedRow,
    LogitRows,
    build_batch,
    build_controls,
    is_sure,
    models_are_sound,
    shared_heads,
    target_entropies,
    token_logprobs,
    wanted,
    weights_used,
    with_solved_weights,
)
from proxyserve.engine.certificate import certify
from proxyserve.engine.choice import Choice, Sampled
from proxyserve.engine.counters import EngineCounters, held_up
from proxyserve.engine.cuda.graph_device import GraphDevice, graph_device_for
from proxyserve.engine.cuda.step_graphs import StepGraphs, sizes_for
from proxyserve.engine.explain import explain
from proxyserve.engine.forward import run_models
from proxyserve.engine.heads import logits_dtype
from proxyserve.engine.memory import (
    Tenants,
    blocks_of_new_arena,
    blocks_of_remote,
    fused_at_once,
    kv_budget,
    plan_arenas,
    scoring_bytes,
)
from proxyserve.engine.offer import Lease, Offer, Offers
from proxyserve.engine.preparation import bind_fusion, check_presets, context_room, memory_room, prepare
from proxyserve.engine.remote_runner import RemoteRunner
from proxyserve.engine.residents import AnyRunner, Residents
from proxyserve.engine.runner import Runner
from proxyserve.engine.score_rows import rows_to_score, score
from proxyserve.engine.scoring import Score
from proxyserve.engine.speculation.drafting import Drafted, draft
from proxyserve.engine.speculation.speculator import Speculator
from proxyserve.engine.submission import LanePrompts, Submission
from proxyserve.engine.verify import verify_paged
from proxyserve.errors import RankLost
from proxyserve.fusion.calibration import Calibration
from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.fusion import MAX_SUPPORT_LAWS, Fusion
from proxyserve.fusion.policy import FusionPolicy
from proxyserve.kv.block_pool import BlockPool
from proxyserve.kv.virtual_pool import VirtualPool
from proxyserve.models.loaded_model import Expert, LoadedModel
from proxyserve.models.model_set import ModelSet
from proxyserve.models.remote import AnyModel, RemoteModel
from proxyserve.scheduler.request import RequestState, ScheduledRequest
from proxyserve.scheduler.scheduler import Plan, Scheduler, Wish
from proxyserve.types import FinishReason, ModelKey, OutputEvent
from proxyserve_kernels import Needs, PickControls, RowBatch, backend_for

logger = logging.getLogger(__name__)

#: `EngineConfig.prefill_tokens` on a CPU.
_CPU_PREFILL_TOKENS = 32


class Engine:
    """Holds the models, their KV blocks and the requests. Not thread-safe: `prepare` may be called from anywhere,
    everything else from one thread. `presets` are fusions with names, `calibrations` those of experts. `runners` are
    those that have been made and verified already, `grows` says that experts may come later. Steps are recorded by
    `graph_device`, or by the base's device where that can. Raises LoadError if a
    model cannot be served or memory does not suffice, InvalidRequest for a preset that cannot work, and ValueError for
    settings that do not fit together or the device."""

    def __init__(
        self,
        models: ModelSet,
        config: EngineConfig | None = None,
        policy: FusionPolicy | None = None,
        progress: Callable[[str], None] = lambda _: None,
        *,
        presets: Mapping[str, Fusion] | None = None,
        calibrations: Mapping[str, Calibration] | None = None,
        runners: Iterable[Runner] = (),
        grows: bool = False,
        graph_device: GraphDevice | None = None,
    ) -> None:
        catalog = Catalog(models, dict(presets or {}), dict(calibrations or {}))
        self.config = config or EngineConfig()
        offer = Offer(catalog, policy or FusionPolicy())
        self.offers = Offers(offer)
        check_presets(offer)
        for name in ("max_batch_tokens", "max_scored_rows", "prefill_tokens"):
            value = getattr(self.config, name)
            if value is not None and value < self.policy.most_lanes:
                # The last tokens of a request's lanes run in one step, and all of its lanes may be on one trunk.
                raise ValueError(
                    f"{name} must be at least {self.policy.most_lanes}, above twice the number of experts that a "
                    f"request may name, not {value}"
                )
        self.counters = EngineCounters()
        self.backend = backend_for(models.base.device, self.config.kernels)
        experts = bool(models.experts) or grows
        needs = Needs(
            dtypes=tuple(logits_dtype(model.dtype, model.device) for model in models.models.values()),
            vocabulary=models.base.vocabulary.size,
            rows=self.config.max_batch
            + (0 if self.config.speculate == "off" else self.config.max_scored_rows),
            terms=self.policy.max_experts if experts else 1,
            listed=max(Limits().max_logprobs, self.policy.max_explain),
            rules=True,
            laws=MAX_SUPPORT_LAWS,
            uncompared=True,
            dynamic=experts,
        )
        self.backend.warm_up(needs, progress)
        self.speculator = Speculator(self.config, models.base.key)
        progress("planning memory and checking the models in paged mode")
        recorder = graph_device or graph_device_for(models.base.device)
        #: The steps that are recorded; None if none are.
        self.graphs: StepGraphs | None = None
        if recorder is not None and self.config.cuda_graphs:
            self.graphs = StepGraphs(
                recorder, sizes_for(self.config.max_batch * (1 + self.config.most_drafts))
            )
        self.residents = self._settle(models, {runner.model.key: runner for runner in runners}, progress)
        self.scheduler = Scheduler(
            self.residents.pools,
            block_size=self.config.block_size,
            max_batch=self.config.max_batch,
            max_batch_tokens=self.config.max_batch_tokens,
            max_scored_rows=self.config.max_scored_rows,
            prefill_tokens=self._prefill_tokens(),
        )
        self._choices: dict[str, Choice] = {}
        self._adjuster = Adjuster()

    def _prefill_tokens(self) -> int | None:
        """A CPU takes about as long for a token of a prompt as for one that is decoded; a GPU hardly notices it."""
        if self.config.prefill_tokens is None and self.models.base.device.type == "cpu":
            return max(self.policy.most_lanes, _CPU_PREFILL_TOKENS)
        return self.config.prefill_tokens

    def _settle(
        self, models: ModelSet, prepared: Mapping[ModelKey, Runner], progress: Callable[[str], None]
    ) -> Residents:
        """Give the models their runners, share the KV memory out and find out which run together."""
        residents, config = Residents(self.config.pairs), self.config
        local: list[Runner] = []
        for key, trunk in models.trunks.items():
            if isinstance(trunk, RemoteModel):
                blocks = blocks_of_remote(
                    trunk,
                    block_size=config.block_size,
                    max_batch=config.max_batch,
                    lanes=self.policy.max_experts + 1,
                )
                residents.adopt_remote(RemoteRunner(trunk), VirtualPool(blocks))
            elif key in prepared:
                local.append(prepared[key])
            else:
                local.append(Runner(trunk))
                verify_paged(local[-1])
        layouts = {runner.model.key: runner.layout for runner in local}
        tenants: dict[Layout, Tenants] = {}
        for model in models.models.values():
            if isinstance(model, LoadedModel):
                layout = layouts[model.trunk.key]
                known = tenants.get(layout, Tenants(0, 0))
                tenants[layout] = Tenants(known.models + 1, max(known.context, model.context_length))
        budget = kv_budget(models.base.device, config.kv_memory, scoring_bytes(models.base, config))
        blocks_of = plan_arenas(
            tenants, budget=budget, block_size=config.block_size, max_batch=config.max_batch
        )
        per_lane = (blocks // tenants[layout].lanes for layout, blocks in blocks_of.items())
        self.blocks_per_lane: int | None = max(per_lane, default=None)
        arenas = {layout: self._arena(layout, blocks) for layout, blocks in blocks_of.items()}
        residents.groups.learn([runner for runner in local if runner.model.sharding is None], progress)
        for runner in local:
            self.speculator.measure(runner)
        for runner in local:
            residents.adopt(runner, arenas[runner.layout])
        self.record((runner, arenas[runner.layout]) for runner in local)
        for expert in models.experts.values():
            self.record_together(expert, models.base)
        for model in models.models.values():
            if isinstance(model, LoadedModel) and model.over is not None:
                residents.adopt_over(model)
        return residents

    # Models ----------------------------------------------------------------------------------------------------

    @property
    def catalog(self) -> Catalog:
        return self.offers.current.catalog

    @property
    def models(self) -> ModelSet:
        return self.catalog.models

    @property
    def policy(self) -> FusionPolicy:
        return self.offers.current.policy

    @property
    def runners(self) -> Mapping[ModelKey, AnyRunner]:
        """By trunk."""
        return self.residents.runners

    @property
    def pools(self) -> Mapping[ModelKey, BlockPool]:
        """By trunk; trunks of one layout share one."""
        return self.residents.pools

    def new_arena(self, runner: Runner, room: int) -> Arena:
        """KV memory for a model of a layout that is not here, of at most `room` bytes. Raises NoRoom if that holds no
        full context for each of an expert's two lanes. May be called during steps."""
        layout = runner.layout
        size = self.config.block_size
        blocks = blocks_of_new_arena(
            layout,
            runner.model.context_length,
            wanted=self.blocks_per_lane,
            room=room,
            block_size=size,
            max_batch=self.config.max_batch,
        )
        return self._arena(layout, blocks)

    def _arena(self, layout: Layout, blocks: int) -> Arena:
        return Arena(layout, blocks, self.config.block_size, spare=self.graphs is not None)

    def record(self, runners: Iterable[tuple[Runner, Arena]]) -> None:
        """Record the steps of trunks that no step runs yet, where the device can. May be called during steps."""
        if self.graphs is not None:
            for runner, arena in runners:
                self.graphs.record(runner, arena.storage)

    def record_together(self, expert: Expert, base: AnyModel) -> None:
        """Record the steps in which an expert's trunks, which are recorded, run beside the base. May be called during
        steps."""
        if self.graphs is not None:
            models = (base, expert.tuned, expert.untuned)
            self.graphs.record_together([model.trunk.key for model in models if model is not None])

    def forget_recorded(self, runners: Iterable[Runner]) -> None:
        """Of trunks that were recorded, but will not be adopted."""
        if self.graphs is not None:
            for runner in runners:
                self.graphs.drop(runner.model.key)

    def adopt(self, runners: Iterable[tuple[Runner, Arena]], models: Iterable[LoadedModel] = ()) -> None:
        """Let steps run more trunks, and models over trunks. Not during a step; offer them to requests afterwards, with
        `offers.replace`."""
        for runner, arena in runners:
            self.residents.adopt(runner, arena)
        for model in models:
            self.residents.adopt_over(model)
        self.scheduler.pools = self.residents.pools

    def drop(self, models: Iterable[LoadedModel], trunks: Iterable[ModelKey]) -> None:
        """Let models go that run over others, and then trunks: all of them in no offer, and nobody holds or leases
        them, or anything over the trunks. Not during a step."""
        for model in models:
            self.residents.drop_over(model)
        for trunk in trunks:
            if self.graphs is not None:
                self.graphs.drop(trunk)
            self.residents.drop(trunk)
        self.scheduler.pools = self.residents.pools
        self.offers.forget((*(model.key for model in models), *trunks))

    # Requests ------------------------------------------------------------------------------------------------

    def prepare(self, submission: Submission, lease: Lease) -> list[Choice]:
        """Validate a submission and make its choices from a leased offer. They hold their models, so `enqueue` or
        `discard` them. Raises InvalidRequest, UnknownModel, ExpertParked or Forbidden with the field at fault."""
        choices = prepare(
            submission,
            lease.offer,
            pools=self.pools,
            block_size=self.config.block_size,
            share_prefixes=self.config.prefix_cache,
        )
        for choice in choices:
            self.offers.hold(choice.models)
        return choices

    def discard(self, choices: Iterable[Choice]) -> None:
        """Let go of prepared choices that will not be queued."""
        for choice in choices:
            self.offers.release(choice.models)

    def room_for_output(self, fusion: Fusion, prompts: LanePrompts, catalog: Catalog) -> int:
        """The largest `max_tokens` that context and KV memory allow after these prompts. May be negative. The catalog
        is that of a leased offer."""
        program = bind_fusion(fusion, catalog, prompts)
        return min(context_room(program), memory_room(program, self.pools, self.config.block_size))

    def enqueue(self, choices: Iterable[Choice]) -> None:
        """Queue prepared choices."""
        for choice in choices:
            if choice.key in self._choices:
                raise ValueError(f"request id {choice.key} is in use")
            self._choices[choice.key] = choice
            self.speculator.begin(choice)
            self.scheduler.add(choice.scheduled)

    def submit(self, submission: Submission) -> list[str]:
        """Prepare and queue. Returns the keys of the choices, for `cancel`."""
        with self.offers.lease() as lease:
            choices = self.prepare(submission, lease)
        self.enqueue(choices)
        return [choice.key for choice in choices]

    def cancel(self, key: str) -> OutputEvent | None:
        """End a choice now and return its blocks. None if it has already ended."""
        choice = self._choices.get(key)
        return None if choice is None else self._finish(choice, choice.end(FinishReason.CANCELLED))

    def fail_all(self, message: str) -> list[OutputEvent]:
        """End every choice with an error; for a caller that cannot go on stepping."""
        return [
            self._finish(choice, choice.end(FinishReason.ERROR, message))
            for choice in list(self._choices.values())
        ]

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    # One step ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[OutputEvent]:
        """Run one step: drafts, at most one more packed forward per model, one fused pick, a few that score prompts.
        Returns an event for each token that a choice got, in order, and for each that ended without. A step that raises
        inside ends the requests in it with an error and nothing else; a remote model that does not answer ends those
        that wanted it. Raises RankLost if a process of a divided base is gone: no step can be run after that."""
        started = perf_counter()
        running = (self._choices[request.request_id] for request in self.scheduler.running)
        plan = self.scheduler.schedule(self.speculator.wishes(running, self.runners))
        self.counters.scheduled(plan, self._choices)
        if plan.empty:
            return []
        self.counters.steps += 1
        held = [self._choices[request.request_id] for request in held_up(plan, self.scheduler.running)]
        self._adjuster.begin()
        try:
            drafted = self._draft(plan)
            counts = {self._choices[request.request_id]: count for request, count in plan.rows.items()}
            to_score = [row for choice, count in counts.items() for row in rows_to_score(choice, count)]
            rows = self._rows_to_sample(plan, counts)
            forward = run_models(
                self.runners, plan.work, shared_heads([*to_score, *rows], self.runners), self.graphs
            )
            failures = forward.failures
            rows = [row for row in rows if row.choice.key not in failures]
            computed = perf_counter()
            rows, adjusted, halted = self._rule(rows, drafted)
            logits = LogitRows(rows, plan.work, forward, drafted.sources, drafted.places)
            scores = score(self.backend, to_score, logits, fused_at_once(self.config))
            sampled = self._sample(rows, adjusted, logits) if rows else []
            self.speculator.compare(rows, adjusted, sampled, logits, self.backend, self._adjuster)
            accepted, broken = _accepted(rows, sampled) if plan.granted else ({}, ())
            self.scheduler.commit(plan, accepted)
            for request, wish in plan.granted.items():
                self._verified(self._choices[request.request_id], wish, accepted.get(request, 0))
            self._retreat(broken)
            self.counters.sampling_seconds += perf_counter() - computed
        except RankLost:  # no step can run the base any more
            raise
        except Exception as error:  # whatever it was, the process and all other requests go on
            self.counters.step_failures += 1
            logger.exception("a step failed; the requests in it are ended")
            return self._fail(plan, f"The step that computed this request failed: {type(error).__name__}.")
        events = [*self._accept_scores(counts, scores), *self._accept(rows, sampled, accepted)]
        halted |= {key: Halt(FinishReason.ERROR, message) for key, message in failures.items()}
        # Not where the prompt could not be scored: that has ended the choice already.
        events.extend(
            self._halt(self._choices[key], halt) for key, halt in halted.items() if key in self._choices
        )
        if not self.config.prefix_cache:
            for arena in self.residents.arenas.values():
                arena.pool.drop_cache()
        self.speculator.stepped(plan, perf_counter() - started, self.runners)
        self.counters.stepped(plan, self.runners, held, started)
        return events

    def _draft(self, plan: Plan) -> Drafted:
        """Let the plan's granted requests run ahead, and have its work verify what they drafted."""
        if not plan.granted:
            return Drafted()
        started = perf_counter()
        drafted = draft(
            plan,
            self._choices,
            self.speculator.proposed,
            runners=self.runners,
            backend=self.backend,
            adjuster=self._adjuster,
            graphs=self.graphs,
        )
        plan.run_ahead(drafted.passes)
        self.speculator.drafted(plan, drafted, perf_counter() - started, self.runners)
        return drafted

    def _verified(self, choice: Choice, wish: Wish, accepted: int) -> None:
        """The first `accepted` of a choice's drafts stand; none is supposed any more."""
        drafts, stood = len(choice.scheduled.drafts), max(0, accepted)
        if drafts:
            choice.drafted += drafts
            choice.accepted += stood
            self.speculator.verified(choice, drafts, stood)
            name = "lookup" if wish.drafter is None else wish.drafter.model.name
            self.counters.verified(name, drafts, stood)
            choice.adjustments.take_back()

    def _retreat(self, choices: Iterable[Choice]) -> None:
        """A model broke down over their drafts, or would have without. What it left behind their texts goes, and they
        go on a token at a time."""
        for choice in choices:
            choice.ahead = None
            for lane in choice.scheduled.lanes:
                self.runners[lane.trunk].clear(lane.blocks, lane.computed)

    def _rows_to_sample(self, plan: Plan, counts: Mapping[Choice, int]) -> list[FusedRow]:
        """The last rows of the plan's requests, `counts` being how many each has: one to draw from, and one for each
        draft before it."""
        rows: list[FusedRow] = []
        for request in plan.sampling:
            choice = self._choices[request.request_id]
            if choice.max_output:
                drafts, last = len(request.drafts), counts[choice] - 1
                rows.extend(
                    FusedRow(choice, last - drafts + ahead, ahead=ahead) for ahead in range(drafts + 1)
                )
        probing = (self._choices[request.request_id] for request in plan.probing)
        return [*rows, *(FusedRow(choice, counts[choice] - 1, alone=True) for choice in probing)]

    def _rule(
        self, rows: Sequence[FusedRow], drafted: Drafted
    ) -> tuple[list[FusedRow], list[RowAdjustments], dict[str, Halt]]:
        """The rows of choices that go on, what adjusts each of them, and why the other choices end."""
        ahead = drafted.rows
        others = {row.choice.key: row.choice.adjustments for row in rows if row.choice.key not in ahead}
        ruled, halted = self._adjuster.rule(others)
        rows = [row for row in rows if row.choice.key not in halted]
        adjusted = [
            ahead[row.choice.key][row.ahead] if row.choice.key in ahead else ruled[row.choice.key]
            for row in rows
        ]
        return rows, adjusted, halted

    def _sample(
        self, rows: Sequence[FusedRow], adjusted: Sequence[RowAdjustments], logits: LogitRows
    ) -> list[Sampled | Halt | None]:
        """Fuse, solve, adjust, pick and explain. None for a row that has no law (NaN, infinite or empty), and for one
        that needs its other lanes first; why it ends for one whose law is ruled out as a whole."""
        batch = with_solved_weights(self.backend, rows, build_batch(rows, logits))
        entropies = target_entropies(rows)
        temperatures = None if entropies is None else self.backend.temperatures(batch, entropies).cpu()
        adjustments = self._adjuster.adjustments(adjusted)
        controls = build_controls(rows, temperatures, adjustments)
        picks = self.backend.pick(batch, controls)
        tokens, valid = picks.tokens.tolist(), picks.valid.tolist()
        kl, flips, weights = picks.kl.tolist(), picks.flips.tolist(), batch.weights.tolist()
        removed = [0.0] * len(rows) if picks.removed is None else picks.removed.tolist()
        laws = token_logprobs(tokens, picks.raw, controls.listed)
        sampled = [
            Sampled(
                tokens[number],
                wanted(row, laws[number]),
                kl=kl[number],
                flip=flips[number],
                weights=weights_used(row, weights[number]),
                removed=removed[number],
                gated=row.alone,
            )
            for number, row in enumerate(rows)
        ]
        reasons = explain(self.backend, rows, logits, sampled, laws)
        certificates = certify(self.backend, rows, adjusted, logits, self._adjuster)
        halts = self._ruled_out(adjusted, batch, valid)
        results: list[Sampled | Halt | None] = []
        for number, row in enumerate(rows):
            row.choice.scheduled.awaiting = False
            if not valid[number]:
                results.append(halts[number])
            elif row.alone and not is_sure(row.choice, laws[number]):
                row.choice.held = logits.row(row.choice.scheduled.lanes[0])
                row.choice.scheduled.awaiting = True
                results.append(None)
            else:
                results.append(
                    replace(sampled[number], explanation=reasons[number], certificate=certificates[number])
                )
        return results

    def _ruled_out(
        self, adjusted: Sequence[RowAdjustments], batch: RowBatch, valid: Sequence[bool]
    ) -> list[Halt | None]:
        """Why rows end without a token though their models are sound: because of their masks, or of what the request
        multiplies with. One more call of the kernels where any row is without a token and any has a mask."""
        halts: list[Halt | None] = [None] * len(adjusted)
        if all(valid):
            return halts
        lawful = [False] * len(adjusted)
        if max(row.mask for row in adjusted) >= 0:
            lawful = self.backend.pick(batch, PickControls.greedy(len(adjusted))).valid.tolist()
        for number, row in enumerate(adjusted):
            if valid[number]:
                continue
            if lawful[number]:
                halts[number] = row.lawless()
            elif models_are_sound(batch, number):
                halts[number] = NO_FINITE_SCORE
        return halts

    def _accept_scores(
        self, counts: Mapping[Choice, int], scores: Mapping[Choice, Sequence[Score | Halt | None]]
    ) -> list[OutputEvent]:
        """The events of choices that end with the scores of this step. Others tell them with their first token."""
        events = []
        for choice in counts:
            scoring, found = choice.scoring, scores.get(choice, ())
            known = [score for score in found if isinstance(score, Score)]
            halt = next((score for score in found if isinstance(score, Halt)), None)
            if halt is not None:
                events.append(self._halt(choice, halt))
            elif len(known) < len(found):
                events.append(self._fail_numerically(choice))
            elif scoring is not None:
                scoring.add(known)
                if not choice.max_output and not scoring.next(1):
                    events.append(self._finish(choice, scoring.tell(choice.end(FinishReason.LENGTH))))
        return events

    def _accept(
        self,
        rows: Sequence[FusedRow],
        sampled: Sequence[Sampled | Halt | None],
        accepted: Mapping[ScheduledRequest, int],
    ) -> list[OutputEvent]:
        """Each choice's tokens: those of the rows before its accepted drafts, and the one after these."""
        events = []
        now = perf_counter()
        taken: list[tuple[Choice, Sampled]] = []
        gaps: dict[Choice, float | None] = {}
        for row, result in zip(rows, sampled, strict=True):
            choice = row.choice
            if (
                choice.key not in self._choices
            ):  # ended by a token before this one, or its prompt could not be scored
                continue
            if row.ahead > accepted.get(choice.scheduled, 0):  # after a draft that does not stand
                continue
            if isinstance(result, Halt):
                events.append(self._halt(choice, result))
            elif result is not None:
                taken.append((choice, result))
                if choice not in gaps:
                    gaps[choice] = choice.clock.token(now)
                event = choice.accept(result)
                if choice.scoring is not None:
                    event = choice.scoring.tell(event)
                events.append(event if event.finish_reason is None else self._finish(choice, event))
            elif not choice.scheduled.awaiting:
                events.append(self._fail_numerically(choice))
        self.counters.sampled(taken, gaps)
        return events

    def _fail(self, plan: Plan, message: str) -> list[OutputEvent]:
        keys = {item.request.request_id for work in plan.work.values() for item in work}
        return [
            self._finish(self._choices[key], self._choices[key].end(FinishReason.ERROR, message))
            for key in sorted(keys)
        ]

    def _fail_numerically(self, choice: Choice) -> OutputEvent:
        """The fused row was NaN, infinite or empty. Its KV may be NaN as well: nobody may find it, and what nobody
        else holds is zeroed before another request gets the blocks."""
        self.counters.nonfinite_choices += 1
        for lane in choice.scheduled.lanes:
            alone = self.pools[lane.trunk].withdraw(lane.blocks)
            if alone:
                self.runners[lane.trunk].clear(alone)
        message = "The models gave no finite score for the next token; try smaller weights or other experts."
        return self._finish(choice, choice.end(FinishReason.ERROR, message))

    def _halt(self, choice: Choice, halt: Halt) -> OutputEvent:
        event = choice.end(halt.reason, halt.message, refused=halt.refused)
        if choice.scoring is not None and halt.reason is FinishReason.STOP:
            event = choice.scoring.tell(event)
        return self._finish(choice, event)

    def _finish(self, choice: Choice, event: OutputEvent) -> OutputEvent:
        del self._choices[choice.key]
        self.scheduler.finish(choice.scheduled)
        self.offers.release(choice.models)
        self.counters.ended(choice, event)
        return event

    def check(self) -> None:
        """Raise AssertionError if bookkeeping is broken. For tests, after every step."""
        self.scheduler.check()
        live = {request.request_id for request in (*self.scheduler.running, *self.scheduler.waiting)}
        assert live == set(self._choices), "scheduler and engine know different requests"
        assert all(
            choice.scheduled.state is not RequestState.FINISHED for choice in self._choices.values()
        ), "a finished choice is still known"


def _accepted(
    rows: Sequence[FusedRow], sampled: Sequence[Sampled | Halt | None]
) -> tuple[dict[ScheduledRequest, int], set[Choice]]:
    """How many drafts of each request stand, in the sense of `Scheduler.commit`: the leading ones that are what their
    rows drew. And the choices with drafts of which some row has no law: masked or not, a NaN over a draft reaches the
    rows before it in the same forward, so such a row says nothing, and its token is for the next step to draw."""
    accepted: dict[ScheduledRequest, int] = {}
    broken: set[Choice] = set()
    for row, result in zip(rows, sampled, strict=True):
        request, ahead = row.choice.scheduled, row.ahead
        if not request.drafts:
            continue
        if result is None:
            broken.add(row.choice)
        if ahead != accepted.get(request, 0):
            continue
        if result is None:
            accepted[request] = ahead - 1
        elif ahead < len(request.drafts) and isinstance(result, Sampled):
            accepted[request] = ahead + (result.token == request.drafts[ahead])
    return accepted, broken
