"""Mutants can be made: the list keeps up with the source, what is drawn is Python that differs from it and is the same again."""

from __future__ import annotations

import ast
import os
from collections import Counter

import mutate


def test_the_list_keeps_up_with_the_source():
    for mutant in mutate.known():
        source = (mutate.ROOT / "src/rsim" / mutant.file).read_text(encoding="utf-8")
        assert ast.dump(ast.parse(mutant.text)) != ast.dump(ast.parse(source)), mutant.what
    assert len({m.what for m in mutate.known()}) == len(mutate.KNOWN) >= 25


def test_every_module_has_tests_and_mutants():
    for file, tests in mutate.TESTS.items():
        source = (mutate.ROOT / "src/rsim" / file).read_text(encoding="utf-8")
        plain = ast.dump(ast.parse(source))
        found = list(mutate.mutants_of(file))[:: 1 if os.environ.get("RSIM_FULL") else 8]
        assert found, file
        assert all(ast.dump(ast.parse(m.text)) != plain for m in found), file
        assert all((mutate.ROOT / f"tests/{name}.py").is_file() for name in tests)


def test_what_a_seed_draws_is_always_the_same():
    one, again, other = mutate.drawn(50, 1), mutate.drawn(50, 1), mutate.drawn(50, 2)
    assert one == again != other
    assert len(Counter(m.file for m in one)) > 5
