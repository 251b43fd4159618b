"""From a submission to choices: everything that can be refused is refused here, before anything is queued."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from proxyserve.engine.adjustments import ChoiceAdjustments
from proxyserve.engine.choice import Choice, choice_seed
from proxyserve.engine.constraint import Constraint, ConstraintFailed
from proxyserve.engine.offer import Offer
from proxyserve.engine.scoring import plan_scoring
from proxyserve.engine.seen_tokens import SeenTokens
from proxyserve.engine.submission import LanePrompts, Submission
from proxyserve.engine.token_rules import GRAMMAR, TokenRules, conflict_message, narrow
from proxyserve.errors import NO_TOKEN_LEFT, ExpertParked, Forbidden, InvalidRequest
from proxyserve.fusion.binding import BoundProgram, LaneSpec, bind
from proxyserve.fusion.catalog import Catalog
from proxyserve.fusion.fusion import Fusion
from proxyserve.fusion.permission import check_experts
from proxyserve.fusion.program import BASE_LANE
from proxyserve.fusion.remote_base import over_remote_base
from proxyserve.kv.block_pool import BlockPool
from proxyserve.models.loaded_model import LoadedModel
from proxyserve.models.remote import AnyModel
from proxyserve.scheduler.lane import Lane
from proxyserve.scheduler.request import ScheduledRequest
from proxyserve.text.detokenizer import Detokenizer
from proxyserve.types import ModelKey


def prepare(
    submission: Submission,
    offer: Offer,
    *,
    pools: Mapping[ModelKey, BlockPool],
    block_size: int,
    share_prefixes: bool,
) -> list[Choice]:
    """Make the `n` choices of a submission. Raises InvalidRequest, UnknownModel or Forbidden, naming the field.

    `pools` has the KV pool of each trunk. With `share_prefixes` off, prefix-cache entries are
    still shared between the choices of this submission, and with nobody else.
    """
    if submission.n < 1:
        raise InvalidRequest("n must be at least 1.", param="n")
    fusion, catalog, caller = submission.fusion, offer.catalog, submission.caller
    _check_logprobs(submission)
    compiled = fusion.compile(catalog)
    check_experts(compiled, catalog, caller.experts, param="model" if submission.vetted else None)
    offer.policy.check(fusion, compiled, admin=caller.admin, vetted=submission.vetted, explain=caller.explain)
    program = bind_fusion(fusion, catalog, submission.prompts)
    _check_length(
        submission, program, pools, block_size
    )  # first, so that no overlong prompt is walked through
    for spec in program.lanes:
        _check_prompt(spec, submission)
    _check_ids(submission, program)
    _check_entropy(submission)
    scoring = plan_scoring(submission, program)
    samples = submission.sampling.max_tokens > 0
    if submission.n > 1 and not samples:
        raise InvalidRequest("n must be 1 with max_tokens 0, since nothing is sampled.", param="n")
    unscored = 0 if scoring is None else len(scoring.targets)
    # Nobody asks what comes after the last token if nothing is sampled: the row before it is the last one then.
    unrun = 1 if unscored and not samples else 0
    stop_ids = frozenset().union(*(spec.model.eos_ids for spec in program.lanes))
    rules = _token_rules(submission, program, stop_ids)
    names = (name.partition("@")[0] for spec in program.lanes for name in spec.names)
    experts = dict.fromkeys(
        name.rpartition(".")[0] for name in names if name.endswith((".tuned", ".untuned"))
    )
    known = catalog.models.experts
    generations = {name: known[name].generation for name in experts if name in known}
    salt = submission.salt if share_prefixes else f"{submission.salt}\0{submission.request_id}"
    choices: list[Choice] = []
    for index in range(submission.n):
        output: list[int] = []
        lanes = tuple(
            Lane(
                spec.model.key,
                spec.prompt[: len(spec.prompt) - unrun],
                output,
                salt,
                spec.model.trunk.key,
                _cost(spec.model, catalog),
            )
            for spec in program.lanes
        )
        scheduled = ScheduledRequest(
            f"{submission.request_id}/{index}",
            lanes,
            output,
            leader=choices[0].scheduled if choices else None,
            unscored=0 if choices else unscored - unrun,
            gated=samples and fusion.gate is not None and len(lanes) > 1,
            caller=caller.name,
            priority=submission.priority,
            max_running=caller.limits.running,
        )
        choices.append(
            Choice(
                submission=submission,
                index=index,
                scheduled=scheduled,
                program=program,
                stop_ids=stop_ids,
                max_output=submission.sampling.max_tokens,
                generations=generations,
                detokenizer=Detokenizer(
                    catalog.models.base.tokenizer,
                    submission.sampling.stop,
                    prompt=submission.prompts.of(BASE_LANE),
                    skip_special_tokens=submission.sampling.skip_special_tokens,
                ),
                seed=choice_seed(submission.sampling.seed, index),
                adjustments=ChoiceAdjustments(
                    params=submission.sampling,
                    output=output,
                    drafts=scheduled.drafts,
                    rules=rules,
                    seen=_seen_tokens(submission, program),
                    constraints=_constraints(submission),
                ),
                scoring=None if choices else scoring,
            )
        )
    _check_first_token(choices[0].adjustments)  # all begin alike
    return choices


def check_presets(offer: Offer) -> None:
    """Raise InvalidRequest, naming the preset, if one of them cannot work. Those whose experts are parked are checked
    when they are called."""
    for name, preset in offer.catalog.presets.items():
        try:
            program = preset.compile(offer.catalog)
            offer.policy.check(preset, program, admin=True, vetted=True)
            over_remote_base(program, preset, offer.catalog)
        except ExpertParked:
            continue
        except InvalidRequest as error:
            raise InvalidRequest(f"Preset '{name}': {error.message}", param=error.param) from None


def bind_fusion(fusion: Fusion, catalog: Catalog, prompts: LanePrompts) -> BoundProgram:
    """The program of a request. An explanation or a gate wants to hear the base whatever the rule."""
    watched = (BASE_LANE,) if fusion.explain or fusion.gate is not None else ()
    program = over_remote_base(fusion.compile(catalog), fusion, catalog)
    return bind(program, catalog, prompts.of, watched=watched)


def context_room(program: BoundProgram) -> int:
    """Tokens that can be generated before the first lane's context is full. May be negative."""
    return min(spec.model.context_length - len(spec.prompt) for spec in program.lanes)


def memory_room(program: BoundProgram, pools: Mapping[ModelKey, BlockPool], block_size: int) -> int:
    """Tokens that can be generated before the KV pools are full, were nothing else in them. May be negative."""
    pool_of = [pools[spec.model.trunk.key] for spec in program.lanes]
    lanes_of = Counter(pool_of)
    return min(
        pool.num_blocks // lanes_of[pool] * block_size - len(spec.prompt)
        for spec, pool in zip(program.lanes, pool_of, strict=True)
    )


def _cost(model: AnyModel, catalog: Catalog) -> float:
    """Of running a token through the model, beside one through the base: by their parameters, which is what a step
    reads. A remote base costs this machine nothing that could be weighed; then all cost alike."""
    base = catalog.models.base
    if not (isinstance(model, LoadedModel) and isinstance(base, LoadedModel)):
        return 1.0
    if model.trunk is base:
        return 1.0
    parts = 1 if base.sharding is None else base.sharding.size  # all of which read theirs at the same time
    return model.trunk.parameters * parts / base.parameters


def _check_logprobs(submission: Submission) -> None:
    """What the caller may have listed per token; the server's own limit was checked before."""
    most, sampling = submission.caller.limits.logprobs, submission.sampling
    if most is None:
        return
    for param, asked in (
        ("logprobs", sampling.logprobs or 0),
        ("prompt_logprobs", sampling.prompt_logprobs or 0),
        ("logprob_token_ids", len(sampling.logprob_token_ids)),
        ("fusion.explain", submission.fusion.explain),
    ):
        if asked > most:
            raise Forbidden(
                f"{asked} log-probabilities per token are asked for; this key may have {most}.", param=param
            )


def _prompt_field(spec: LaneSpec, submission: Submission) -> str:
    """Where the request says what this lane is prompted with."""
    if spec.names[0] in submission.fusion.prompts:
        return f"fusion.prompts.{spec.names[0]}"
    return "prompt"


def _check_prompt(spec: LaneSpec, submission: Submission) -> None:
    where = _prompt_field(spec, submission)
    if not spec.prompt:
        raise InvalidRequest(
            f"The prompt of lane '{spec.names[0]}' is empty; give at least one token.", param=where
        )
    for token in spec.prompt:
        if token not in spec.model.vocabulary:
            raise InvalidRequest(
                f"Token id {token} is not in the vocabulary of '{spec.model.name}' "
                f"(ids 0 to {spec.model.vocabulary.size - 1}).",
                param=where,
            )


def _check_ids(submission: Submission, program: BoundProgram) -> None:
    sampling = submission.sampling
    named = [
        *((token, f"logit_bias.{token}") for token in sampling.logit_bias),
        *((token, "allowed_token_ids") for token in sampling.allowed_token_ids or ()),
        *((token, "bad_words") for word in sampling.bad_words for token in word),
        *((token, "logprob_token_ids") for token in sampling.logprob_token_ids),
    ]
    for token, where in named:
        if token not in program.vocabulary:
            raise InvalidRequest(
                f"Token id {token} is not in the vocabulary that the request's models share "
                f"(ids 0 to {program.vocabulary.size - 1}).",
                param=where,
            )


def _token_rules(submission: Submission, program: BoundProgram, stop_ids: frozenset[int]) -> TokenRules:
    """Refuses what leaves no token to begin with."""
    rules = TokenRules.of(submission.sampling, program.vocabulary, stop_ids)
    fields = rules.conflict(())
    if fields:
        raise _no_token(fields)
    return rules


def _check_first_token(choice: ChoiceAdjustments) -> None:
    """Refuses constraints and fields that exclude each other from the first token on. What takes longer to show ends
    the choice then."""
    if not choice.constraints or not choice.rules.say_something(()):
        return
    try:
        if choice.whole() is not None:
            return
        left = choice.rules.known.copy()
        for constraint in choice.constraints:
            mask = constraint.mask()
            if mask is not None:
                narrow(left, mask)
    except ConstraintFailed as error:
        raise InvalidRequest(str(error), code=NO_TOKEN_LEFT) from error
    except Exception:  # the first step meets it again, and ends this choice alone
        return
    fields = choice.rules.conflict((), left)
    if fields and not choice.rules.is_whole((), left):
        raise _no_token(fields)


def _no_token(fields: Sequence[str]) -> InvalidRequest:
    named = (field for field in fields if field != GRAMMAR)
    return InvalidRequest(conflict_message(fields), param=next(named, None), code=NO_TOKEN_LEFT)


def _seen_tokens(submission: Submission, program: BoundProgram) -> SeenTokens | None:
    """What penalties go by. Only repetition looks at the prompt, the base's."""
    sampling = submission.sampling
    if not sampling.penalised:
        return None
    prompt = program.lanes[0].prompt if sampling.repetition_penalty != 1.0 else ()
    return SeenTokens(prompt, program.vocabulary)


def _constraints(submission: Submission) -> tuple[Constraint, ...]:
    try:
        return tuple(constrains.start() for constrains in submission.constraints)
    except ConstraintFailed as error:
        raise InvalidRequest(str(error)) from error


def _check_entropy(submission: Submission) -> None:
    if submission.fusion.target_entropy is not None and submission.sampling.greedy:
        raise InvalidRequest(
            "'target_entropy' solves the temperature at each position, and temperature 0 asks for none; leave one out.",
            param="fusion.target_entropy",
        )


def _check_length(
    submission: Submission, program: BoundProgram, pools: Mapping[ModelKey, BlockPool], block_size: int
) -> None:
    wanted = submission.sampling.max_tokens
    for spec in program.lanes:
        length, context = len(spec.prompt), spec.model.context_length
        if length + min(wanted, 1) > context:
            raise InvalidRequest(
                f"The prompt has {length} tokens in lane '{spec.names[0]}', and the context of "
                f"'{spec.model.name}' is {context} tokens, which must also hold the answer; shorten the prompt.",
                param=_prompt_field(spec, submission),
                code="context_length_exceeded",
            )
    in_context, in_memory = context_room(program), memory_room(program, pools, block_size)
    if wanted > in_context:
        raise InvalidRequest(
            f"max_tokens is {wanted}, but after the prompt only {in_context} tokens of context are left; "
            f"use at most {in_context}.",
            param="max_tokens",
            code="context_length_exceeded",
        )
    if wanted > in_memory:
        raise InvalidRequest(
            f"The server's KV memory holds this prompt and {max(0, in_memory)} tokens more, and max_tokens is "
            f"{wanted}; lower it, shorten the prompt, or start the server with a larger --kv-memory.",
            param="max_tokens",
            code="context_length_exceeded",
        )
