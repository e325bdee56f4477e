"""What people's tokenizers and templates do: end tokens, refused roles, dropped system texts, named templates."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tokenizers.processors import TemplateProcessing

import rsim
from rsim.config import load_config
from rsim.errors import UserError
from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.lab.tokenizer import build_tokenizer
from rsim.models.prompts import begin_ids
from rsim.policies.planner import Planner
from rsim.policies.reasoner import Reasoner
from rsim.rules_file import overridden
from rsim.serving.local_upstream import LocalUpstream
from rsim.serving.play import Asked
from tiny import RULES

_STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<q>{{ m['content'] }}{% endfor %}<a>"
)
_PARTS = "{% for m in messages %}{% if m.role == 'user' %}{% for p in m.content %}{{ p.text }}{% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}"  # fmt: skip
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
        (_PARTS, "leaves the user text out"),
        ({"rag": _DEAF, "tool_use": _DEAF}, "refuses the messages"),
        ("{{ 1/0 }}", "refuses the messages .division by zero"),
    ],
)
def test_a_template_that_refuses_is_one_line_that_names_the_setting(reasoner, template, why):
    """It was a traceback in training and a 500 from the server; a text that was left out was not noticed at all."""
    prompted = Reasoner(reasoner.model, reasoner.tokenizer, "Think in steps.")
    prompted.tokenizer.chat_template = template
    with pytest.raises(UserError, match=why) as refused:
        prompted.prompt_ids("7=?")
    assert "models.system_prompt" in str(refused.value)


@pytest.mark.parametrize("system", ["7", "You are", "a"])
def test_a_short_system_text_that_a_template_drops_is_noticed(reasoner, system):
    """It stood in the question, or in the template's own words."""
    prompted = Reasoner(reasoner.model, reasoner.tokenizer, system)
    prompted.tokenizer.chat_template = "You are a model. " + _DEAF
    with pytest.raises(UserError, match="leaves the system text out"):
        prompted.prompt_ids("7=?")
    prompted.tokenizer.chat_template = "{% for m in messages %}<q>{{ m['content'] | trim }}{% endfor %}<a>"
    assert prompted.prompt_ids(" 7=?") == reasoner.injected_ids(f"<q>{system}<q>7=?<a>")


def test_training_with_a_system_prompt_that_the_template_refuses_is_one_line(small, base_folder):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = _STRICT
    tokenizer.save_pretrained(base_folder)
    with pytest.raises(UserError, match=r"System role not supported.*models\.system_prompt"):
        rsim.train(small("run", "models.system_prompt=Think in steps."))


_DATED = (
    "{% if strftime_now is defined %}Today is {{ strftime_now( '%d %b %Y' ) }}{% endif %}<q>{{ messages[-1]['content'] }}<a>"
)


def test_a_template_that_says_the_date_says_a_recorded_one(reasoner, planner, tmp_path):
    """It said the day on which it was asked: a resumed run, and a later evaluation, had other prompts."""
    reasoner.tokenizer.chat_template = _DATED
    said = reasoner.tokenizer.decode(reasoner.prompt_ids("7=?"))
    assert said == reasoner.tokenizer.decode(reasoner.injected_ids("Today is 01 Jan 2026<q>7=?<a>"))
    rules = replace(RULES, day="2027-03-02")
    expected = reasoner.injected_ids("Today is 02 Mar 2027<q>7=?<a>")
    episode = Game(reasoner, planner, rules).play([Problem("7=?", "7")], seed=0)[0]
    assert episode.token_ids[: episode.prompt_length] == expected
    planner.rules = overridden(rules)
    planner.save_pretrained(tmp_path / "p")
    assert Planner.from_pretrained(tmp_path / "p").rules.day == "2027-03-02"
    with planner.wrap(reasoner.model, reasoner.tokenizer) as wrapped:
        assert wrapped.upstream._prompt(Asked("", [{"role": "user", "content": "7=?"}], None)) == expected
    reasoner.tokenizer.chat_template = _DATED.replace("now( ", "now (")
    assert reasoner.tokenizer.decode(reasoner.prompt_ids("7=?")) == said
    for template in ("{{ strftime_now(form) }}", "{% set now = strftime_now %}{{ now('%d') }}{{ messages[0].content }}"):
        reasoner.tokenizer.chat_template = template
        with pytest.raises(UserError, match="asks for the date"):
            reasoner.prompt_ids("7=?")
    with pytest.raises(UserError, match=r"rollout\.day = 'today'.*YYYY-MM-DD"):
        load_config("nano", ["rollout.day=today"])
    with pytest.raises(UserError, match="YYYY-MM-DD"):
        overridden(rules, day="2027-02-30")


@pytest.mark.parametrize("template", ["the lab's", None])
def test_a_chat_reaches_the_model_as_the_texts_that_it_holds(reasoner, template):
    """Parts became Python's repr, and without a template all turns but the last user's were left out, without a word."""
    if template is None:
        reasoner.tokenizer.chat_template = None
    user, turn = {"role": "user", "content": "7=?"}, {"role": "assistant", "content": "7"}
    upstream = LocalUpstream(reasoner, slots=1)

    def prompt(*messages, continues=False):
        return upstream._prompt(Asked("m", list(messages), None, continues=continues))

    try:
        parts = user | {"content": [{"type": "text", "text": "7"}, {"type": "text", "text": "=?"}]}
        assert prompt(user) == reasoner.prompt_ids("7=?")
        assert prompt(parts) == reasoner.prompt_ids("7\n=?")
        system = {"role": "system", "content": "1+1=2"}
        prompted = Reasoner(reasoner.model, reasoner.tokenizer, "1+1=2")
        if template is None:
            assert prompt(system, user) == prompted.prompt_ids("7=?")
            assert prompt(system, user, turn, user) == reasoner.injected_ids("1+1=2\n\n7=?\n\n7\n\n7=?\n")
            assert prompt(user, turn, continues=True) == reasoner.injected_ids("7=?\n\n7")
        else:
            reasoner.tokenizer.chat_template = "{% for m in messages %}<q>{{ m['content'] }}{% endfor %}<a>"
            assert prompt(user, turn, user) == reasoner.injected_ids("<q>7=?<q>7<q>7=?<a>")
        image = {"type": "image_url", "image_url": {"url": "x"}}
        for content in (None, [image], [{"type": "text", "text": 7}], 7, {"text": "7"}):
            with pytest.raises(UserError, match=r"messages\[1\]: a message's content must be a text"):
                prompt(system, user | {"content": content})
    finally:
        upstream.close()
