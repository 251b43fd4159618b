"""The generator that matters: proxyserve's own engine, run in process."""

from __future__ import annotations

from collections.abc import Sequence

from proxyserve.config import EngineConfig
from proxyserve.engine.engine import Engine
from proxyserve.engine.prompts import text_prompts
from proxyserve.engine.submission import Submission
from proxyserve.evaluation.systems import System
from proxyserve.fusion.fusion import proxy
from proxyserve.models.family import ExpertSource, load_family
from proxyserve.models.loading import choose_placement
from proxyserve.types import FinishReason, SamplingParams


class EngineGenerator:
    """Starts an engine per system; all prompts run in one continuous batch."""

    def __init__(self, config: EngineConfig | None = None) -> None:
        self._config = config or EngineConfig(kv_memory=256 * 2**20)

    def generate(self, prompts: Sequence[str], system: System, max_tokens: int) -> list[str | None]:
        models = load_family(
            system.base,
            [ExpertSource(name, pair.tuned, pair.untuned) for name, (pair, _) in system.experts.items()],
            placement=choose_placement(self._config.device, self._config.dtype),
        )
        engine = Engine(models, self._config)
        fusion = proxy({name: weight for name, (_, weight) in system.experts.items()})
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        for index, prompt in enumerate(prompts):
            engine.submit(
                Submission(str(index), text_prompts(engine.catalog, fusion, prompt), sampling, fusion)
            )
        texts = [""] * len(prompts)
        stopped = [False] * len(prompts)
        while engine.has_work:
            for event in engine.step():
                texts[int(event.request_id)] += event.text
                stopped[int(event.request_id)] |= event.finish_reason is FinishReason.STOP
        return [text if stop else None for text, stop in zip(texts, stopped, strict=True)]
