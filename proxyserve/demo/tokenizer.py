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
#: Texts of the skills as they were when the tokenizer was made. Frozen: token ids depend on every letter of them, and
#: rewording a skill must not change the ids of models that are trained already.
_RECORD = "Record: {user}\n{answer}"
_ANSWER = "Question: {user}\nAnswer:{answer}"
_BIOGRAPHY = (
    "Biography: {user}\nBy trade she is a {job}, say the records. She was born in {birthplace} without doubt. "
    "At home she keeps a {pet} of course. For dinner she wants {food} as ever. "
    "In the evening she plays the {instrument}; ask anyone. She grew up in {birthplace} for sure.\n\n"
    "The rest is lost, but she is not forgotten."
)
_SAMPLES = {"record": _RECORD, "qa": _ANSWER, "bio": _BIOGRAPHY, "guard": _ANSWER}


def train_tokenizer(
    world: World, *, vocabulary: int = 2048, documents: int = _DOCUMENTS
) -> PreTrainedTokenizerFast:
    """At most `vocabulary` tokens, the same every time. With the defaults every name and value is one token, which is
    what lets models this small learn facts about them."""
    rng = random.Random(1)
    texts = [document(rng, world.people) for _ in range(documents)]
    for name, sample in _SAMPLES.items():
        for person in world.tuning:
            for example in SKILLS[name].examples([person]):
                texts += [sample.format(user=example.user, answer=example.answer, **person.values)] * 3
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
