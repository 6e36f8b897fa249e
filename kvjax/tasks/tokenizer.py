"""The word vocabulary as a tokenizer that transformers loads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvjax.tasks.vocabulary import WordVocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPLIT = r"<[a-z]+>|'s|\w+|[^\w\s]"
"""Words, possessive endings, single punctuation marks."""


def to_transformers(vocab: WordVocabulary, max_length: int) -> PreTrainedTokenizerFast:
    """A lower-casing word-level tokenizer with the ids of `vocab`; encoding starts with <bos>.

    Args:
        max_length: the context of the model that it belongs to.
    """
    # Heavy, and needed by no one who only generates ids.
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos, unknown = vocab.tokens[:4]
    ids = {token: index for index, token in enumerate(vocab.tokens)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, vocab.bos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown,
        padding_side="right",
        model_max_length=max_length,
    )
