"""The words of the tasks, written for this project, and a vocabulary with one token for each word.

`Vocabulary` is the interface that the tasks need of a tokenizer, and `WordVocabulary` is the
tokenizer of the embedded model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, SupportsIndex, runtime_checkable

from kvjax.chat import ids_around
from kvjax.text import ids_after, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PUNCTUATION = _split(". , : ? 's")

# The words of facts and questions.
FUNCTION = _split(
    "the a of is and one favorite thing older between years old who what how question answer "
    "in on under near behind beside over"
)

NAMES = _split(
    "mary john anna peter lucy oscar nina victor clara simon edith hugo irene walter paula felix "
    "greta martin helen conrad sofia ernest judith albert vera gustav emma rupert agnes leopold "
    "diana theo olive frank maud cyril ruth stefan ida ralph nora otto bella edgar tessa milo "
    "carmen boris"
)

AGES = tuple(str(age) for age in range(10, 70))

# The words of favorite things. None is a word of the filler, so that an answer can be found in its
# own sentence only.
THINGS = _split(
    "lantern violin copper saddle amber compass velvet anchor ribbon marble candle feather mirror "
    "barrel carpet walnut hammer pepper silver needle parcel button ladder cradle goblet turnip "
    "chisel locket basket sponge trumpet blanket kettle pillow rocket magnet pendant chimney "
    "emerald thimble scarf helmet pebble teapot wagon bracelet canvas cherry dagger easel fiddle "
    "garnet hatchet inkwell jigsaw kimono lemon mitten napkin onion pickle quilt raisin sandal "
    "teaspoon umbrella vase whistle yarn zither almond bonnet cinnamon domino earring fossil "
    "ginger harp ivory jasmine kayak lilac mango nutmeg opal pretzel quiver radish sapphire tulip "
    "urn vanilla wafer xylophone yogurt zipper apron beetle cactus drum engine flute globe honey "
    "iris jewel kite lute medal noodle oboe pearl quartz ruby sequin topaz uniform veil wreath "
    "acorn bugle coral daisy ebony fennel gong hinge icicle jug kernel loom mosaic nectar orchid "
    "plum quince rattle shawl tablet turban vinegar waffle agate banjo clover dumpling enamel "
    "fabric gravel hazel indigo jersey keg leaflet muffin nickel oyster paddle quill rosemary "
    "satin thistle tambourine violet wicker yeast zinc apricot bronze cello denim elixir falcon "
    "granite hammock incense juniper knitting linen maple nugget olives paprika rhubarb saffron "
    "trinket truffle unicorn varnish walrus atlas brooch crayon dahlia espresso fig gazelle helium "
    "insignia jade kiln lacquer mustard nylon origami papaya ravioli scepter tassel tinsel "
    "vest wax zodiac abacus biscuit cobalt dynamo"
)

FILLER_NOUNS = _split(
    "river forest house garden market bridge tower valley lagoon meadow harbor village castle "
    "mountain road field lake window door wall roof street station library school kitchen farm "
    "barn stable mill shop church square corner path hill cliff shore desert fox wolf bear horse "
    "cow sheep goat dog cat bird duck goose mouse rabbit farmer baker sailor teacher doctor miller "
    "painter singer guard king queen prince child woman man boy girl stranger traveler hunter "
    "carpenter gardener"
)
FILLER_ADJECTIVES = _split(
    "small large quiet loud dark bright narrow wide young tall short heavy light warm cold dry "
    "wet green blue red white black grey brown gentle proud tired happy lonely early late distant "
    "empty crowded broken clean dusty"
)
FILLER_VERBS = _split(
    "sees finds follows watches leaves crosses visits paints builds guards passes remembers likes "
    "hears meets helps calls carries opens closes"
)
FILLER_MOVES = _split("walks sleeps waits sings rests stands works sits runs stays")
FILLER_ADVERBS = _split(
    "today often slowly always sometimes again alone together soon never quickly rarely"
)
FILLER_PREPOSITIONS = _split("in on under near behind beside over")

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
ALL = (
    *SPECIAL,
    *PUNCTUATION,
    *FUNCTION,
    *NAMES,
    *AGES,
    *THINGS,
    *FILLER_NOUNS,
    *FILLER_ADJECTIVES,
    *FILLER_VERBS,
    *FILLER_MOVES,
    *FILLER_ADVERBS,
)
"""Every token, in the order of the ids."""

SPLIT = r"<[a-z]+>|'s|\w+|[^\w\s]"
"""Words, possessive endings, single punctuation marks."""


@runtime_checkable
class Vocabulary(Protocol):
    """Encodes a piece of text without special tokens, independently of the text around it."""

    @property
    def bos_id(self) -> int | None:
        """The first token of every prompt; None for models without such a token."""
        ...

    @property
    def size(self) -> int:
        """V."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ...

    def encode_each(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts, faster than one by one."""
        ...

    def writes(self, text: str) -> bool:
        """Whether the ids of a text stand for it, with other spaces and capitals at most."""
        ...

    def around(
        self, before: str, after: str, answer_prefix: str = ""
    ) -> tuple[list[int], list[int]]:
        """Ids of a prompt before and after a long text, see `kvjax.chat.ids_around`."""
        ...


@dataclass(frozen=True)
class WordVocabulary:
    """A vocabulary of words: one id for each word, with spaces between words.

    Attributes:
        tokens: all tokens in the order of their ids; the first four are pad, bos, eos, unknown.

    Raises:
        ValueError: a token that occurs twice, or other tokens at the start.
    """

    tokens: tuple[str, ...] = ALL
    _ids: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ids = {token: index for index, token in enumerate(self.tokens)}
        if len(ids) != len(self.tokens):
            twice = sorted({token for token in self.tokens if self.tokens.count(token) > 1})
            raise ValueError(f"tokens stand twice in the vocabulary: {', '.join(twice)}")
        if self.tokens[:4] != SPECIAL:
            raise ValueError(f"got first tokens {self.tokens[:4]}, expected {SPECIAL}")
        object.__setattr__(self, "_ids", ids)

    pad_id = 0
    bos_id = 1
    eos_id = 2
    unknown_id = 3

    @property
    def size(self) -> int:
        """V."""
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        """Ids of the space-separated words of `text`; unknown words get `unknown_id`."""
        return [self._ids.get(word, self.unknown_id) for word in text.split()]

    def encode_each(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return list(map(self.encode, texts))

    def writes(self, text: str) -> bool:
        """Whether every word of `text` has a token."""
        return self.unknown_id not in self.encode(text)

    def around(
        self, before: str, after: str, answer_prefix: str = ""
    ) -> tuple[list[int], list[int]]:
        """<bos> and the words before a long text, and the words after it."""
        return [self.bos_id, *self.encode(before)], self.encode(f"{after} {answer_prefix}")

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The words, joined by spaces."""
        return " ".join(self.tokens[index] for index in ids)


@dataclass(frozen=True)
class TokenizerVocabulary:
    """Adapts a tokenizer of transformers to `Vocabulary`.

    Attributes:
        chat: prompts are inside the chat template.
    """

    tokenizer: Any
    chat: bool = False

    @property
    def bos_id(self) -> int | None:
        """The token that starts a prompt, if the tokenizer has one and puts it before a text."""
        bos = self.tokenizer.bos_token_id
        return bos if bos in prompt_ids(self.tokenizer, "") else None

    @property
    def size(self) -> int:
        """V."""
        return len(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of text as it stands within a sentence: after a space."""
        return ids_after(self.tokenizer, f" {text}")

    def encode_each(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode`, for many texts."""
        if not texts:
            return []
        # Some tokenizers put a space before any text: `encode` then gives the ids without ours.
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        space = "" if plain == self.encode("a") else " "
        given = [space + text for text in texts]
        return self.tokenizer(given, add_special_tokens=False, verbose=False)["input_ids"]

    def writes(self, text: str) -> bool:
        """Whether the ids of a text stand for it, with other spaces and capitals at most."""
        ids = self.encode(text)
        if getattr(self.tokenizer, "unk_token_id", None) in ids:
            return False
        written = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return _bare(written) == _bare(text)

    def around(
        self, before: str, after: str, answer_prefix: str = ""
    ) -> tuple[list[int], list[int]]:
        """Ids of a prompt before and after a long text, see `kvjax.chat.ids_around`."""
        return ids_around(self.tokenizer, before, after, answer_prefix, self.chat)

    @functools.cached_property
    def ordinary_ids(self) -> list[int]:
        """All ids except those of special and added tokens."""
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        return [index for index in range(self.size) if index not in special]


def _bare(text: str) -> str:
    return "".join(text.split()).casefold()


def to_transformers(vocab: WordVocabulary, max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers with the words and ids of `vocab`.

    It makes text lower-case, and starts every encoded text with <bos>.

    Args:
        max_length: the context length of the model.
    """
    # Imported here because the import is slow, and most users of this module generate ids only.
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
