"""The lab's tokenizer: one token per digit and operator, one per word of the lab's language.

It is lossless on printable ASCII (any character stands as itself), so that questions from outside the lab can be asked.
Multi-character tokens are matched longest first, before the character level.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from rsim.lab.problems import NAMES, THINGS
from rsim.planner.template import MARKER, QUESTION_PREFIX, strategy_chunk
from rsim.strategies import load_strategies

PAD, EOS, QUESTION, ANSWER = "<pad>", "<eos>", "<q>", "<a>"
DELIMITER = "\n"

_STORY = (" has", " finds", " buys", " gives", " loses", " boxes", " of", ". how many?")
_OTHER = (", x=?", "=?", " minus all", ", how much?", "day", " days", " weeks", ", then", " later", " earlier", ", which day?")
_STEPS = (" back", " parts", " slowly", " check", " total", " first", " plan", " next", " so", " ok", " fixed", " missing",
          " \\boxed{")  # fmt: skip

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<a>{{ m['content'] }}{% else %}<q>{{ m['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The lab tokenizer, made from nothing; the same on every machine."""
    strategies = load_strategies("lab")
    phrases = [prompt for s in strategies.strategies for prompt in s.prompts]
    planner = [QUESTION_PREFIX, MARKER, *(strategy_chunk(name) for name in strategies.names)]
    words = [*NAMES, *(f" {thing}" for thing in THINGS), *_STORY, *_OTHER, *_STEPS, *phrases, *planner]
    characters = [DELIMITER, *map(chr, range(32, 127))]
    specials = [PAD, EOS, QUESTION, ANSWER]
    vocabulary = {token: index for index, token in enumerate([*specials, *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=None))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(specials)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
