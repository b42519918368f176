"""The lab's fixtures, for every test in this folder."""

from tests.support.lab import bare_lab, lab, module_lab

__all__ = ["bare_lab", "lab", "module_lab"]
