"""How old what is signed may be: old versions and old rules were signed, too. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from appliance.image.model import VERSION, Finding, Kernel, Status, Verdict
from appliance.image.verify import Wanted, strip_tries

Compare = Callable[[str, str], int]


@dataclass(frozen=True, slots=True)
class Minimum:
    """What is wanted at least; None: anything that is signed."""

    version: str | None = None
    serial: int | None = None


def require_minimum(verdict: Verdict, minimum: Minimum, compare: Compare) -> Verdict:
    """With a finding for each kernel and each copy of the rules that is older. Raises as ``compare``, which is
    -1, 0 or 1.
    """
    older = (*_find_old_kernels(verdict, minimum, compare), *_find_old_rules(verdict, minimum))
    return replace(verdict, findings=(*verdict.findings, *older))


def _find_old_kernels(verdict: Verdict, minimum: Minimum, compare: Compare) -> Iterator[Finding]:
    if minimum.version is None:
        return
    for kernel in verdict.kernels:
        if not VERSION.fullmatch(kernel.version) or compare(kernel.version, minimum.version) < 0:
            detail = f"version {kernel.version or 'unknown'} can boot, {minimum.version} is wanted"
            yield Finding(f"esp {kernel.path}", Status.OLDER, detail)


def _find_old_rules(verdict: Verdict, minimum: Minimum) -> Iterator[Finding]:
    if minimum.serial is None:
        return
    if not verdict.serials:
        detail = f"no bundle that can be used, serial {minimum.serial} is wanted"
        yield Finding("rules", Status.OLDER, detail)
    for serial in dict.fromkeys(verdict.serials):
        if serial < minimum.serial:
            yield Finding("rules", Status.OLDER, f"serial {serial}, {minimum.serial} is wanted")


def list_not_compared(verdict: Verdict, wanted: Wanted, minimum: Minimum) -> tuple[str, ...]:
    """Sentences on what the findings say nothing of, and with what they would."""
    told = []
    if minimum.version is None and any(not _is_pinned(one, wanted) for one in verdict.kernels):
        found = ", ".join(one or "unknown" for one in verdict.versions)
        told.append(f"how old the version is: {found} (--minimum-version)")
    if minimum.serial is None:
        found = ", ".join(str(one) for one in dict.fromkeys(verdict.serials))
        told.append(
            f"how old the rules are: {f'serial {found}' if found else 'no bundle'} (--minimum-serial)"
        )
    if wanted.manifest is None:
        told.append("whether signed programs are those of this image (--manifest)")
    if wanted.ran:
        told.append(
            "what an appliance writes: /var, unused space, labels, counts of tries (without --ran)"
        )
    return tuple(told)


def _is_pinned(kernel: Kernel, wanted: Wanted) -> bool:
    """Whether the manifest says which one it is."""
    listed = wanted.manifest.files if wanted.manifest else {}
    return strip_tries(kernel.path) in {strip_tries(path) for path in listed}
