"""A stand-in for torchvision, which the kit imports and these runs do not use."""

import importlib.abc
import importlib.machinery
import sys


class Names(type):
    """Attributes of the class are the class again."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class Refused(metaclass=Names):
    """A function or class that refuses to be used."""

    def __init__(self, *arguments, **settings):
        raise RuntimeError("torchvision is not installed here")


def refused(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Refused


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torchvision and whatever is asked for below it."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        module.__getattr__ = refused
        module.__version__ = "0"


sys.meta_path.append(StandIn())
