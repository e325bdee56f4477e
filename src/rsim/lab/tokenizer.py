"""The lab's tokenizer: one token per digit and operator, one per word of the lab's language.

Byte-level below its words, so it is lossless on any text. It is built as a `Qwen2Tokenizer`, because that is what
`AutoTokenizer` makes of any tokenizer saved beside a Qwen2 model, whatever class its files name; a plain character-level
tokenizer would come back with Qwen's byte-level pre-tokenizer in front and lose its spaces.
"""

from __future__ import annotations

from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

from rsim.lab.problems import NAMES, THINGS
from rsim.lab.steps import WORDS
from rsim.policies.strategies import load_strategies
from rsim.policies.template import MARKER, QUESTION_PREFIX, strategy_chunk

PAD, EOS, QUESTION, ANSWER = "<pad>", "<eos>", "<q>", "<a>"
DELIMITER = "\n"

_STORY = (" has", " finds", " buys", " gives", " loses", ". how many?")
_OTHER = (", x=?", "=?", "day", " days", ", then", " later", " earlier", ", which day?")
_STEPS = (*(f" {word}" for word in WORDS.values()), " so", " \\boxed{")

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<a>{{ m['content'] }}{% else %}<q>{{ m['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def build_tokenizer(*, spelled: bool = False) -> Qwen2Tokenizer:
    """The lab tokenizer, made from nothing; the same on every machine.

    ``spelled``: the second family's, which spells the strategies' prompts, names and things letter by letter.
    """
    strategies = load_strategies("lab")
    phrases = [prompt for s in strategies.strategies for prompt in s.prompts]
    planner = [QUESTION_PREFIX, MARKER, *(strategy_chunk(name) for name in strategies.names)]
    words = [*NAMES, *(f" {thing}" for thing in THINGS), *_STORY, *_OTHER, *_STEPS, *phrases, *planner]
    if spelled:
        words = [*_STORY, *_OTHER, *_STEPS, *planner]
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, QUESTION, ANSWER, *sorted(ByteLevel.alphabet())])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=[], unk_token=None, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [QUESTION, ANSWER]})
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
