"""Speculative verification: what stands, what follows, and that the text keeps its law."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from proxyserve_kernels import Backend, Drafts, PickControls, Ref, Row, RowBatch, Term, Verdicts
from proxyserve_kernels import reference as slow
from proxyserve_kernels.philox import uniform
from tests.kernels.strategies import examples, floats, interpreted, ints, source
from tests.kernels.test_sampling_statistics import chi_square

INF = math.inf


def rows_of(held: Tensor, rows: int | None = None) -> RowBatch:
    """Every row of `held` [n, V] as a row of its own."""
    count = held.shape[0] if rows is None else rows
    return RowBatch.of([held], [Row(Ref(0, r % held.shape[0]), held.shape[1]) for r in range(count)])


def sampled(rows: int, seeds: Tensor | None = None, positions: Tensor | None = None) -> PickControls:
    """Temperature 1; row r has seed 0 and position r unless given."""
    return replace(
        PickControls.greedy(rows),
        temperature=torch.ones(rows),
        seeds=torch.zeros(rows, dtype=torch.int64) if seeds is None else seeds,
        positions=torch.arange(rows) if positions is None else positions,
    )


def one_hot(*tokens: int, width: int = 4) -> Tensor:
    """Logits [n, width] that leave one token each."""
    return source(*[[0.0 if token == own else -INF for token in range(width)] for own in tokens])


def check_shapes(got: Verdicts, drafts: Drafts) -> None:
    n, k = drafts.tokens.shape
    assert got.accepted.dtype == got.tokens.dtype == torch.int64 and got.valid.dtype == torch.bool
    assert got.accepted.shape == got.valid.shape == (n,) and got.tokens.shape == (n, k + 1)
    for request in range(n):
        accepted, tokens = int(got.accepted[request]), got.tokens[request].tolist()
        if not got.valid[request]:
            assert tokens == [-1] * (k + 1)
            continue
        assert tokens[:accepted] == drafts.tokens[request, :accepted].tolist()
        assert tokens[accepted] >= 0 and tokens[accepted + 1 :] == [-1] * (k - accepted)


def test_what_stands_and_what_follows(backend: Backend) -> None:
    """Certain laws: 0, 1, 2, 3 in turn. Drafts right to the end, wrong at once, wrong later, short, and none."""
    target = one_hot(0, 1, 2, 3)
    tokens = [[0, 1, 2], [3, 1, 2], [0, 3, 2], [0, -1, -1], [-1, -1, -1]]
    rows = ints([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, -1, -1], [14, -1, -1, -1]])
    # Every request starts at row 0 of the source.
    firsts = [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 0]
    batch = RowBatch.of([target], [Row(Ref(0, first), 4) for first in firsts])
    expected = (
        [3, 0, 1, 1, 0],
        [[0, 1, 2, 3], [0, -1, -1, -1], [0, 1, -1, -1], [0, 1, -1, -1], [0, -1, -1, -1]],
    )
    controls = replace(sampled(15), raw=(1,) * 15, processed=(1,) * 15)
    got = backend.verify(batch, controls, Drafts(ints(tokens), rows), "shared_noise")
    assert (got.accepted.tolist(), got.tokens.tolist()) == expected and got.valid.all()
    drafted = [(request, place) for request in range(5) for place in range(3) if tokens[request][place] >= 0]
    law_rows = torch.full((5, 3), -1)
    for number, (request, place) in enumerate(drafted):
        law_rows[request, place] = number
    laws = rows_of(torch.zeros(len(drafted), 4, device=target.device))
    drafts = Drafts(ints(tokens), rows, laws, sampled(len(drafted)), law_rows)
    got = backend.verify(batch, controls, drafts)
    assert (got.accepted.tolist(), got.tokens.tolist()) == expected and got.valid.all()
    check_shapes(got, drafts)
    # The emitted tokens are what is reported on.
    assert got.picks.raw is not None and got.picks.processed is not None
    for request, held in enumerate(got.tokens.tolist()):
        for place, token in enumerate(held):
            if token >= 0:
                row = int(rows[request, place])
                assert got.picks.raw.ids[row, 0] == token
                assert got.picks.raw.chosen[row] == got.picks.processed.chosen[row] == 0


def test_reports_are_about_the_emitted_tokens(backend: Backend) -> None:
    generator = torch.Generator().manual_seed(2)
    target = source(*torch.randn(3, 30, generator=generator).tolist())
    laws = source(*torch.randn(2, 30, generator=generator).tolist())
    batch, asked = (
        rows_of(target),
        replace(sampled(3), raw=(2,) * 3, processed=(0,) * 3, top_k=ints([10] * 3)),
    )
    drafts = Drafts(ints([[4, 7]]), ints([[0, 1, 2]]), rows_of(laws), sampled(2), ints([[0, 1]]))
    got = backend.verify(batch, asked, drafts)
    assert got.picks.raw is not None and got.picks.processed is not None
    for place, token in enumerate(got.tokens[0].tolist()):
        if token >= 0:
            raw, processed = slow.raw_law(batch, place), slow.processed_law(batch, asked, place)
            assert float(got.picks.raw.chosen[place]) == pytest.approx(float(raw[token]), abs=1e-5)
            assert int(got.picks.raw.ranks[place]) == slow.rank(raw, token)
            assert float(got.picks.processed.chosen[place]) == pytest.approx(
                float(processed[token]), abs=1e-5
            )


@st.composite
def requests(draw: st.DrawFn) -> tuple[RowBatch, PickControls, Drafts]:
    """Requests with 0 to 3 drafts, drawn from laws near and far from the target's, with filters on both sides."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    width = draw(st.sampled_from((2, 31, 257)))
    k = 3
    lengths = [draw(st.integers(0, k)) for _ in range(draw(st.integers(1, 4)))]
    places, law_places = sum(length + 1 for length in lengths), max(1, sum(lengths))
    base = torch.randn(places, width, generator=generator)
    rows, law_rows = torch.full((len(lengths), k + 1), -1), torch.full((len(lengths), k), -1)
    shared = []
    first, first_law = 0, 0
    for request, length in enumerate(lengths):
        rows[request, : length + 1] = torch.arange(first, first + length + 1)
        law_rows[request, :length] = torch.arange(first_law, first_law + length)
        shared += range(first, first + length)
        first, first_law = first + length + 1, first_law + length
    distance = draw(st.sampled_from((0.0, 0.3, 3.0)))
    proposal = torch.randn(law_places, width, generator=generator) * distance
    proposal[: len(shared)] += base[shared]
    # The target is fused; the drafter's law is its own row.
    other = 0.5 * torch.randn(places, width, generator=generator)
    described = [
        Row(Ref(0, r), width, (Term(Ref(1, r), Ref(1, (r + 1) % places), 0.5),) if r % 2 else ())
        for r in range(places)
    ]
    batch = RowBatch.of([source(*base.tolist()), source(*other.tolist())], described)
    laws = rows_of(source(*proposal.tolist()))

    def controls(count: int) -> PickControls:
        return replace(
            sampled(count),
            temperature=floats([draw(st.sampled_from((0.0, 0.7, 1.0))) for _ in range(count)]),
            top_k=ints([draw(st.sampled_from((0, 0, 5))) for _ in range(count)]),
            top_p=floats([draw(st.sampled_from((1.0, 0.9))) for _ in range(count)]),
            seeds=torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator),
        )

    law_controls = controls(law_places)
    tokens = torch.full((len(lengths), k), -1)
    for request, place in (law_rows >= 0).nonzero().tolist():
        row = int(law_rows[request, place])
        law = slow.processed_law(laws, law_controls, row).exp()
        tokens[request, place] = torch.multinomial(law, 1, generator=generator)
    return batch, controls(places), Drafts(tokens, rows, laws, law_controls, law_rows)


@pytest.mark.parametrize("rule", ["rejection", "shared_noise"])
def test_requests_are_those_of_the_reference(backend: Backend, rule: str) -> None:
    @examples(backend, 80, 4)
    @given(case=requests())
    def check(case: tuple[RowBatch, PickControls, Drafts]) -> None:
        batch, controls, drafts = case
        got = backend.verify(batch, controls, drafts, rule)  # type: ignore[arg-type]
        check_shapes(got, drafts)
        assert got.valid.all()
        for request in range(drafts.tokens.shape[0]):
            accepted, tokens = slow.verify(batch, controls, drafts, request, rule)  # type: ignore[arg-type]
            found = got.tokens[request].tolist()
            assert (int(got.accepted[request]), [t for t in found if t >= 0]) == (accepted, tokens)

    check()


def test_shared_noise_gives_the_tokens_of_plain_picks(backend: Backend) -> None:
    """Drafts of the same seeds and positions from a law nearby: most stand, and the text is that of the target."""
    generator = torch.Generator().manual_seed(4)
    requests, k, width = (4, 3, 100) if interpreted(backend) else (40, 3, 100)
    base = torch.randn(requests * (k + 1), width, generator=generator)
    batch = rows_of(source(*base.tolist()))
    controls = sampled(batch.size, torch.randint(0, 2**40, (batch.size,), generator=generator))
    plain = backend.pick(batch, controls).tokens.view(requests, k + 1).cpu()
    nearby = rows_of(source(*(base + 0.1 * torch.randn(base.shape, generator=generator)).tolist()))
    proposed = backend.pick(nearby, controls).tokens.view(requests, k + 1).cpu()
    rows = torch.arange(batch.size).view(requests, k + 1)
    got = backend.verify(batch, controls, Drafts(proposed[:, :k].clone(), rows), "shared_noise")
    stands = proposed[:, :k] == plain[:, :k]
    assert got.accepted.tolist() == stands.long().cumprod(dim=1).sum(dim=1).tolist()
    for request, accepted in enumerate(got.accepted.tolist()):
        assert got.tokens[request, : accepted + 1].tolist() == plain[request, : accepted + 1].tolist()
    assert stands.float().mean() > 0.6, "shared noise is worth having"


@pytest.mark.parametrize("rule", ["rejection", "shared_noise"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_bad_row_fails_its_request_alone(backend: Backend, rule: str, place: int) -> None:
    """Certain laws. The bad row counts only up to the token that follows the accepted drafts."""
    held = torch.cat([one_hot(0, 1, 2), torch.full((1, 4), math.nan, device=source([0.0]).device)])

    def request(bad: int) -> list[Row]:
        return [Row(Ref(0, 3 if index == bad else index), 4) for index in range(3)]

    batch = RowBatch.of([held], [*request(-1), *request(place), *request(place), *request(-1)])
    tokens = ints([[0, 1], [0, 1], [3, 1], [3, 1]])
    law = rows_of(torch.zeros(8, 4, device=held.device))
    drafts = Drafts(tokens, torch.arange(12).view(4, 3), law, sampled(8), torch.arange(8).view(4, 2))
    got = backend.verify(batch, sampled(12), drafts, rule)  # type: ignore[arg-type]
    check_shapes(got, drafts)
    # The third request is rejected at its first place, so a bad row after that is never reached.
    assert got.valid.tolist() == [True, False, place > 0, True]
    assert got.tokens[0].tolist() == [0, 1, 2] and got.tokens[3].tolist() == [0, -1, -1]
    assert got.tokens[1].tolist() == [-1, -1, -1]
    if place > 0:
        assert got.tokens[2].tolist() == [0, -1, -1]


def test_rejection_needs_the_laws(backend: Backend) -> None:
    batch = rows_of(one_hot(0, 1))
    with pytest.raises(ValueError, match="law"):
        backend.verify(batch, sampled(2), Drafts(ints([[0]]), ints([[0, 1]])))


def test_a_greedy_target_takes_its_best_token_only(backend: Backend) -> None:
    held = source([0.0, 2.0, 1.0], [3.0, 0.0, 0.0])
    flat = rows_of(torch.zeros(2, 3, device=held.device))
    for token, accepted, tokens in ((1, 1, [1, 0]), (2, 0, [1, -1]), (0, 0, [1, -1])):
        drafts = Drafts(ints([[token]]), ints([[0, 1]]), rows_of(flat.sources[0], 1), sampled(1), ints([[0]]))
        got = backend.verify(rows_of(held), PickControls.greedy(2), drafts)
        assert got.accepted.tolist() == [accepted] and got.tokens[0].tolist() == tokens


def test_a_greedy_draft_is_a_certain_law(torch_backend: Backend) -> None:
    """q is 1 at the draft: it stands with its probability under the target, and is not drawn again when it falls."""
    n = 12_000
    p = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    batch, controls = repeated(p, n), noise(n)
    laws = repeated(torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64), n, "one")
    drafts = first_place(torch.full((n, 1), 2), laws, PickControls.greedy(n))
    got = torch_backend.verify(batch, controls, drafts)
    stands = float(got.accepted.double().mean())
    assert abs(stands - 0.3) < 4 * math.sqrt(0.3 * 0.7 / n)
    assert not (got.tokens[got.accepted == 0, 0] == 2).any()
    counts = torch.bincount(got.tokens[:, 0].cpu(), minlength=3)
    assert abs(chi_square(counts, p)) < 5


def test_a_draft_from_the_targets_own_law_stands(backend: Backend) -> None:
    """p = q: nothing to reject; whatever rounding makes of it, there is a token."""
    generator = torch.Generator().manual_seed(6)
    n = 8 if interpreted(backend) else 500
    held = source(*(2 * torch.randn(1, 40, generator=generator)).tolist())
    laws, controls = rows_of(held, n), noise(n)
    own = replace(sampled(n), seeds=torch.arange(n) + 10**6)
    tokens = backend.pick(laws, own).tokens.cpu()[:, None]
    got = backend.verify(rows_of(held, 2 * n), controls, first_place(tokens, laws, own))
    assert got.accepted.tolist() == [1] * n and got.valid.all() and (got.tokens >= 0).all()


def test_a_rejected_draft_with_hardly_any_residual(backend: Backend) -> None:
    """The target forbids the one token by which it differs from the draft's law: all that is left is drawn from."""
    p = source([0.0, 0.0, -INF])
    laws = rows_of(source([0.0, 0.0, -20.0]))
    drafts = Drafts(ints([[2]]), ints([[0, 1]]), laws, sampled(1), ints([[0]]))
    got = backend.verify(rows_of(p, 2), sampled(2), drafts)
    assert got.accepted.tolist() == [0] and got.valid.all()
    assert int(got.tokens[0, 0]) in (0, 1) and int(got.tokens[0, 1]) == -1


# The law of the text ------------------------------------------------------------------------------------------------


def repeated(law: Tensor, n: int, rows: str = "two") -> RowBatch:
    """n requests with the same law [V] at their rows, two rows each or one."""
    held = source(law.log().float().tolist())
    plain = RowBatch.of([held], [Row(Ref(0, 0), len(law))])
    count = 2 * n if rows == "two" else n
    return replace(
        plain,
        base=plain.base.expand(count, 2),
        widths=plain.widths.expand(count),
        positive=plain.positive.expand(count, 0, 2),
        negative=plain.negative.expand(count, 0, 2),
        weights=plain.weights.expand(count, 0),
    )


def noise(n: int) -> PickControls:
    """Two rows per request: seed = the request's number, positions 0 and 1."""
    return sampled(2 * n, torch.arange(n).repeat_interleave(2), torch.arange(2).repeat(n))


def first_place(tokens: Tensor, laws: RowBatch, law_controls: PickControls) -> Drafts:
    """One draft per request."""
    n = tokens.shape[0]
    return Drafts(tokens, torch.arange(2 * n).view(n, 2), laws, law_controls, torch.arange(n)[:, None])


def draft_from(law: Tensor, n: int) -> Tensor:
    """int64 [n, 1] drawn from probabilities `law` [V] by inversion, with numbers that no backend uses."""
    numbers = uniform(torch.full((n,), 77), torch.arange(n), 99, torch.zeros(n, dtype=torch.int64), 1)[:, 0]
    token = torch.searchsorted(law.cumsum(dim=0), numbers, right=True).clamp(max=len(law) - 1)
    return token[:, None]


def laws_for(kind: str) -> tuple[Tensor, Tensor]:
    """Target and draft probabilities [40], float64."""
    generator = torch.Generator().manual_seed(31)
    p = torch.softmax(torch.randn(40, generator=generator, dtype=torch.float64), dim=0)
    match kind:
        case "equal":
            return p, p
        case "near":
            shift = 0.2 * torch.randn(40, generator=generator, dtype=torch.float64)
            return p, torch.softmax(p.log() + shift, dim=0)
        case "far":
            return p, torch.softmax(2 * torch.randn(40, generator=generator, dtype=torch.float64), dim=0)
    p, q = p.clone(), p.clone()
    p[20:], q[:20] = 0.0, 0.0
    return p / p.sum(), q / q.sum()


@pytest.mark.parametrize("kind", ["equal", "near", "far", "disjoint"])
def test_the_first_token_follows_the_target(torch_backend: Backend, kind: str) -> None:
    n = 12_000
    p, q = laws_for(kind)
    drafts = first_place(draft_from(q, n), repeated(q, n, "one"), sampled(n))
    got = torch_backend.verify(repeated(p, n), noise(n), drafts)
    assert got.valid.all()
    counts = torch.bincount(got.tokens[:, 0].cpu(), minlength=40)
    assert counts[p == 0].sum() == 0
    assert abs(chi_square(counts, p)) < 5
    rate = float(torch.minimum(p, q).sum())
    assert abs(float(got.accepted.double().mean()) - rate) <= 4 * math.sqrt(rate * (1 - rate) / n) + 1e-12
    # The bonus token of those that stand has the target's law as well, whatever was drafted.
    second = got.tokens[got.accepted == 1, 1].cpu()
    if len(second) > 1000:
        assert abs(chi_square(torch.bincount(second, minlength=40), p)) < 5


def test_a_wrong_law_of_the_drafts_is_noticed(torch_backend: Backend) -> None:
    """The test above can fail: drafts that were not drawn from the q that is claimed spoil the text's law."""
    n = 12_000
    p, q = laws_for("near")
    claimed = torch.softmax(q.log() * 0.7, dim=0)
    drafts = first_place(draft_from(q, n), repeated(claimed, n, "one"), sampled(n))
    got = torch_backend.verify(repeated(p, n), noise(n), drafts)
    counts = torch.bincount(got.tokens[:, 0].cpu(), minlength=40)
    assert chi_square(counts, p) > 5


def test_processed_laws_are_compared(torch_backend: Backend) -> None:
    """Temperature and filters on both sides are part of p and q."""
    n = 12_000
    p, q = laws_for("near")
    target, laws = repeated(p, n), repeated(q, n, "one")
    controls = replace(noise(n), temperature=torch.full((2 * n,), 0.7), top_k=torch.full((2 * n,), 12))
    law_controls = replace(sampled(n), temperature=torch.full((n,), 1.3), top_p=torch.full((n,), 0.9))
    drawn_from = slow.processed_law(laws, law_controls, 0).exp()
    got = torch_backend.verify(target, controls, first_place(draft_from(drawn_from, n), laws, law_controls))
    expected = slow.processed_law(target, controls, 0).exp()
    assert torch.allclose(
        slow.emitted_law(slow.processed_law(target, controls, 0), slow.processed_law(laws, law_controls, 0)),
        expected,
    )
    assert abs(chi_square(torch.bincount(got.tokens[:, 0].cpu(), minlength=40), expected)) < 5


def test_targets_and_drafters_may_differ_in_width(backend: Backend) -> None:
    """A drafter with a wider vocabulary may propose an id that the target does not have; it falls."""
    wide = rows_of(source([0.0] * 300))
    narrow = rows_of(source([0.0, 1.0, 0.0]), 2)
    drafts = Drafts(ints([[299]]), ints([[0, 1]]), wide, sampled(1), ints([[0]]))
    got = backend.verify(narrow, sampled(2), drafts)
    assert got.accepted.tolist() == [0] and got.valid.all() and 0 <= int(got.tokens[0, 0]) < 3
    drafts = Drafts(ints([[1]]), ints([[0, 1]]), rows_of(source([0.0, 5.0])), sampled(1), ints([[0]]))
    got = backend.verify(rows_of(source([0.0] * 300), 2), sampled(2), drafts)
    assert got.valid.all() and 0 <= int(got.tokens[0, 0]) < 300


def tokens_of(verdicts: Verdicts) -> Sequence[Sequence[int]]:
    return [[token for token in row if token >= 0] for row in verdicts.tokens.tolist()]


def test_a_request_alone_is_the_request_in_the_batch(backend: Backend) -> None:
    generator = torch.Generator().manual_seed(12)
    n, width = 4, 60
    base = source(*torch.randn(3 * n, width, generator=generator).tolist())
    law = source(*torch.randn(2 * n, width, generator=generator).tolist())
    tokens = torch.randint(0, width, (n, 2), generator=generator)
    batch, laws = rows_of(base), rows_of(law)
    controls = sampled(3 * n, torch.arange(3 * n) * 7)
    rows, law_rows = torch.arange(3 * n).view(n, 3), torch.arange(2 * n).view(n, 2)
    together = backend.verify(batch, controls, Drafts(tokens, rows, laws, sampled(2 * n), law_rows))
    for request in range(n):
        alone = Drafts(
            tokens[request : request + 1],
            rows[request : request + 1],
            laws,
            sampled(2 * n),
            law_rows[request : request + 1],
        )
        got = backend.verify(batch, controls, alone)
        assert tokens_of(got)[0] == tokens_of(together)[request]
