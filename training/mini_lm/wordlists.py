"""Keys and values of the retrieval texts; the tokenizer keeps each of them as one token after a space."""

from __future__ import annotations

_NAMES = """
Adam Agnes Albert Alfred Alice Alma Amos Amy Ann Anna Anthony Arthur Basil Ben Bernard Bertha Beth Betty Bob
Bruce Caleb Carol Charles Clara Clive Colin Conrad Cora Cyril Daniel David Dennis Diana Donald Dora Duncan
Edgar Edmund Edward Eleanor Ella Ellen Emma Eric Ernest Esther Eva Fanny Felix Flora Frances Francis Frank
Fred George Gerald Gertrude Gilbert Gordon Grace Guy Gwen Hannah Harold Harriet Harry Helen Henry Herbert
Hester Hubert Hugh Hugo Ida Irene Isaac Isabel Ivan Jack Jacob James Jane Jasper Jerome John Joseph
Josephine Joshua Judith Julia Julian Karl Kate Katherine Kenneth Laura Lawrence Leo Leonard Lewis Lionel
Louis Louise Lucy Luke Lydia Mabel Maggie Margaret Maria Marian Mark Martha Martin Mary Maurice Max Meg
Miles Molly Nancy Nell Neville Nicholas Nigel Noah Nora Norman Olive Oliver Oscar Owen Patrick Paul Pearl
Percy Peter Philip Polly Rachel Ralph Rebecca Richard Robert Roger Ronald Rosalind Rose Roy Rupert Ruth Sam
Samuel Sarah Silas Simon Sophia Stanley Stella Stephen Susan Sylvia Teresa Theodore Thomas Timothy Tom
Ursula Vera Victor Vincent Viola Virginia Walter Wilfred William Winifred
"""

_WORDS = """
angel apron arm armchair army arrival arrow artist aunt author baby bachelor baker balcony ball bank banker
bar barber bargain barrel barrier basket battle beach beard beast beggar bell bench bill birthday bishop
blanket blessing boat book bottle bottom bowl box branch bread breast breath bride bridge brother brow
bundle butter button cabin cage cake camp candle candlestick cannon captain card carpet carriage cart castle
cat ceiling cellar chain chair chapel chapter cheek chest chimney chin church cigar clock cloak cloth cloud
club coach coachman coast coat coffee coffin collar colonel color companion convent copper corner corridor
cottage couch cousin cow cradle crew criminal crowd crown cup curtain custom dance daughter deck deed desk
devil diamond dinner doctor dog donkey door dove drawer drawing dream dress driver drum duchess duke dust
eagle ear earth east edge egg elbow emperor engine envelope estate evening farm farmer father feather fence
ferry field finger fire fish flag flame floor flower fog foot footman forehead forest fork fortune fountain
fox friend frost fruit garden gate gift glass glove gold goose governor grass grave guard guest gun hall
hammer hand harbour hat head heart heel hero hill hole home honey hook horizon horse hospital host hotel
hour house household hunter husband ice inch infant ink inn island jacket jewel journey judge jury key king
kingdom kitchen knee knife knight lady lake lamp landlord lane lantern lawn lawyer leaf leather lemon lesson
letter library lion lip lock lodge lord lover market marriage master meadow meal medicine merchant message
messenger metal mile milk mill mine minister mirror mission monster month moon morning mother mountain mouse
mouth murderer museum music nail neck needle neighbour nephew nest newspaper niece night north nose nurse
oak ocean office officer orange orchard orphan oven owner page painter palace paper parcel parent parish
park parlour party passage path pavement peasant pen pencil people piano picture pillow pipe pirate pistol
plate pocket poet police porch porter portrait prayer priest prince princess prison prisoner purse quarter
queen rabbit railway rain rat ribbon rice ring river road rock roof room rope rose saddle sailor salt sand
school sea seat secretary servant shadow sheep shelf shepherd ship shirt shoe shop shoulder silk silver
sister skin sky slave sleep smoke snake snow sofa soldier son song soul south spoon spring square squire
stable stage stair star station steam stick stone storm story stove stranger stream street student sugar
summer sun supper surgeon sword table tailor tea teacher temple tent theatre thief throat throne tiger
tobacco tomb tongue tower town toy train traveller treasure tree trunk tunnel uncle valley veil velvet
vessel village violin visitor voice wagon waist waiter wall water wave weather wedding whale wheat wheel
whip whisper widow wife wind window wine winter witness wolf woman wood wool world writer yard
"""

NAMES: list[str] = _NAMES.split()
WORDS: list[str] = _WORDS.split()

OPENINGS = (
    " The key to",
    " The password of",
    " The name of the friend of",
    " It is known that",
    " They say that",
    " Note that",
    " The price of",
    " Long ago,",
    " The colour of",
    " For",
    " Everyone knows that",
    " The room of",
)
LINKS = (" is", " was", " has", " means", ":", " =", " keeps the", " belongs to", " takes the")
