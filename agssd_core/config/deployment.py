"""Who belongs to a real federation, and where its coordinator is reached."""

import ipaddress
import re
from collections import Counter
from collections.abc import Iterable
from typing import Self

from pydantic import model_validator

from agssd_core.config.federation import Cohort
from agssd_core.config.node import Node, name_problem, require, within

MAX_KEY_DAYS = 90
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"


class AddressConfig(Node):
    """Where sites reach the coordinator.

    Attributes:
        host: DNS name or IPv4 address of the proxy.
        port: its TCP port.
        names: further DNS names and addresses that the certificate shall hold; ``localhost`` and
            127.0.0.1 are always among them, since the engine's own processes dial them.
    """

    host: str
    port: int = 443
    names: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        hosts = [("server.host", self.host), *(("server.names", name) for name in self.names)]
        require(
            [
                *(_host_problem(key, host) for key, host in hosts),
                "server.host is an IPv6 address. Give it a DNS name." if ":" in self.host else "",
                within("server.port", self.port, 1, 65535),
            ]
        )
        return self


class MemberConfig(Node):
    """A hospital and the cohorts that it may take part in."""

    name: str
    cohorts: tuple[Cohort, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            [
                name_problem(self.name),
                "" if self.cohorts else f"site {self.name} has no cohort. Name ct-mr, us or both.",
                _twice(f"cohorts of site {self.name}", self.cohorts),
            ]
        )
        return self


class DeploymentConfig(Node):
    """The content of federation.yaml.

    Attributes:
        name: of the federation.
        key_days: how long a site's keys and the server's certificate live.
    """

    name: str
    server: AddressConfig
    sites: tuple[MemberConfig, ...]
    key_days: int = MAX_KEY_DAYS

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            [
                name_problem(self.name).replace("site name", "name"),
                "" if self.sites else "sites is empty. List at least one.",
                # Names become file names, which some file systems do not tell apart by case.
                _twice("sites", [site.name.casefold() for site in self.sites]),
                within("key_days", self.key_days, 1, MAX_KEY_DAYS),
            ]
        )
        return self

    def cohorts_of(self, site: str) -> tuple[Cohort, ...]:
        """What a site may take part in; nothing if it is no member."""
        return next((member.cohorts for member in self.sites if member.name == site), ())


def _host_problem(key: str, host: str) -> str:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        named = re.fullmatch(rf"{_LABEL}(?:\.{_LABEL})*", host)
        if named and len(host) <= 253 and not host.rpartition(".")[2].isdecimal():
            return ""
        return f"{key} = {host!r} is neither a DNS name nor an address, without port or wildcard."
    return ""


def _twice(what: str, names: Iterable[str]) -> str:
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    return f"{what}: {', '.join(repeated)} stands there twice. Leave one out." if repeated else ""
