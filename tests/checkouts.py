"""Files of a reference checkout as modules, and stand-ins for what they import: each for one test only."""
import importlib.util
import sys
import types


def module(monkeypatch, name, path):
    "One file as the module `name`."
    spec = importlib.util.spec_from_file_location(name, path)
    found = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, found)
    spec.loader.exec_module(found)
    return found


def stub(monkeypatch, name, **content):
    "An empty package `name`, but for `content`."
    found = types.ModuleType(name)
    found.__path__ = []
    found.__dict__.update(content)
    monkeypatch.setitem(sys.modules, name, found)
    return found
