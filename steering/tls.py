"""Who we are and whom we believe on a connection to a switch by TLS. Values only; no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

# As OVS's own tools are told it (ovs-ofctl(8), --ssl-protocols); older versions of TLS are refused.
PROTOCOLS = "TLSv1.2"
WARN_SECONDS = 30 * 86400.0  # a certificate that ends sooner is told


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of one end. ``name``: what the other end's certificate must be for; None: its address."""

    ca: Path
    certificate: Path
    key: Path
    name: str | None = None

    @property
    def options(self) -> tuple[str, ...]:
        """For ovs-vsctl and ovs-ofctl; both then refuse a peer that ``ca`` did not sign."""
        return (
            f"--private-key={self.key}",
            f"--certificate={self.certificate}",
            f"--ca-cert={self.ca}",
            f"--ssl-protocols={PROTOCOLS}",
        )


def find_options(target: str, tls: TlsFiles | None) -> tuple[str, ...]:
    """`TlsFiles.options` where ``target`` is spoken to by TLS; else none."""
    return tls.options if tls is not None and target.startswith("ssl:") else ()


def split_target(target: str) -> tuple[str, int]:
    """(address, port) of ``ssl:ADDRESS:PORT``. Raises ValueError."""
    method, _, rest = target.partition(":")
    address, _, port = rest.rpartition(":")
    if method != "ssl" or not address:
        raise ValueError(f"{target!r} is not of the form ssl:ADDRESS:PORT")
    return str(ip_address(address.strip("[]"))), int(port)


def find_ending(ends: dict[str, float], now: float) -> tuple[str, ...]:
    """A sentence for each certificate that ends soon; ``ends`` by whose it is, in epoch seconds."""
    return tuple(
        f"{whose} ends in {max(0, int((end - now) // 86400))} days: then the switch can't be kept "
        "right any more; issue new ones with `hairpin host prepare --renew` (docs/deploy.md)"
        for whose, end in sorted(ends.items())
        if end - now < WARN_SECONDS
    )
