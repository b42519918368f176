"""The lab's fixtures, for every test in this folder."""

from tests.support.lab import bare_lab, end_in_order, lab, module_lab

__all__ = ["bare_lab", "end_in_order", "lab", "module_lab"]
