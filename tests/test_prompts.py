"""What people's tokenizers and templates do: end tokens, refused roles, dropped system texts, named templates."""

from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing

from rsim.errors import UserError
from rsim.models.prompts import begin_ids
from rsim.policies.reasoner import Reasoner

_STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<q>{{ m['content'] }}{% endfor %}<a>"
)
_DEAF = "{% for m in messages if m['role'] == 'user' %}<q>{{ m['content'] }}{% endfor %}<a>"


def test_an_end_token_that_a_tokenizer_appends_is_not_in_the_prompt(reasoner, planner):
    """`add_eos_token = true` ended the prompt with it, and stood between the question and the planner's marker."""
    for tokenizer in (reasoner.tokenizer, planner.tokenizer):
        begin, end = tokenizer.convert_ids_to_tokens(5), tokenizer.eos_token
        kinds = [(begin, 5), (end, tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{begin} $A {end}", special_tokens=kinds)
        tokenizer.chat_template = None
    ids = reasoner.prompt_ids("7=?")
    assert ids[0] == 5, "what is put before a text stays"
    assert ids[1:] == reasoner.tokenizer.encode("7=?\n", add_special_tokens=False)
    assert planner.tokenizer.eos_token_id not in planner.opening("7=?")
    assert begin_ids(planner.tokenizer, "") == [5]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (_STRICT, "System role not supported"),
        (_DEAF, "leaves the system text out"),
        ({"rag": _DEAF, "tool_use": _DEAF}, "refuses the messages"),
    ],
)
def test_a_template_that_refuses_is_one_line_that_names_the_setting(reasoner, template, why):
    """It was a traceback in training and a 500 from the server; a dropped system text was not noticed at all."""
    prompted = Reasoner(reasoner.model, reasoner.tokenizer, "Think in steps.")
    prompted.tokenizer.chat_template = template
    with pytest.raises(UserError, match=why) as refused:
        prompted.prompt_ids("7=?")
    assert "models.system_prompt" in str(refused.value)
