"""A base on another server: exact where its answers suffice, certified where they prove it, and never a danger to other
requests."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from proxyserve.api.presets import parse_fusion
from proxyserve.config import EngineConfig
from proxyserve.engine.engine import Engine
from proxyserve.errors import InvalidRequest, LoadError
from proxyserve.fusion.fusion import Fusion
from proxyserve.models.family import ExpertSource, load_family
from proxyserve.models.model_set import ModelSet
from proxyserve.models.remote import RemoteModel
from proxyserve.models.upstream import RemoteSource, UpstreamClient
from proxyserve.text.token_names import unique_names
from proxyserve.text.tokenizer import Tokenizer
from proxyserve.types import FinishReason
from tests.engine.driver import Collected, run, submission
from tests.engine.upstream import SECRET, FakeUpstream, Trouble, serve_fake
from tests.tiny import TinyFamily, make_tokenizer

CONFIG = EngineConfig(max_batch=64, max_batch_tokens=64, kv_memory=4 * 2**20)
PROMPT = (7, 11, 300, 42, 5)
KEY = "sk-nobody-may-see-this"
WIDTH = 384


@pytest.fixture(scope="module")
def laws(tiny_family: TinyFamily) -> dict[str, Callable[[Any], Tensor]]:
    """Whole laws by plain Hugging Face forwards."""

    def law_of(folder: Path) -> Callable[[Any], Tensor]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        model.eval()

        @torch.inference_mode()
        def law(ids: Any) -> Tensor:
            logits = model(torch.tensor([list(ids)]), use_cache=False).logits[0, -1, :WIDTH]
            return torch.log_softmax(logits.double(), dim=0)

        return law

    found = {"base": law_of(tiny_family.base), "small": law_of(tiny_family.untuned)}
    return found | {name: law_of(folder) for name, folder in tiny_family.experts.items()}


@pytest.fixture
def fake(laws: dict[str, Callable[[Any], Tensor]], tiny_family: TinyFamily) -> Iterator[FakeUpstream]:
    with serve_fake(FakeUpstream(laws["base"], Tokenizer.load(tiny_family.base), key=KEY)) as upstream:
        yield upstream


def source_of(fake: FakeUpstream, family: TinyFamily, **changes: Any) -> RemoteSource:
    default = RemoteSource(fake.url, family.base, api_key=KEY, top_k=8, timeout=5.0, backoff=0.01)
    return replace(default, **changes)


def remote_engine(fake: FakeUpstream, family: TinyFamily, **changes: Any) -> Engine:
    experts = [ExpertSource(name, tuned, family.untuned) for name, tuned in family.experts.items()]
    engine = Engine(load_family(source_of(fake, family, **changes), experts, base_name="atlas"), CONFIG)
    fake.calls.clear()
    return engine


def ended(result: Collected) -> Any:
    assert result.last is not None
    assert result.last.error is None, result.last.error
    return result.last


#: Rules that are sums over raw log-probs, and whether a token of theirs can be certified.
RULES: dict[str, tuple[dict[str, Any], bool]] = {
    "base": ({}, True),
    "proxy": ({"experts": {"qa": 1.0, "record": {"weight": -0.5, "schedule": [[0, 1.0], [3, 0.2]]}}}, True),
    "arm": ({"rule": "arm", "experts": {"qa": 0.7}}, True),
    "upscale": ({"rule": "upscale", "experts": {"qa": 1}, "beta": 0.6}, True),
    "formula": ({"rule": "formula", "formula": "0.6*base + 0.7*qa.tuned - 0.4*small"}, True),
    "guidance towards": ({"rule": "guidance", "scale": 0.7, "negative_prompt": [5, 6]}, True),
    "guidance away": ({"rule": "guidance", "scale": 1.5, "negative_prompt": [5, 6]}, False),
    "support": ({"experts": {"qa": 1.0}, "support": {"of": ["qa.tuned"], "top_k": 40}}, True),
}


def test_with_all_log_probs_every_sum_is_that_of_a_local_base(
    fake: FakeUpstream, tiny_family: TinyFamily, tiny_models: ModelSet
) -> None:
    local, remote = Engine(tiny_models, CONFIG), remote_engine(fake, tiny_family, top_k=WIDTH)
    asked = [
        submission(
            name,
            PROMPT,
            fusion=parse_fusion(body),
            by_lane={"base@negative": (5, 6)},
            logprobs=5,
            max_tokens=6,
        )
        for name, (body, _) in RULES.items()
    ]
    expected, got = run(local, asked), run(remote, asked)
    for key, result in got.items():
        assert result.tokens == expected[key].tokens, key
        for mine, theirs in zip(result.logprobs, expected[key].logprobs, strict=True):
            assert [token for token, _ in mine.top] == [token for token, _ in theirs.top], key
            assert dict(mine.top) == pytest.approx(dict(theirs.top), abs=2e-4), key
        report, reference = ended(result).fusion, ended(expected[key]).fusion
        assert report.certified == (6 if RULES[key.partition("/")[0]][1] else 0), key
        assert report.mean_unseen_mass == pytest.approx(0.0, abs=1e-5)
        if reference is not None and key not in (
            "upscale/0",
        ):  # whose origin is another, and so its sum's shape
            assert report.flips == reference.flips and report.mean_kl == pytest.approx(
                reference.mean_kl, abs=1e-3
            )
            assert report.sum_of_weights == pytest.approx(reference.sum_of_weights)


def test_contrast_does_not_ask_the_base(
    fake: FakeUpstream, tiny_family: TinyFamily, tiny_models: ModelSet
) -> None:
    asked = [submission("c", PROMPT, fusion=parse_fusion({"rule": "contrast", "experts": {"qa": 1}}))]
    got = run(remote_engine(fake, tiny_family), asked)["c/0"]
    assert got.tokens == run(Engine(tiny_models, CONFIG), asked)["c/0"].tokens
    assert ended(got).fusion.certified is None and ended(got).fusion.mean_unseen_mass is None
    assert not fake.calls


CERTIFIED = {
    "base": {},
    "proxy": {"experts": {"qa": 1.0}},
    "small weight": {"experts": {"qa": 0.1}},
    "arm": {"rule": "arm", "experts": {"qa": 0.3}},
    "upscale": {"rule": "upscale", "experts": {"qa": 1}, "beta": 1.3},
    "formula": {"rule": "formula", "formula": "base + 0.4*base@other + 0.3*qa"},
}


@pytest.mark.parametrize("rule", CERTIFIED)
def test_certificate_against_the_whole_law(
    rule: str, fake: FakeUpstream, tiny_family: TinyFamily, laws: dict[str, Callable[[Any], Tensor]]
) -> None:
    """For many prompts: K and its bound from the whole law, the condition as it stands in the books."""
    engine = remote_engine(fake, tiny_family)
    body: dict[str, Any] = dict(CERTIFIED[rule])
    other = (9, 10)
    if rule == "formula":
        body["prompts"] = {"base@other": {"tokens": list(other)}}
    generator = torch.Generator().manual_seed(3)
    prompts = [tuple(torch.randint(1, WIDTH, (6,), generator=generator).tolist()) for _ in range(40)]
    by_lane = {"base@other": other}
    asked = [
        submission(str(n), ids, fusion=parse_fusion(body), by_lane=by_lane, max_tokens=1)
        for n, ids in enumerate(prompts)
    ]
    results = run(engine, asked)
    certified = 0
    for number, ids in enumerate(prompts):
        qa, small, base = laws["qa"](ids), laws["small"](ids), laws["base"](ids)
        variant = laws["base"](other)
        parts = {
            "base": (1.0, 0.0 * qa),
            "proxy": (1.0, qa - small),
            "small weight": (1.0, 0.1 * (qa - small)),
            "arm": (1.0, 0.3 * qa),
            "upscale": (1.3, qa - 1.3 * small),
            "formula": (1.0, 0.3 * (qa - small)),
        }
        weight, rest = parts[rule]
        extra = 0.4 if rule == "formula" else 0.0
        full = weight * base + rest + extra * variant
        upper = weight * bounded(base) + rest + extra * bounded(variant)
        inside = base >= torch.topk(base, 8).values[-1]
        exact = inside & (variant >= torch.topk(variant, 8).values[-1]) if extra else inside
        [token] = results[f"{number}/0"].tokens
        report = ended(results[f"{number}/0"]).fusion
        expected = bool(upper[exact].max() >= upper[~exact].max()) if bool(exact.any()) else False
        assert report.certified == int(expected), number
        if expected:
            assert token == int(full.argmax())
        assert bool(inside[token])
        assert report.mean_unseen_mass == pytest.approx(1.0 - float(base[inside].exp().sum()), abs=1e-4)
        certified += expected
    if rule == "base":
        assert certified == 40
    else:
        assert 0 < certified < 40 or rule == "small weight", "the test shows nothing"


def bounded(law: Tensor) -> Tensor:
    """The most that each id can have by its top 8."""
    lowest = torch.topk(law, 8).values[-1]
    return torch.where(law >= lowest, law, lowest)


def test_explanations(fake: FakeUpstream, tiny_family: TinyFamily) -> None:
    """Also where an expert's term has a lane of the base whose server says nothing of the chosen token."""
    body = {"rule": "formula", "formula": "base + 0.5*(qa.tuned - base@other)", "explain": 3}
    asked = [
        submission("e", PROMPT, fusion=parse_fusion(body), by_lane={"base@other": (9, 10)}, max_tokens=8)
    ]
    result = run(remote_engine(fake, tiny_family), asked)["e/0"]
    assert len(result.explanations) == 8
    for token in result.explanations:
        assert len(token.lanes["base"].top) == 3 and token.lanes["base"].logprob > -math.inf
        assert all(not math.isnan(push) for push in token.push.values())
    assert ended(result).fusion.certified == 0  # a lane of the base is subtracted


def test_certificates_add_up_over_tokens_and_know_the_bias(
    fake: FakeUpstream, tiny_family: TinyFamily, laws: dict[str, Callable[[Any], Tensor]]
) -> None:
    law = laws["base"](PROMPT)
    hidden = int(torch.topk(law, 30).indices[-1])  # not among the 8 that are returned
    results = run(
        remote_engine(fake, tiny_family),
        [
            submission("plain", PROMPT, max_tokens=5),
            submission("sampled", PROMPT, max_tokens=5, temperature=1.0, seed=1),
            submission("bias", PROMPT, max_tokens=1, logit_bias={hidden: 100.0}),
            submission("two", PROMPT, max_tokens=3, n=2),
        ],
    )
    counts = {key: ended(result).fusion.certified for key, result in results.items()}
    assert counts == {"plain/0": 5, "sampled/0": 5, "bias/0": 0, "two/0": 3, "two/1": 3}


# What the server is asked ---------------------------------------------------------------------------------------


def test_one_call_per_token_and_none_for_chunks(fake: FakeUpstream, tiny_family: TinyFamily) -> None:
    engine = remote_engine(fake, tiny_family)
    prompt = tuple(1 + index % 300 for index in range(200))  # four chunks
    results = run(engine, [submission("long", prompt, {"qa": 1.0}, max_tokens=3)])
    assert [len(call["prompt"]) for call in fake.calls] == [200, 201, 202]
    usage = ended(results["long/0"]).usage
    assert usage.lane_tokens == {"atlas": 202, "qa.tuned": 202, "small": 202}
    call = fake.calls[0]
    assert (call["model"], call["max_tokens"], call["temperature"], call["logprobs"]) == (
        "big/atlas-70B",
        1,
        0,
        8,
    )
    assert call["return_tokens_as_token_ids"] is True
    assert fake.keys == {f"Bearer {KEY}"}
    again = run(engine, [submission("again", prompt, {"qa": 1.0}, max_tokens=1)])
    assert ended(again["again/0"]).usage.cached_tokens == 0  # nothing of the base is kept here


def test_choices_of_one_prompt_share_their_first_call(fake: FakeUpstream, tiny_family: TinyFamily) -> None:
    run(remote_engine(fake, tiny_family), [submission("n", PROMPT, max_tokens=1, n=4)])
    assert len(fake.calls) < 4


def test_calls_of_a_step_run_together(fake: FakeUpstream, tiny_family: TinyFamily) -> None:
    engine = remote_engine(fake, tiny_family)
    fake.trouble = lambda prompt, times: time.sleep(0.3)
    begun = time.perf_counter()
    run(engine, [submission(str(n), (*PROMPT, n + 1), max_tokens=1) for n in range(16)])
    assert time.perf_counter() - begun < 3.0  # one after another it would be 4.8 s


# Failures -------------------------------------------------------------------------------------------------------


def fails_for(marker: int, trouble: Trouble) -> Callable[[tuple[int, ...], int], Trouble | None]:
    return lambda prompt, times: trouble if prompt[0] == marker else None


@pytest.mark.parametrize(
    ("status", "words"),
    [(400, "answered 400"), (500, "answered 500"), (0, "cannot be reached"), (302, "answered 302")],
)
def test_a_failure_ends_its_own_requests_only(
    status: int, words: str, fake: FakeUpstream, tiny_family: TinyFamily
) -> None:
    engine = remote_engine(fake, tiny_family)
    fake.trouble = fails_for(99, Trouble(status, {"location": "/elsewhere"}))
    asked = [
        submission("bad", (99, 1), {"qa": 1.0}),
        submission("good", PROMPT, {"qa": 1.0}),
        submission("local", PROMPT, fusion=parse_fusion({"rule": "contrast", "experts": {"qa": 1}})),
    ]
    results = run(engine, asked)
    bad = results["bad/0"].last
    assert bad is not None and bad.finish_reason is FinishReason.ERROR
    assert bad.error is not None and words in bad.error and SECRET not in bad.error
    assert len(results["good/0"].tokens) == len(results["local/0"].tokens) == 12
    assert len([call for call in fake.calls if call["prompt"][0] == 99]) == (1 if status in (400, 302) else 5)
    fake.trouble = lambda prompt, times: None
    ended(run(engine, [submission("bad", (99, 1), {"qa": 1.0})])["bad/0"])


@pytest.mark.parametrize("trouble", [Trouble(503), Trouble(429, {"retry-after": "0.3"}), Trouble(0)], ids=str)
def test_passing_failures_are_tried_again(
    trouble: Trouble, fake: FakeUpstream, tiny_family: TinyFamily
) -> None:
    engine = remote_engine(fake, tiny_family)
    expected = run(engine, [submission("r", PROMPT, max_tokens=2)])["r/0"].tokens
    fake.calls.clear()
    fake.trouble = lambda prompt, times: trouble if times < 2 else None
    begun = time.perf_counter()
    result = run(engine, [submission("r", PROMPT, max_tokens=2)])["r/0"]
    assert result.tokens == expected and ended(result).fusion.certified == 2
    assert len(fake.calls) == 6
    if trouble.status == 429:  # waited as it was told to
        assert time.perf_counter() - begun >= 1.2


@pytest.mark.parametrize("wait", ["3600", "Fri, 31 Dec 2100 23:59:59 GMT"])
def test_no_waiting_beyond_the_timeout(wait: str, fake: FakeUpstream, tiny_family: TinyFamily) -> None:
    engine = remote_engine(fake, tiny_family)
    fake.trouble = lambda prompt, times: Trouble(429, {"retry-after": wait})
    last = run(engine, [submission("r", PROMPT)])["r/0"].last
    assert last is not None and "429 and asked to wait" in str(last.error)
    assert len(fake.calls) == 1


@pytest.mark.parametrize("kind", ["silent", "trickling"])
def test_a_slow_server_costs_the_timeout(kind: str, fake: FakeUpstream, tiny_family: TinyFamily) -> None:
    engine = remote_engine(fake, tiny_family, timeout=0.5)

    def slow(prompt: tuple[int, ...], times: int) -> Trouble | None:
        if prompt[0] != 99:
            return None
        if kind == "trickling":
            return Trouble(200, {"x-test": "trickle"})
        time.sleep(1.5)
        return None

    fake.trouble = slow
    begun = time.perf_counter()
    results = run(engine, [submission("slow", (99, 1)), submission("good", PROMPT)])
    assert time.perf_counter() - begun < 1.4
    last = results["slow/0"].last
    assert last is not None and "did not answer within 0.5 s" in str(last.error)
    assert len(results["good/0"].tokens) == 12


def test_answers_that_are_none(fake: FakeUpstream, tiny_family: TinyFamily) -> None:
    engine = remote_engine(fake, tiny_family)
    odd: list[Any] = [
        None,
        {},
        {"tokens": [], "top_logprobs": []},
        {"tokens": ["a"], "top_logprobs": [{"a": "x"}]},
    ]
    odd += [{"tokens": ["a"], "top_logprobs": [None]}, {"tokens": ["a"], "top_logprobs": [{"a": math.nan}]}]
    for logprobs in odd:
        fake.logprobs = lambda _, logprobs=logprobs: logprobs
        last = run(engine, [submission("r", PROMPT)])["r/0"].last
        assert last is not None and "without log-probs" in str(last.error), logprobs


def test_a_drawn_token_beyond_the_top_bounds_nothing(fake: FakeUpstream, tiny_family: TinyFamily) -> None:
    """Some servers list the drawn token too, and draw with penalties of their own."""

    def with_drawn(logprobs: dict[str, Any]) -> dict[str, Any]:
        return {
            **logprobs,
            "tokens": ["token_id:3"],
            "top_logprobs": [{**logprobs["top_logprobs"][0], "token_id:3": -30.0}],
        }

    engine = remote_engine(fake, tiny_family)
    base = engine.models.base
    assert isinstance(base, RemoteModel)
    before = base.client.top_logprobs(PROMPT, base.client.deadline())
    fake.logprobs = with_drawn
    after = base.client.top_logprobs(PROMPT, base.client.deadline())
    assert after.bound == before.bound > -30.0
    assert after.logprobs == {**before.logprobs, 3: -30.0}


# A server that does not name tokens by id -----------------------------------------------------------------------


@pytest.mark.parametrize("manner", ["refused", "ignored"])
def test_tokens_named_by_text(
    manner: str, fake: FakeUpstream, tiny_family: TinyFamily, tiny_models: ModelSet
) -> None:
    fake.by_id = manner
    engine = remote_engine(fake, tiny_family, top_k=WIDTH)
    base = engine.models.base
    assert isinstance(base, RemoteModel) and not base.client.by_id
    asked = [submission("a", PROMPT), submission("b", PROMPT, {"qa": 1.0})]
    results, expected = run(engine, asked), run(Engine(tiny_models, CONFIG), asked)
    assert {key: result.tokens for key, result in results.items()} == {
        key: result.tokens for key, result in expected.items()
    }
    assert not any("return_tokens_as_token_ids" in call for call in fake.calls)


def test_a_text_that_several_ids_have_is_dropped_and_bounds(
    laws: dict[str, Callable[[Any], Tensor]], tmp_path: Path
) -> None:
    tokenizer_files = make_tokenizer(extra=("fox", "twin"))
    tokenizer_files.save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    names = unique_names(tokenizer, range(tokenizer.vocabulary_size))
    clash = next(name for name in (" the", "fox", "twin", "a") if name in names)
    wide = {name: token for name, token in names.items() if name != clash}  # as if two ids had it

    def law(ids: Any) -> Tensor:
        scores = torch.zeros(tokenizer.vocabulary_size, dtype=torch.float64)
        scores[names[clash]], scores[5], scores[6] = 3.0, 2.0, 1.0
        return torch.log_softmax(scores, dim=0)

    with serve_fake(FakeUpstream(law, tokenizer)) as fake:
        client = UpstreamClient(RemoteSource(fake.url, tmp_path, top_k=3), wide, by_id=False)
        answer = client.top_logprobs([1, 2], client.deadline())
    assert set(answer.logprobs) == {5, 6}
    assert answer.bound == pytest.approx(float(law([])[names[clash]]))  # some token has that much
    assert answer.unseen > math.exp(answer.bound)


def test_names_that_several_ids_have() -> None:
    class Pieces:
        def token_bytes(self, token: int) -> bytes:
            return [b"a", b"b", b"a", b"\xc3"][token]

    assert unique_names(Pieces(), range(4)) == {"b": 1, "bytes:\\xc3": 3}


# Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"rule": "dynamic", "experts": {"qa": 1}}, "fusion.rule"),
        ({"rule": "mixture", "models": {"base": 0.5, "qa.tuned": 0.5}}, "fusion.rule"),
        ({"rule": "unlearn", "experts": {"qa": 1}}, "fusion.rule"),
        ({"rule": "upscale", "experts": {"qa": 1}, "top_p": 0.9}, "fusion.rule"),
        ({"rule": "formula", "formula": "qa.tuned - 0.5*base"}, "fusion.rule"),
        ({"experts": {"qa": 1}, "support": {"of": ["base"], "top_k": 5}}, "fusion.support"),
        ({"experts": {"qa": 1}, "support": {"of": ["fused"], "top_k": 5}}, "fusion.support"),
        (
            {"experts": {"qa": 1}, "support": {"of": ["tuned"], "top_k": 5, "outside": "base"}},
            "fusion.support",
        ),
        ({"experts": {"qa": 1}, "gate": {"confidence": 0.9}}, "fusion.gate"),
        ({"target_entropy": 1.0}, "fusion.target_entropy"),
    ],
    ids=str,
)
def test_what_needs_the_whole_law_is_refused(
    body: dict[str, Any], param: str, fake: FakeUpstream, tiny_family: TinyFamily
) -> None:
    engine = remote_engine(fake, tiny_family)
    fusion: Fusion = parse_fusion(body)
    with pytest.raises(InvalidRequest, match="another server") as refused:
        engine.submit(submission("x", PROMPT, fusion=fusion, temperature=1.0))
    assert refused.value.param == param
    with pytest.raises(InvalidRequest, match="house"):
        Engine(engine.models, CONFIG, presets={"house": fusion})
    ended(
        run(
            engine,
            [submission("m", PROMPT, fusion=parse_fusion({"rule": "mixture", "models": {"qa.tuned": 1}}))],
        )["m/0"]
    )


def test_prompts_are_scored_by_local_models_alone(fake: FakeUpstream, tiny_family: TinyFamily) -> None:
    engine = remote_engine(fake, tiny_family)
    with pytest.raises(InvalidRequest, match="another server") as refused:
        engine.submit(submission("x", PROMPT, {"qa": 1.0}, prompt_logprobs=0))
    assert refused.value.param == "prompt_logprobs"
    local = parse_fusion({"rule": "contrast", "experts": {"qa": 1}})
    result = run(engine, [submission("x", PROMPT, fusion=local, prompt_logprobs=0, max_tokens=0)])["x/0"]
    assert result.prompt_logprobs is not None and len(result.prompt_logprobs) == len(PROMPT)
    assert result.prompt_logprobs[0] is None and None not in result.prompt_logprobs[1:]


# Start ----------------------------------------------------------------------------------------------------------


def test_what_a_remote_model_looks_like(fake: FakeUpstream, tiny_family: TinyFamily) -> None:
    models = load_family(source_of(fake, tiny_family))
    base = models.base
    assert isinstance(base, RemoteModel)
    assert base.name == "atlas-70B" and base.client.model == "big/atlas-70B"
    assert (base.context_length, base.parameters, base.bytes) == (256, 0, 0)
    assert 0 in base.eos_ids and base.vocabulary.size == WIDTH
    engine = Engine(models, CONFIG)  # without experts nothing runs here at all
    assert not engine.residents.arenas and engine.residents.bytes == 0
    assert engine.pools[base.key].num_blocks * CONFIG.block_size >= 64 * 256
    assert KEY not in repr(base.client.source)
    assert load_family(source_of(fake, tiny_family, context=99)).base.context_length == 99


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda fake: setattr(fake, "key", "another"), "--base-api-key-file"),
        (lambda fake: setattr(fake, "listing", None), "--base-model"),
        (lambda fake: setattr(fake, "listing", {"data": []}), "lists no model"),
        (lambda fake: setattr(fake, "max_logprobs", 5), "--base-top-k"),
        (lambda fake: setattr(fake, "logprobs", lambda logprobs: None), "log-probs"),
        (lambda fake: setattr(fake, "law", lambda ids: torch.zeros(WIDTH)), "sum to 8"),
        (lambda fake: setattr(fake, "url", "http://127.0.0.1:9/v1"), "running"),
        (lambda fake: setattr(fake, "url", "http://user:pass@127.0.0.1:9/v1"), "bare"),
        (lambda fake: setattr(fake, "url", fake.url.replace("/v1", "") + "?x=1"), "bare"),
        (lambda fake: setattr(fake, "trouble", lambda prompt, times: Trouble(500)), "answered 500"),
    ],
    ids=range(10),
)
def test_what_is_found_at_the_start(
    spoil: Callable[[FakeUpstream], None],
    words: str,
    fake: FakeUpstream,
    tiny_family: TinyFamily,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spoil(fake)
    with caplog.at_level(logging.DEBUG), pytest.raises(LoadError) as refused:
        load_family(source_of(fake, tiny_family))
    assert words in refused.value.message
    assert SECRET not in refused.value.message
    assert KEY not in refused.value.message + caplog.text


@pytest.mark.parametrize("manner", ["yes", "refused"])
def test_another_tokenizer_is_found_out(manner: str, fake: FakeUpstream, tiny_family: TinyFamily) -> None:
    fake.by_id = manner
    fake._text = lambda token: f"<{token}>"  # type: ignore[method-assign]
    with pytest.raises(LoadError, match="--base-tokenizer"):
        load_family(source_of(fake, tiny_family))
    with pytest.raises(LoadError, match="no such folder"):
        load_family(source_of(fake, tiny_family, tokenizer=Path("/nowhere")))
