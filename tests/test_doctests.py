"""The examples in the docstrings of the method run and print what they say."""

import doctest
import importlib
import inspect

import pytest


@pytest.mark.parametrize("name", ["pooling", "combination", "losses", "metrics"])
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    module = importlib.import_module(f"cgd_jax.{name}")
    tests = {test.name: test for test in doctest.DocTestFinder().find(module)}
    runner = doctest.DocTestRunner()
    for test in tests.values():
        runner.run(test)
    assert runner.summarize().failed == 0
    functions = [f for f in module.__all__ if inspect.isroutine(inspect.unwrap(vars(module)[f]))]
    without = [f for f in functions if not tests[f"{module.__name__}.{f}"].examples]
    assert not without, f"no example in the docstring of {without}"
