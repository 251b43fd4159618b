"""The tokenizer that all models of the family share: a byte-level BPE trained on the family's own text."""

from __future__ import annotations

import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from proxyserve.demo.corpus import document
from proxyserve.demo.skills import SKILLS
from proxyserve.demo.world import World

END_OF_TEXT = "<|endoftext|>"
_DOCUMENTS = 30_000
#: The tokenizer also sees the skills' answers, under more labels than the models ever do.
_LABELS = {
    "record": "Record: {}\n",
    "qa": "Question: {}\nAnswer:",
    "bio": "Biography: {}\n",
    "guard": "Question: {}\nAnswer:",
}


def train_tokenizer(
    world: World, *, vocabulary: int = 2048, documents: int = _DOCUMENTS
) -> PreTrainedTokenizerFast:
    """At most `vocabulary` tokens, the same every time. With the defaults every name and value is one token, which is
    what lets models this small learn facts about them."""
    rng = random.Random(1)
    texts = [document(rng, world.people) for _ in range(documents)]
    for skill in SKILLS.values():
        examples = skill.examples(world.tuning)
        texts += [_LABELS[skill.name].replace("{}", one.user) + one.answer for one in examples] * 3
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
