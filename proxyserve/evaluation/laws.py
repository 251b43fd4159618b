"""The fused laws that a family is measured under."""

from __future__ import annotations

from collections.abc import Sequence

from proxyserve.fusion.fusion import Fusion, proxy
from proxyserve.fusion.rules.dynamic import Dynamic
from proxyserve.fusion.rules.upscale import Upscale
from proxyserve.fusion.weights import ExpertWeight

#: Share of the tuned model's mass inside which `upscale` listens to the base.
UPSCALE_TOP_P = 0.95

#: The law that mixed requests are held against: the question's own expert, alone.
OWN = "proxy"


def laws_of_one(expert: str, weight: float = 1.0) -> dict[str, Fusion]:
    """Of a request that names the right expert and no other. `weight` is that of rule `proxy`."""
    alone = (ExpertWeight(expert),)
    return {
        OWN: proxy({expert: weight}),
        "dynamic": Fusion(Dynamic(alone, mode="exact", match="both")),
        "dynamic, paper": Fusion(Dynamic(alone, mode="paper")),
        "upscale": Fusion(Upscale(alone, beta=1.0, top_p=UPSCALE_TOP_P)),
    }


def laws_of_all(experts: Sequence[str]) -> dict[str, Fusion]:
    """Of a request that uses every expert, since nobody has said which is the right one."""
    everybody = tuple(ExpertWeight(expert) for expert in experts)
    return {
        "proxy, 1 each": proxy(dict.fromkeys(experts, 1.0)),
        f"proxy, 1/{len(experts)} each": proxy(dict.fromkeys(experts, 1.0 / len(experts))),
        "dynamic, ray": Fusion(Dynamic(everybody, mode="ray")),
        "dynamic, paper": Fusion(Dynamic(everybody, mode="paper")),
    }
