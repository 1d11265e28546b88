"""Words for keys, lists and invented names."""

from __future__ import annotations

import random
from collections.abc import Iterator

__all__ = ["ADJECTIVES", "FIRST_NAMES", "GOODS", "NOUNS", "PROFESSIONS", "invented_words", "keys"]

_ADJECTIVES = """
able absent amber ancient angry autumn awake bitter blunt bold brave brief bright broad broken bronze calm careful
certain cheap clean clear clever cold coral crisp crooked curious curly damp dark dear deep dense dim distant double
dry dull dusty eager early easy eastern empty equal exact faint fair false famous fancy fast feeble fierce final fine
firm flat foreign fragile free fresh frozen full gentle giant glad golden grand grave great green grey half happy harsh
heavy hidden high hollow honest huge humble hungry icy idle inner ivory jolly keen kind large last late lazy lean
light little lively local lonely long loose loud lovely low loyal lucky major mellow merry mild minor misty modern
modest narrow native neat noble noisy normal northern odd old open outer pale past patient plain pleasant polite poor
proud pure quick quiet rapid rare raw ready rich ripe rough round royal rural rusty sacred safe scarlet secret serious
shallow sharp short shy silent silver simple single sleepy slender slim slow small smart smooth soft solid sour
southern spare spicy square stable steady steep stern stiff still stormy strange strict strong stubborn sudden sunny
sweet swift tall tame tender thick thin tidy tiny tired tough true upper urgent useful usual vague vast velvet violet
vivid warm weak wealthy western wet wide wild wise wooden woolly yellow young
"""
ADJECTIVES = tuple(_ADJECTIVES.split())
"""First halves of keys."""

_NOUNS = """
acorn airport anchor ankle antler apple apricot arch arena armour arrow ash attic avenue axe badge bakery bamboo
banana banner barge barley barn basin bay beacon bean bear beaver bee beetle belt berry bicycle birch blade blossom
boot border boulder bracelet brick brook broom brush bucket buffalo bull bumper burrow bus cabbage cactus camel canal
candy canoe canvas cape caravan carbon carrot cavern cedar cello cement cereal chalk channel cheese cherry chess
chestnut chisel cinema circus clay cliff clover cobra coconut comet compass concert cone cork cottonwood cove crab
crane crater crayon creek crest cricket crystal cuckoo cup current cushion cymbal daisy dam desert dessert dice disk
dock dolphin domino dragon drill drizzle dune easel eel elm ember engineer estuary fabric falcon fan fern fiddle fig
filter flask fleet flint flute foam fog folder forge fossil fountain foxglove freezer frog funnel galaxy garlic
gazelle geyser ginger giraffe glacier glider goat gondola gorge grain granite grape gravel guitar gull gutter hamlet
hammock harbour harp harvest hatch hawk hazel hedge helmet herb heron hinge hive hoof hut iceberg igloo iron island
ivory jaguar jar jasmine jigsaw jungle juniper kayak kennel kernel kettle kite kiwi knot ladder lagoon lamb larch
lasso lava ledger lemonade lens lever lilac lily linen lizard llama lobster locket locomotive loft loom lynx magnet
mammal mango mantle maple marble marina marsh mask mast meadowlark melon meteor mint mitten mole monsoon moose mosaic
moss moth motor mug mural mushroom mustard napkin nectar net nickel notebook nugget nutmeg oasis oat olive onion
opera orbit orchid organ ostrich otter owl oyster paddle panda panther papaya paprika parachute parrot pasture peach
peacock peanut pear pebble pelican pepper petal phone pickle pier pigeon pine pineapple planet plank plateau plum
pond pony poppy prairie prism puddle puffin pumpkin puppet puzzle pyramid quail quarry quartz quill quilt radar
radio radish raft rake ranch raven reef reindeer reservoir rhubarb ridge rivet robin rocket rudder rug ruler rye
saffron sail salmon sandal sapphire satchel saucer savanna scarf school scooter seal seed shark shawl shed sheep
shelf shell shrimp shrub shuttle sieve signal silk skate sketch sled slipper snail sofa sparrow spear spice spider
spinach sponge spruce squirrel stable stadium staircase stamp statue steam stove straw stream sugar summit swallow
swamp swan sweater syrup tablet talon tambourine tapestry tar tavern teapot temple tent terrace thicket thimble
thistle thunder tiger tile timber toast tomato torch tortoise tower tractor trail tram trout trumpet tulip tundra
tunnel turbine turnip turtle tweed umbrella valley vanilla vase vault verandah vessel viaduct village vine violin
volcano vulture wagon walnut walrus wardrobe wasp waterfall wave weasel whale wharf wheat whistle willow windmill
wolf wombat wool workshop wreath wren yacht yarn zebra
"""
NOUNS = tuple(_NOUNS.split())
"""Second halves of keys."""

_FIRST_NAMES = """
Ada Alban Anders Anika Bela Bram Carla Casper Celia Dario Delia Edda Elias Elsa Emil Enzo Fabian Fiona Freya Gideon
Gilda Greta Hanno Hilda Ilse Imre Ines Ivo Jarek Jonas Jutta Katya Lars Lena Linus Luca Magda Marek Marta Milo Mira
Nadia Nils Odette Olga Otto Paola Pavel Petra Quentin Rafael Renata Rolf Rosa Sabine Selma Stefan Sven Tessa Tilda
Tobias Ulla Vito Wanda Xenia Yara Zora
"""
FIRST_NAMES = tuple(_FIRST_NAMES.split())
"""First names of invented people."""

_PROFESSIONS = """
architect astronomer baker botanist carpenter cartographer clockmaker composer dentist engraver farmer fisherman
gardener geologist glassblower goldsmith historian jeweller librarian locksmith mason mathematician miller musician
painter pharmacist photographer physician pilot poet potter printer sculptor shoemaker surgeon surveyor tailor
translator watchmaker weaver
"""
PROFESSIONS = tuple(_PROFESSIONS.split())
"""What invented people do."""

_GOODS = """
anchors baskets bells blankets boots bricks brooms candles carpets chairs chisels clocks combs drums earrings
envelopes fishhooks flutes gloves hammers hats honey kettles kites knives lace ladders lanterns locks marbles mirrors
mustard nails needles paper pencils pianos pipes puppets ribbons rope saddles sails scarves shovels soap spoons tiles
trumpets umbrellas vases vinegar violins wheels whistles
"""
GOODS = tuple(_GOODS.split())
"""What is made in invented towns."""

_ONSETS = "b br c ch d dr f fl g gr h j k kl l m n p pl qu r s sh st t tr v w z"
_STARTS = tuple(_ONSETS.split())
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ou")
_ENDS = ("", "", "l", "m", "n", "nd", "r", "rn", "rt", "sk", "st", "t", "x")


def invented_words(rng: random.Random, syllables: int = 3) -> Iterator[str]:
    """Endless pronounceable words that are all different, in small letters; most are in no dictionary."""
    seen: set[str] = set()
    while True:
        parts = [rng.choice(_STARTS) + rng.choice(_VOWELS) for _ in range(syllables)]
        word = "".join(parts) + rng.choice(_ENDS)
        if word not in seen:
            seen.add(word)
            yield word


def keys(rng: random.Random) -> Iterator[str]:
    """Endless keys "adjective-noun" that are all different; after those come some with a third word."""
    pairs = len(ADJECTIVES) * len(NOUNS)
    seen: set[str] = set()
    while True:
        key = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
        if len(seen) > pairs // 2:
            key = f"{key}-{rng.choice(NOUNS)}"
        if key not in seen:
            seen.add(key)
            yield key
