"""Read and check the settings by which a site reaches its coordinator: the address, the answer and
the keys."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedtune.core.config import CoordinatorTable, Site
from fedtune.core.config.address import host_and_port
from fedtune.core.errors import ConfigError
from fedtune.flower import enrol, membership
from fedtune.flower.enrol import RENEWED
from fedtune.flower.membership import keys_folder
from fedtune.flower.ports import address_of


@dataclass(frozen=True)
class Link:
    """The settings by which a site reaches its coordinator.

    - name: the site's name
    - host, port: where the coordinator's gateway listens
    - answer: the coordinator's answer, with the consortium's CA and the site's certificate
    - keys: the folder with node.key and tls.key
    - proxy: the address of the hospital's HTTP proxy in site.toml; None for the one that the
      environment names, if any
    - proxy_ca: a file of CAs for the certificate of an https:// proxy; None for the system's CAs
    - own: the folder for the newest certificate, for a process that cannot write to `keys`; None
      for the folder keys/renewed"""

    name: str
    host: str
    port: int
    answer: enrol.Answer
    keys: Path
    proxy: str | None = None
    proxy_ca: Path | None = None
    own: Path | None = None

    @property
    def address(self) -> str:
        return address_of(self.host, self.port)

    @property
    def certificate(self) -> Path:
        """The path of the file that holds the site's newest certificate."""
        return (self.own or self.keys / RENEWED) / "tls.crt"


def link(site: Site, path: Path) -> Link:
    """Collect the settings by which a site reaches its coordinator, mainly from the coordinator's
    answer. The answer is the file that site.toml's [coordinator] table names or, if it names none,
    the one that was stored when the site joined. path: the site file, for the errors' texts.
    Errors: ConfigError, Refused."""
    table = site.coordinator or CoordinatorTable()
    keys = keys_folder(site)
    name = site.site.name
    expected = table.fingerprint or ""
    if table.answer is not None:
        answer = membership.read(table.answer, membership.tls_key(keys), name, expected)
    elif kept := membership.load_answer(keys, name, expected):
        answer = kept
    else:
        membership.tls_key(keys)
        raise ConfigError(
            f"{path}: this site has no answer from a coordinator yet",
            "the file that `fedtune admit` wrote at the coordinator",
            "name that file: `fedtune client SITE --answer FILE`",
        )
    host, port = _address(table.address or answer.address, path)
    return Link(name, host, port, answer, keys, table.proxy, table.proxy_ca)


def _address(text: str, path: Path) -> tuple[str, int]:
    try:
        return host_and_port(text)
    except ValueError:
        raise ConfigError(f"{path}: coordinator.address: not an address", "host:port") from None
