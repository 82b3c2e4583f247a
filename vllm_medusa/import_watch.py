"""Act on a module right after its import, whether that is over, under way or still to come."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from typing import Any


def after_import(module_name: str, action: Callable[[Any], None]) -> None:
    """Run ``action(module)`` as soon as the module is complete: now, or after its import."""
    module = sys.modules.get(module_name)
    if module is None:
        sys.meta_path.insert(0, _ImportWatch(module_name, action))
    elif getattr(module.__spec__, "_initializing", False):
        _watch_first_read(module, action)
    else:
        action(module)


class _ImportWatch(importlib.abc.MetaPathFinder):
    """Finds one module like everybody else, and acts when it has been executed."""

    def __init__(self, module_name: str, action: Callable[[Any], None]):
        self.module_name, self.action = module_name, action

    def find_spec(self, name, path, target=None):
        if name != self.module_name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.action(module)

        spec.loader.exec_module = exec_module
        return spec


def _watch_first_read(module: Any, action: Callable[[Any], None]) -> None:
    """Act at the first read of a module whose import is under way right now."""
    plain_class = type(module)

    class Watched(plain_class):
        def __getattribute__(self, name):
            if name != "__spec__" and not self.__spec__._initializing:
                self.__class__ = plain_class
                action(self)
                return getattr(self, name)
            return super().__getattribute__(name)

    module.__class__ = Watched
