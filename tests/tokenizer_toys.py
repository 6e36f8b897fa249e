"""Small tokenizers of the kinds that models have."""

import gzip
import json
import string

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>")
BYTES = tuple(f"<0x{value:02X}>" for value in range(256))
PIECES = ("▁▁", "▁▁▁▁", "▁r", "▁t", "▁re", "▁th", "re", "th", "▁n", "▁x", "in", "ab", "▁▁▁▁▁")
LETTERS = string.digits + string.ascii_letters + string.punctuation
CHAT = (
    "<s>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def sentencepiece(scheme="first", strip=True, start=True, end=False, **settings):
    """As of Llama 2: a space before any text, line ends and rare characters as bytes.

    Args:
        scheme: of Metaspace, or "normalizer" for the older files, which double a first space.
        strip: the decoder drops a first space.
        start, end: BOS before a text, EOS after it.
    """
    tokens = [*SPECIAL, *BYTES, "▁", *LETTERS, *dict.fromkeys(PIECES)]
    merges = [("▁", "▁"), ("▁▁", "▁▁"), ("▁▁▁▁", "▁"), ("▁", "r"), ("▁", "t"), ("▁r", "e")]
    merges += [("▁t", "h"), ("r", "e"), ("t", "h"), ("▁", "n"), ("▁", "x"), ("i", "n"), ("a", "b")]
    ids = {token: index for index, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if scheme == "normalizer":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        core.normalizer = normalizers.Sequence(steps)
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strip else [])])
    return _fast(core, start, end, **settings)


def unigram():
    """As of T5 and XLM-R, whose decoder is Metaspace's."""
    pieces = [(token, 0.0) for token in (*SPECIAL, *BYTES)]
    pieces += [(token, -10.0) for token in ("▁", *LETTERS)]
    pieces += [(token, -2.0 * len(token)) for token in dict.fromkeys(PIECES)]
    core = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return _fast(core)


def byte_level(vocabulary=None, merges=(), **settings):
    """As of GPT-2; tokens of several bytes may end within a character."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = list(dict.fromkeys("".join(pair) for pair in merges))
    own = {token: index for index, token in enumerate([*SPECIAL, *letters, *merged])}
    core = Tokenizer(models.BPE(vocabulary or own, list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if vocabulary:
        return PreTrainedTokenizerFast(tokenizer_object=core)
    return _fast(core, False, **settings)


def word_piece(**settings):
    """As of BERT: no spaces among the tokens, so they are guessed."""
    words = ["ret", "##urn", "x", "n", "'", "t", "no", "##t", ".", ",", "mary", "so", "!"]
    ids = {token: index for index, token in enumerate([*SPECIAL, *words])}
    core = Tokenizer(models.WordPiece(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(cleanup=False)
    return _fast(core, **settings)


def suffixed():
    """As of GPT-1 and CLIP: the last piece of a word is marked."""
    letters = [letter + end for letter in string.ascii_lowercase for end in ("", "</w>")]
    ids = {token: index for index, token in enumerate([*SPECIAL, *letters])}
    core = Tokenizer(models.BPE(ids, [], end_of_word_suffix="</w>", unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.BPEDecoder()
    return _fast(core)


def packed(data_dir, name):
    """The byte-level tokenizer whose vocabulary and merges lie in the test data."""
    place = data_dir / "tokenizers"
    vocabulary = json.loads(gzip.decompress((place / f"{name}_vocab.json.gz").read_bytes()))
    lines = gzip.decompress((place / f"{name}_merges.txt.gz").read_bytes()).decode().split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    return byte_level(vocabulary, merges)


def _fast(core, start=True, end=False, **settings):
    ids = core.get_vocab()
    template = " ".join([*(["<s>"] if start else []), "$A", *(["</s>"] if end else [])])
    special = [(token, ids[token]) for token in ("<s>", "</s>") if token in template]
    core.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    core.add_special_tokens(list(SPECIAL))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names, **settings)
