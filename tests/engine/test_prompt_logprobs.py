"""Log-probs of prompt tokens under the fused law, against plain Hugging Face forwards over the whole prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from proxyserve.api.presets import parse_fusion
from proxyserve.config import EngineConfig
from proxyserve.engine.engine import Engine
from proxyserve.engine.submission import Submission
from proxyserve.errors import InvalidRequest
from proxyserve.fusion.fusion import Fusion
from proxyserve.fusion.lane_prompt import LanePrompt
from proxyserve.models.model_set import ModelSet
from proxyserve.types import FinishReason, TokenLogprob
from tests.engine import test_heads
from tests.engine.driver import Collected, run, submission
from tests.engine.test_rule_parity import PUSHES, RULES, make_engine, plain_model
from tests.fusion import papers
from tests.fusion.papers import Laws, PaperRule
from tests.tiny import TinyFamily

A, B = "qa", "record"
PROMPT = [7, 11, 300, 42, 5, 23, 90, 7, 11, 42]
LONG = [(place * 37 + place * place) % 380 for place in range(1, 45)]
FRONT = [15, 201, 33]  # what some lanes have before the prompt


@dataclass
class Plain:
    """The models again, and what their whole laws are along a prompt."""

    models: ModelSet
    plain: Mapping[str, PreTrainedModel]

    @property
    def width(self) -> int:
        return self.models.base.vocabulary.size

    @torch.inference_mode()
    def laws(self, prompts: Mapping[str, Sequence[int]], count: int) -> list[Laws]:
        """By lane, for each of the last `count` tokens, the law of what it is. Lanes without a prompt have the
        base's."""
        rows: dict[str, Tensor] = {}
        for lane in (*self.plain, "base@negative"):
            ids = torch.tensor([prompts.get(lane, prompts["base"])])
            if ids.shape[1] <= count:
                continue  # this lane takes no part
            logits = self.plain[lane.partition("@")[0]](ids, use_cache=False).logits[0, :-1, : self.width]
            rows[lane] = torch.log_softmax(logits.double(), dim=1)[-count:]
        return [{lane: row[place] for lane, row in rows.items()} for place in range(count)]


@pytest.fixture(scope="module")
def plain(tiny_family: TinyFamily, tiny_models: ModelSet) -> Plain:
    folders = {"base": tiny_family.base, "small": tiny_family.untuned}
    folders |= {f"{name}.tuned": tiny_family.experts[name] for name in (A, B)}
    return Plain(tiny_models, {lane: plain_model(folder) for lane, folder in folders.items()})


def small_engine(models: ModelSet, **config: Any) -> Engine:
    values = {"kv_memory": 2**24, "max_batch": 8, "max_batch_tokens": 17, "max_scored_rows": 17, **config}
    return Engine(models, EngineConfig(**values))


def near(value: object) -> Any:
    """In nats."""
    return pytest.approx(value, abs=1e-4)


def check_scores(
    entries: Sequence[TokenLogprob | None] | None,
    prompt: Sequence[int],
    laws: Sequence[Tensor],
    top: int,
    what: object = "",
) -> None:
    """`laws` are the fused ones of the last tokens; those before have no entry."""
    assert entries is not None and len(entries) == len(prompt), what
    unknown = len(prompt) - len(laws)
    assert all(entry is None for entry in entries[:unknown]), what
    for token, entry, law in zip(prompt[unknown:], entries[unknown:], laws, strict=True):
        assert entry is not None and entry.token_id == token, what
        assert entry.logprob == near(float(law[token])), what
        likelier = int((law > law[token] + 1e-4).sum())  # one rounding may order near ties otherwise
        if law[token] == -math.inf:
            assert entry.rank is None, what
        else:
            assert entry.rank is not None, what
            assert likelier < entry.rank <= int((law > law[token] - 1e-4).sum()), what
        assert len(entry.top) <= top
        assert len(entry.top) == top or bool((law == -math.inf).any())
        for listed, value in entry.top:
            assert value == near(float(law[listed])), what
            assert listed != token or value == entry.logprob, "one token, two values"
        best = law.topk(len(entry.top)).values.tolist()
        assert [value for _, value in entry.top] == near(best), what


def test_every_rule_is_its_papers_formula(plain: Plain) -> None:
    """All in one batch with requests that only generate, in small chunks. Some lanes begin with more than the base's
    prompt, one without its first token."""
    engine = make_engine(plain.models)
    engine.scheduler.max_batch_tokens, engine.scheduler.max_scored_rows = 48, 40
    prompts = {
        "base": PROMPT,
        f"{A}.tuned": [*FRONT, *PROMPT],
        f"{B}.tuned": PROMPT[1:],
        "base@negative": [*FRONT[1:], *PROMPT],
    }
    wishes = [
        submission(
            name,
            PROMPT,
            fusion=parse_fusion({**fusion, "explain": 2 * (number % 2)}),
            by_lane=prompts,
            max_tokens=number % 3,
            prompt_logprobs=3,
        )
        for number, (name, (fusion, _)) in enumerate(RULES.items())
    ]
    others = [submission(f"other {number}", PROMPT[number:], {A: 0.5}) for number in range(5)]
    together = [wish for pair in zip(wishes, others, strict=False) for wish in pair] + wishes[len(others) :]
    results = run(engine, together)
    for name, (fusion, paper) in RULES.items():
        result = results[f"{name}/0"]
        has_b = B in str(fusion)  # its lane has one token less, so that the second has nothing before it
        laws = plain.laws(prompts, len(PROMPT) - (2 if has_b else 1))
        fused = [paper(each, 0) for each in laws]
        check_scores(result.prompt_logprobs, PROMPT, fused, 3, name)
        assert (result.prompt_explanations is not None) == (
            wishes[list(RULES).index(name)].fusion.explain > 0
        )
        known = [entry for entry in result.prompt_explanations or () if entry is not None]
        assert not known or len(result.prompt_explanations or ()) == len(PROMPT)
        for entry, law, each in zip(reversed(known), reversed(fused), reversed(laws), strict=False):
            assert entry.kl == pytest.approx(papers.kl(law, each["base"]), abs=1e-4, rel=1e-3), name
            assert entry.flip == (int(law.argmax()) != int(each["base"].argmax())), name
            assert entry.lanes["base"].logprob == near(float(each["base"][entry.token_id]))
            if name in PUSHES:
                assert entry.push == near({A: PUSHES[name](each, entry.token_id)}), name
    generated = run(engine, others)
    assert all(results[key].tokens == result.tokens for key, result in generated.items())


SOME: dict[str, tuple[dict[str, Any], PaperRule]] = {
    "plain": RULES["base"],
    "proxy": RULES["proxy"],
    "guidance": RULES["guidance"],
    "mixture": RULES["mixture, harmonic"],
    "support": RULES["support of two laws"],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "small chunks": {},
    "few rows": {"max_batch_tokens": 64, "block_size": 3},
    "whole prompts": {"max_batch_tokens": 512, "max_scored_rows": 512},
    "no cache": {"prefix_cache": False, "block_size": 4, "max_batch_tokens": 33},
    "preempted": {"kv_memory": 200_000, "block_size": 4, "max_batch_tokens": 24},
}


@pytest.mark.parametrize("config", CONFIGS)
def test_whatever_the_engine_does_inside(plain: Plain, config: str) -> None:
    engine = small_engine(plain.models, **CONFIGS[config])
    prompts = {
        name: {
            "base": LONG[number:],
            f"{A}.tuned": [*FRONT, *LONG[number:]],
            "base@negative": [*FRONT[:1], *LONG[number:]],
        }
        for number, name in enumerate(SOME)
    }
    wishes = [
        submission(
            f"{name} {tokens}",
            own["base"],
            fusion=parse_fusion(SOME[name][0]),
            by_lane=own,
            n=2 if tokens else 1,
            max_tokens=tokens,
            logprobs=2,
            prompt_logprobs=2,
        )
        for name, own in prompts.items()
        for tokens in (0, 6)
    ]
    expected = {
        name: [SOME[name][1](laws, 0) for laws in plain.laws(own, len(own["base"]) - 1)]
        for name, own in prompts.items()
    }
    rows = RowCount(engine)
    for _ in range(2):  # the second time with whatever the first left in the cache
        results = run(engine, wishes, watch=rows.check)
        for name, own in prompts.items():
            ended, first, second = (results[f"{name} {key}"] for key in ("0/0", "6/0", "6/1"))
            for result in (ended, first):
                check_scores(result.prompt_logprobs, own["base"], expected[name], 2, name)
            assert second.prompt_logprobs is None, "the first choice tells for all"
            assert first.tokens == second.tokens and len(first.tokens) == 6
            assert ended.tokens == [] and ended.last is not None and ended.last.usage is not None
            assert ended.last.finish_reason is FinishReason.LENGTH
            assert ended.last.usage.completion_tokens == 0
            assert ended.last.usage.prompt_tokens == len(own["base"])
    assert (engine.counters.preemptions > 0) == (config == "preempted")


class RowCount:
    """Asserts, after every step, how many rows of logits it had."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.before = self.count()

    def count(self) -> int:
        return sum(stats.rows for stats in self.engine.residents.stats.values())

    def check(self) -> None:
        config, before = self.engine.config, self.before
        self.before = self.count()
        # Every running request may have a row to sample from in each of its lanes, which are at most four here.
        assert self.before - before <= config.max_scored_rows + 4 * config.max_batch


def scores(result: Collected) -> list[float]:
    return [entry.logprob for entry in result.prompt_logprobs or () if entry is not None]


def test_alone_and_in_the_crowd(plain: Plain) -> None:
    crowd = [
        submission(f"other {number}", LONG[number:], {A: 0.3}, prompt_logprobs=number % 2 or None)
        for number in range(7)
    ]
    mine = submission("mine", LONG, {A: 1.0, B: -0.5}, max_tokens=4, prompt_logprobs=5)
    together = run(small_engine(plain.models), [*crowd[:4], mine, *crowd[4:]])["mine/0"]
    alone = run(small_engine(plain.models, max_batch_tokens=512, max_scored_rows=512), [mine])["mine/0"]
    assert together.tokens == alone.tokens
    assert scores(together) == near(scores(alone))


def test_what_it_costs(plain: Plain) -> None:
    """Each token runs once in each lane, the last one only if something is sampled from it."""
    engine = small_engine(plain.models, max_batch_tokens=64)
    for tokens in (0, 1, 5):
        for salt, wish in (("scored", 0), ("plain", None)):
            if wish is None and not tokens:
                continue
            wanted = submission(
                "x", LONG, {A: 1.0}, max_tokens=tokens, prompt_logprobs=wish, salt=f"{salt}{tokens}"
            )
            last = run(engine, [wanted])["x/0"].last
            assert last is not None and last.usage is not None
            spent = len(LONG) - 1 + tokens
            assert last.usage.lane_tokens == {"atlas": spent, f"{A}.tuned": spent, "small": spent}


def test_a_context_in_the_cache_is_not_run_again(plain: Plain) -> None:
    engine = small_engine(plain.models, block_size=4, max_batch_tokens=64)
    context, answers = LONG[:33], ([9, 8, 7], [6, 5], [4])
    for answer in answers:
        wish = submission(
            "x", [*context, *answer], {A: 1.0}, max_tokens=0, prompt_logprobs=1, prompt_logprobs_from=33
        )
        result = run(engine, [wish])["x/0"]
        fused = [
            papers.proxy(each["base"], (1.0, each[f"{A}.tuned"], each["small"]))
            for each in plain.laws({"base": [*context, *answer]}, len(answer))
        ]
        check_scores(result.prompt_logprobs, [*context, *answer], fused, 1)
        assert result.last is not None and result.last.usage is not None
        cached = 0 if answer is answers[0] else 32
        assert result.last.usage.cached_tokens == cached
        assert set(result.last.usage.lane_tokens.values()) == {33 + len(answer) - 1 - cached}
    # A token that is to be scored needs the row before it, whatever the cache has.
    again = run(engine, [submission("y", [*context, *answers[0]], {A: 1.0}, prompt_logprobs=0)])["y/0"]
    assert again.last is not None and again.last.usage is not None and again.last.usage.cached_tokens == 0


def test_an_answer_is_scored_by_the_schedule_that_it_was_generated_by(plain: Plain) -> None:
    """Whatever the chunks, and where a lane has less of the prompt. Prompts scored whole have the first weights."""
    schedule = {"weight": 1.5, "schedule": [[0, 1.0], [2, 0.0], [4, -0.5]]}
    fusion = parse_fusion({"experts": {A: schedule}, "explain": 1})
    engine = small_engine(plain.models)
    for by_lane in ({}, {f"{A}.tuned": PROMPT[4:]}):
        answer = run(
            engine, [submission("x", PROMPT, fusion=fusion, by_lane=by_lane, max_tokens=7, logprobs=1)]
        )["x/0"]
        text = [*PROMPT, *answer.tokens]
        longer = {lane: [*ids, *answer.tokens] for lane, ids in by_lane.items()}
        wish = submission(
            "y",
            text,
            fusion=fusion,
            by_lane=longer,
            max_tokens=0,
            prompt_logprobs=1,
            prompt_logprobs_from=len(PROMPT),
        )
        result = run(engine, [wish])["y/0"]
        assert scores(result) == near([entry.logprob for entry in answer.logprobs])
        weights = [entry.weights[A] for entry in result.prompt_explanations or () if entry is not None]
        assert weights == [entry.weights[A] for entry in answer.explanations]
        assert weights == [1.5, 1.5, 0.0, 0.0, -0.75, -0.75, -0.75]
    whole = run(engine, [submission("z", text, fusion=fusion, max_tokens=0, prompt_logprobs=0)])["z/0"]
    fused = [
        papers.proxy(each["base"], (1.5, each[f"{A}.tuned"], each["small"]))
        for each in plain.laws({"base": text}, len(text) - 1)
    ]
    check_scores(whole.prompt_logprobs, text, fused, 0)


def test_a_prompt_of_one_token_has_nothing_to_score(plain: Plain) -> None:
    engine = small_engine(plain.models)
    results = run(
        engine,
        [
            submission("ends", [5], {A: 1.0}, max_tokens=0, prompt_logprobs=2),
            submission("goes on", [5], {A: 1.0}, max_tokens=2, prompt_logprobs=2),
            submission("scored", [5], {A: 1.0}, by_lane={lane: [3, 5] for lane in ("base", f"{A}.tuned")}),
        ],
    )
    assert results["ends/0"].prompt_logprobs == results["goes on/0"].prompt_logprobs == (None,)
    assert results["ends/0"].tokens == [] and len(results["goes on/0"].tokens) == 2
    assert results["scored/0"].prompt_logprobs is None, "nobody asked"


@pytest.mark.parametrize("tokens", [0, 3])
def test_a_gate_decides_token_by_token(plain: Plain, tokens: int) -> None:
    laws = plain.laws({"base": LONG}, len(LONG) - 1)
    sure = sorted(float(each["base"].max().exp()) for each in laws)
    confidence = (sure[20] + sure[21]) / 2  # half of them on either side
    fusion = {"experts": {A: 1.0}, "gate": {"confidence": confidence}, "explain": 1}
    fused = [
        each["base"]
        if float(each["base"].max().exp()) >= confidence
        else papers.proxy(each["base"], (1.0, each[f"{A}.tuned"], each["small"]))
        for each in laws
    ]
    engine = small_engine(plain.models)
    wish = submission("x", LONG, fusion=parse_fusion(fusion), max_tokens=tokens, prompt_logprobs=2)
    result = run(engine, [wish])["x/0"]
    check_scores(result.prompt_logprobs, LONG, fused, 2)
    gated = [entry.gated for entry in result.prompt_explanations or () if entry is not None]
    assert gated == [float(each["base"].max().exp()) >= confidence for each in laws]
    assert len(result.tokens) == tokens


def test_one_row_of_a_shared_head_says_what_two_do(tiny_family: TinyFamily) -> None:
    """An expert that is an adapter over its untuned model: only the difference goes through the head."""
    shared, apart = test_heads.make_engine(tiny_family), test_heads.make_engine(tiny_family)
    test_heads.small(apart).head_is_linear = False
    wishes = [
        submission("a", LONG, {"e0": 0.8}, prompt_logprobs=3, max_tokens=3),
        submission("b", PROMPT, {"e1": 0.5, "e0": -0.5}, prompt_logprobs=1, max_tokens=0),
        submission("c", LONG[3:], {"qa": 1.0, "e0": 1.0}, prompt_logprobs=0, max_tokens=1),
    ]
    one, two = run(shared, wishes), run(apart, wishes)
    for key, result in one.items():
        assert result.tokens == two[key].tokens
        assert scores(result) == near(scores(two[key]))
    rows = [test_heads.small(engine).stats.rows for engine in (apart, shared)]
    # One per token: of `a` 3 are sampled; `b` makes two rows of its three lanes; `qa` reads the untuned model alone.
    assert rows[0] - rows[1] == len(LONG) - 1 + 3 + len(PROMPT) - 1


def test_cancelled_with_half_of_the_prompt_scored(plain: Plain) -> None:
    engine = small_engine(plain.models)
    [key] = engine.submit(submission("x", LONG, {A: 1.0}, prompt_logprobs=0))
    for _ in range(3):
        assert engine.step() == []
        engine.check()
    assert 0 < engine.scheduler.running[0].unscored < len(LONG) - 1
    event = engine.cancel(key)
    assert event is not None and event.prompt_logprobs is None
    assert not engine.has_work and all(pool.in_use == 0 for pool in engine.pools.values())


def test_a_prompt_that_cannot_be_scored_fails_alone(plain: Plain) -> None:
    engine = small_engine(plain.models, max_batch_tokens=512, max_scored_rows=512)
    embedding = engine.models.expert(A).tuned.module.get_input_embeddings().weight
    saved = embedding.detach().clone()
    with torch.no_grad():
        embedding[LONG[20]] = math.nan
    try:
        wishes = [
            submission(name, LONG, {expert: 1.0}, prompt_logprobs=0, max_tokens=tokens)
            for name, expert, tokens in (("bad", A, 2), ("worse", A, 0), ("good", B, 2))
        ]
        results = run(engine, wishes)
    finally:
        with torch.no_grad():
            embedding.copy_(saved)
    for name in ("bad/0", "worse/0"):
        last = results[name].last
        assert last is not None and last.finish_reason is FinishReason.ERROR
        assert results[name].prompt_logprobs is None
    assert len(scores(results["good/0"])) == len(LONG) - 1
    after = run(engine, [submission("after", LONG, {A: 1.0}, prompt_logprobs=0)])["after/0"]
    assert all(map(math.isfinite, scores(after)))


def test_tokens_that_the_law_rules_out(plain: Plain) -> None:
    fusion = {"experts": {A: 1}, "support": {"of": ["base"], "top_k": 1}}
    wish = submission("x", LONG, fusion=parse_fusion(fusion), max_tokens=0, prompt_logprobs=3)
    result = run(small_engine(plain.models), [wish])["x/0"]
    for entry in (result.prompt_logprobs or ())[1:]:
        assert entry is not None and len(entry.top) == 1 and entry.top[0][1] == pytest.approx(0.0, abs=1e-6)
        assert entry.logprob == (0.0 if entry.top[0][0] == entry.token_id else -math.inf)


def refused(models: ModelSet, wish: Submission) -> tuple[str | None, str]:
    engine = small_engine(models)
    with pytest.raises(InvalidRequest) as caught:
        engine.submit(wish)
    assert not engine.has_work
    return caught.value.param, caught.value.message


def test_what_is_refused(plain: Plain) -> None:
    models = plain.models
    other = {f"{A}.tuned": [*PROMPT[:6], 1, *PROMPT[7:]]}
    param, message = refused(models, submission("x", PROMPT, {A: 1.0}, by_lane=other, prompt_logprobs=0))
    assert param == "prompt_logprobs" and f"{A}.tuned" in message and "last 3 tokens" in message
    own = Fusion(
        parse_fusion({"experts": {A: 1.0}}).rule, prompts={f"{A}.tuned": LanePrompt(tokens=(1, 2, 3))}
    )
    by_lane = {f"{A}.tuned": [1, 2, 3]}
    param, _ = refused(models, submission("x", PROMPT, fusion=own, by_lane=by_lane, prompt_logprobs=0))
    assert param == f"fusion.prompts.{A}.tuned"
    param, _ = refused(models, submission("x", PROMPT, prompt_logprobs=0, prompt_logprobs_from=len(PROMPT)))
    assert param == "prompt_logprobs_from"
    param, _ = refused(models, submission("x", PROMPT, prompt_logprobs=0, max_tokens=0, n=2))
    assert param == "n"
    for wrong in ({"prompt_logprobs_from": 1}, {"prompt_logprobs": 0, "prompt_logprobs_from": -1}):
        with pytest.raises(InvalidRequest, match="prompt_logprobs_from"):
            submission("x", PROMPT, **wrong)
    # From where the texts are the same on, they can be compared.
    agreeing = submission(
        "x", PROMPT, {A: 1.0}, by_lane=other, prompt_logprobs=0, prompt_logprobs_from=7, max_tokens=0
    )
    result = run(small_engine(models), [agreeing])["x/0"]
    laws = plain.laws({"base": PROMPT, **other}, 3)
    fused = [papers.proxy(each["base"], (1.0, each[f"{A}.tuned"], each["small"])) for each in laws]
    check_scores(result.prompt_logprobs, PROMPT, fused, 0)


def test_a_prompt_may_fill_the_context_if_nothing_follows(plain: Plain) -> None:
    context = plain.models.base.context_length
    full = [place % 300 for place in range(context)]
    engine = small_engine(plain.models, max_batch_tokens=512, max_scored_rows=64)
    result = run(engine, [submission("x", full, max_tokens=0, prompt_logprobs=0)])["x/0"]
    assert len(scores(result)) == context - 1
    param, _ = refused(plain.models, submission("x", full, max_tokens=1, prompt_logprobs=0))
    assert param == "prompt"


def test_rows_for_all_lanes_of_a_request(plain: Plain) -> None:
    with pytest.raises(ValueError, match="max_scored_rows must be at least 17, above"):
        small_engine(plain.models, max_scored_rows=16)
