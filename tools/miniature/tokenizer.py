"""The miniature's two tokenizers: CLIP's byte-level BPE over a small vocabulary of our own.

Any text has tokens, for every byte is one; words of the corpus below are one token each.
"""

from collections import Counter
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

from tools.miniature.drawing import COLORS, NEW_SHAPES, OLD_SHAPES, POSITIONS, SENTENCES
from tools.small_sdxl import EOS, Pair, write_tokenizer

NUM_MERGES = 600
COMMON = """
the of and to in a is that it was for on are with as his they be at one have this from or had by
hot but some what there we can out other were all your when up use word how said an each she which
do their time if will way about many then them would write like so these her long make thing see him
two has look more day could go come did my sound no most number who over know water than call first
people may down side been now find any new work part take get place made live where after back
little only round man year came show every good me give our under name very through just form much
great think say help low line before turn cause same mean differ move right boy old too does tell
sentence set three want air well also play small end put home read hand port large spell add even
land here must big high such follow act why ask men change went light kind off need house picture
try us again animal point mother world near build self earth father head stand own page should
country found answer school grow study still learn plant cover food sun four thought let keep eye
never last door between city tree cross since hard start might story saw far sea draw left late run
star moon heart drawing photo photograph painting image shape colour color background ground sky
bright dark pale deep soft plain simple centre center middle top bottom corner above below beside
medium tiny huge tall short wide narrow round flat grey gray pink brown cyan gold silver cat dog
bird fish horse flower face eyes hair woman girl child blurry quality best worst style art digital
"""


def make_tokenizers(folder: Path) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """Write and return ``tokenizer`` and ``tokenizer_2``: SDXL's pad with EOS, and with id 0."""
    merges = learn_merges(corpus(), NUM_MERGES)
    first = write_tokenizer(folder / "tokenizer", merges, pad_token=EOS)
    return first, write_tokenizer(folder / "tokenizer_2", merges, pad_token="!")


def corpus() -> Counter[str]:
    """Words and how often they are met: the captions' words often, common ones once."""
    vocabulary = " ".join([*COLORS, *OLD_SHAPES, *NEW_SHAPES, *POSITIONS, "small large"])
    # Placeholders count as words; the spelling is that of the published tokenizers.
    sentences = " ".join(SENTENCES).replace("{color}", "{colour}")
    vocabulary += " " + sentences.translate(str.maketrans("{},", "   "))
    return Counter({word: 20 for word in vocabulary.split()}) + Counter(COMMON.split())


def learn_merges(words: Counter[str], num: int) -> list[Pair]:
    """Byte-pair encoding (Sennrich et al. 2016): again and again join the commonest neighbours."""
    split = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[Pair] = []
    while len(merges) < num:
        pairs: Counter[Pair] = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = {word: _join(parts, best) for word, parts in split.items()}
    return merges


def _join(parts: list[str], pair: Pair) -> list[str]:
    joined: list[str] = []
    for part in parts:
        # A part that was joined just now is longer than pair[0], so it is not joined twice.
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined
