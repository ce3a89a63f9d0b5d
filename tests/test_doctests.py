"""The examples in the docstrings of the method run and print what they say."""

import doctest
import importlib
import inspect

import pytest

from tests import quick

MODULES = (
    "combination metrics losses labels ranking retrieval rerank complementarity protocols".split()
)
MODULES += "geography losses.pairs".split()
# Those that compile for seconds.
DEAR = "pooling losses.ranking losses.listwise losses.miners losses.classification".split()
DEAR += ["attribution"]


@pytest.mark.parametrize("name", quick.first(MODULES + DEAR, len(MODULES)))
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    module = importlib.import_module(f"cgd_jax.{name}")
    tests = {test.name: test for test in doctest.DocTestFinder().find(module)}
    runner = doctest.DocTestRunner()
    for test in tests.values():
        runner.run(test)
    assert runner.summarize().failed == 0
    own = lambda f: inspect.isroutine(f) and f.__module__ == module.__name__
    functions = [f for f in module.__all__ if own(inspect.unwrap(vars(module)[f]))]
    without = [f for f in functions if not tests[f"{module.__name__}.{f}"].examples]
    assert not without, f"no example in the docstring of {without}"
