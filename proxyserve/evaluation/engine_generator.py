"""The generator that matters: proxyserve's own engine, run in process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from proxyserve.config import EngineConfig
from proxyserve.engine.engine import Engine
from proxyserve.engine.prompts import text_prompts
from proxyserve.engine.submission import Submission
from proxyserve.errors import ProxyserveError
from proxyserve.evaluation.systems import Answer, Question, System
from proxyserve.fusion.fusion import Fusion
from proxyserve.models.family import ExpertSource, load_family
from proxyserve.models.loading import choose_placement
from proxyserve.types import FinishReason, OutputEvent, SamplingParams


class EngineGenerator:
    """All questions run in one continuous batch. The engine of the last system is kept: ask what differs in the fusion
    alone in a row, and the models are loaded once."""

    def __init__(self, config: EngineConfig | None = None) -> None:
        self._config = config or EngineConfig(kv_memory=256 * 2**20)
        self._engine: Engine | None = None
        self._held: System | None = None

    def supports(self, fusion: Fusion) -> bool:
        return True

    def generate(
        self,
        questions: Sequence[Question],
        system: System,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[Answer]:
        """Raises ProxyserveError if a request ends in an error; that would otherwise count as a wrong answer."""
        engine, fusion = self._engine_of(system), system.fusion
        for index, question in enumerate(questions):
            sampling = SamplingParams(max_tokens=question.max_tokens, temperature=0.0)
            prompts = text_prompts(engine.catalog, fusion, question.prompt)
            engine.submit(Submission(str(index), prompts, sampling, fusion))
        texts = [""] * len(questions)
        answers: dict[int, Answer] = {}
        while engine.has_work:
            for event in engine.step():
                index = int(event.request_id)
                texts[index] += event.text
                if event.finish_reason is not None:
                    answers[index] = _answer(event, texts[index])
            progress(len(answers))
        return [answers[index] for index in range(len(questions))]

    def _engine_of(self, system: System) -> Engine:
        held = self._held
        if self._engine is None or held is None or (held.base, held.experts) != (system.base, system.experts):
            self._engine = None  # the old models go before the new ones come
            models = load_family(
                system.base,
                [ExpertSource(name, pair.tuned, pair.untuned) for name, pair in system.experts.items()],
                placement=choose_placement(self._config.device, self._config.dtype),
            )
            self._engine, self._held = Engine(models, self._config), system
        return self._engine


def _answer(last: OutputEvent, text: str) -> Answer:
    if last.finish_reason is FinishReason.ERROR:
        raise ProxyserveError(f"A question could not be answered: {last.error}")
    tokens = 0 if last.usage is None else last.usage.completion_tokens
    weights = None if last.fusion is None else last.fusion.mean_weights
    return Answer(text if last.finish_reason is FinishReason.STOP else None, tokens, weights or {})
