from __future__ import annotations

from dataclasses import replace

import pytest

from rsim.answers.extract import boxed
from rsim.answers.prefix import as_message, open_prefix
from rsim.errors import UserError
from rsim.policies import template
from rsim.policies.strategies import StrategySet, load_strategies, to_toml

NINE = {"self-reflection", "decomposition", "deliberation", "validation", "summarization", "prioritization", "sub-planning",
        "continuation", "termination"}  # fmt: skip


@pytest.mark.parametrize("source", ["default", "instruct", "sentences", "code", "lab"])
def test_the_nine(source):
    strategies = load_strategies(source)
    assert set(strategies.names) == NINE
    for s in strategies.strategies:
        assert s.description
        assert len(s.prompts) >= 2 or s.prompts == ("",)
        assert s.keywords
        assert all(not boxed(p) for p in s.prompts), "a prompt must hold no parseable box"
    assert strategies[strategies.termination].name == "termination"


@pytest.mark.parametrize("source", ["default", "instruct", "sentences", "code"])
def test_a_free_continuation_is_for_instruction_tuned_models(source):
    strategies = load_strategies(source)
    free = strategies[strategies.index("continuation")].prompts == ("",)
    assert free == (source in ("instruct", "code"))


@pytest.mark.parametrize("source", ["default", "instruct", "code"])
def test_termination_prompts_open_what_the_answer_is_written_into(source):
    """After "... in \\boxed{}." Qwen2.5-Coder-1.5B-Instruct ends its turn at once; after a colon it often does so too: 146 of 162
    programs of HumanEval were empty (a fixed sequence that ends in termination)."""
    strategies = load_strategies(source)
    final = strategies[strategies.termination]
    assert {open_prefix(prompt) for prompt in final.prompts} == {"```python\n" if source == "code" else "\\boxed{"}


def test_only_what_a_prompt_leaves_open_at_its_end_counts():
    for closed in (
        "Now in \\boxed{}.",
        "\\boxed{ or not",
        "```python\nx = 1\n",
        "As here:\n```python\nx = 1\n```\n",
        "```rust\n",
    ):
        assert open_prefix(closed) == ""
        assert as_message(closed) == closed


@pytest.mark.parametrize("source", ["default", "instruct", "acting", "code"])
def test_prompts_break_off_in_mid_sentence(source):
    """After a whole sentence an instruction-tuned model begins a new paragraph: the step is over before it began."""
    for strategy in load_strategies(source).strategies:
        assert not any(prompt.endswith((".", "!", "?")) for prompt in strategy.prompts)


def test_a_file_replaces_the_set(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('[[strategy]]\nname = "go"\nprompts = ["Go:"]\n[[strategy]]\nname = "termination"\nprompts = ["End:"]\n')
    assert load_strategies(str(file)).names == ("go", "termination")


def test_a_file_extends_and_overrides(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('extends = "default"\n[[strategy]]\nname = "validation"\nprompts = ["Mine."]\n'
                    '[[strategy]]\nname = "analogy"\nprompts = ["Like what?"]\n')  # fmt: skip
    strategies = load_strategies(str(file))
    assert len(strategies) == 10
    assert strategies.names[-1] == "analogy"
    assert strategies[strategies.index("validation")].prompts == ("Mine.",)


@pytest.mark.parametrize(("text", "message"), [
    ("", "termination"), ("not toml [", "TOML"), ('colour = 1\n', "colour"), ('extends = "x"\n', "extends"),
    ('[[strategy]]\nprompts = ["a"]\n', "no name"), ('[[strategy]]\nname = "a"\n', "prompts"),
    ('[[strategy]]\nname = "a"\nprompts = []\n', "prompts"), ('[[strategy]]\nname = "a"\nprompts = ["x"]\nspeed = 1\n', "speed"),
    ('[[strategy]]\nname = "a"\nprompts = ["x"]\nkeywords = "k"\n', "keywords"),
    ('[[strategy]]\nname = "a"\nprompts = ["x"]\n' * 2, "twice"),
    ('[[strategy]]\nname = "termination"\nprompts = ["So \\\\boxed{5}"]\n', "boxed"),
    ('[[strategy]]\nname = "termination"\nprompts = ["End:", ""]\n', "empty prompt"),
    ('[[strategy]]\nname = "a"\nprompts = [" "]\n', "prompts"),
    ('[[strategy]]\nname = "a"\nprompts = ["x"]\ntool = "bash"\n', "use one of python, calculator"),
    ('[[strategy]]\nname = "a"\nprompts = ["x"]\ntool = "python"\n', "open code block"),
    ('[[strategy]]\nname = "a"\nprompts = ["x```python\\n", "y"]\ntool = "python"\n', "open code block"),
    ('[[strategy]]\nname = "a"\nprompts = [""]\nunlimited = true\ntool = "calculator"\n', "null action"),
    ('[[strategy]]\nname = "termination"\nprompts = ["x```python\\n"]\ntool = "python"\n', "null action"),
])  # fmt: skip
def test_bad_files_are_refused_by_name(tmp_path, text, message):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_strategies(str(file))


def test_sets_with_tools_are_saved_and_read_back(tmp_path):
    arms = load_strategies("arms")
    assert arms.names[:9] == load_strategies("instruct").names == load_strategies("acting").names[:9]
    assert {arms.names[i]: tool for i, tool in arms.tools.items()} == {"computation": "python", "recalculation": "calculator"}
    assert arms.names[9:] == ("computation", "alone", "recalculation")
    file = tmp_path / "arms.toml"
    file.write_text(to_toml(arms))
    assert load_strategies(str(file)) == arms
    assert "tool" not in to_toml(load_strategies("default")), "sets without tools are written as before"


def test_a_step_without_intervention_is_never_a_termination():
    nine = load_strategies("lab")
    assert nine.names[nine.neutral] == "continuation"
    by_name = {s.name: replace(s, repeat_free=False) for s in nine.strategies}
    for names, expected in ((("termination", "validation"), "validation"), (("validation", "termination"), "validation")):
        strategies = StrategySet(tuple(by_name[name] for name in names))
        assert strategies.names[strategies.neutral] == expected
    free = StrategySet((by_name["termination"], by_name["validation"], replace(by_name["deliberation"], repeat_free=True)))
    assert free.names[free.neutral] == "deliberation"


def test_missing_file():
    with pytest.raises(UserError, match="not found"):
        load_strategies("nowhere.toml")


def test_evidence_matches_whole_words():
    validation = load_strategies("default")
    s = validation[validation.index("validation")]
    assert s.shows_evidence("Let me CHECK it")
    assert not s.shows_evidence("the paycheck")


def test_template_is_what_the_planner_reads():
    text = template.render("q", [("validation", " check")])
    assert text == "Question: q\nNext strategy: validation\n check\nNext strategy:"
    assert template.VERSION == "rsim-planner-1", "a new template needs a new version: old planners were trained on this one"
