"""The words of the tasks: written for this project, every one a single token of its vocabulary."""


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PUNCTUATION = _split(". , : ? 's")

# What facts and questions are made of.
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

# What a favorite thing is made of; apart from the filler, so that an answer can be found only
# in its own sentence.
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
