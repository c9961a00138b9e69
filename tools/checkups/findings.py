"""What was looked at, what was found there, and what to do about it; as text, and without secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL|AUTH|COOKIE", re.IGNORECASE)
LOGIN = re.compile(r"(?<=://)[^/\s@]+(?=@)")  # user:password@ of a URL
HIDDEN = "(redacted)"
ALL = ""  # the "host" of what concerns all of them together
SHORTEST = 6  # characters; what is shorter stands in many texts by chance


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report. With a remedy it is a warning, or a failure."""

    section: str
    name: str
    text: str
    remedy: str = ""
    failed: bool = False
    value: Any = None  # the same in numbers, for JSON

    def __post_init__(self) -> None:
        assert self.remedy or not self.failed, f"{self.name} fails without a remedy"

    @property
    def verdict(self) -> str:
        return "failed" if self.failed else "warning" if self.remedy else "ok"


def without_secrets(
    findings: Sequence[Finding], environment: Mapping[str, str] = os.environ
) -> list[Finding]:
    """The findings, with the values of secret variables hidden wherever they stand, and logins in URLs."""
    values = [v for name, v in environment.items() if SECRET.search(name) and len(v) >= SHORTEST]

    def clean(text: str) -> str:
        for value in sorted(values, key=len, reverse=True):
            text = text.replace(value, HIDDEN)
        return LOGIN.sub(HIDDEN, text)

    return [replace(f, text=clean(f.text), remedy=clean(f.remedy)) for f in findings]


def as_json(by_host: Mapping[str, Sequence[Finding]]) -> dict[str, Any]:
    """One object; `healthy` is false when something failed."""
    return {
        "healthy": not any(f.failed for findings in by_host.values() for f in findings),
        "hosts": [host for host in by_host if host != ALL],
        "findings": [
            {
                "host": host,
                "section": f.section,
                "name": f.name,
                "verdict": f.verdict,
                "text": f.text,
                "remedy": f.remedy,
                "value": f.value,
            }
            for host, findings in by_host.items()
            for f in findings
        ],
    }


def as_text(by_host: Mapping[str, Sequence[Finding]]) -> str:
    """The report for people: by section and name; what hosts have in common stands there once."""
    hosts_of: dict[Finding, list[str]] = {}
    for host, findings in by_host.items():
        for finding in findings:
            hosts_of.setdefault(replace(finding, value=None), []).append(host)
    num_hosts, sections = len(set(by_host) - {ALL}), dict[str, dict[str, list[Finding]]]()
    for f in hosts_of:
        sections.setdefault(f.section, {}).setdefault(f.name, []).append(f)
    lines = []
    for section, by_name in sections.items():
        lines.append(section)
        for f in chain.from_iterable(by_name.values()):
            hosts = hosts_of[f]
            where = "" if hosts == [ALL] or len(hosts) == num_hosts else f"[{', '.join(hosts)}] "
            lines.append(_indented(f"  {f.verdict:<8} {f.name:<24} ", where + f.text))
            if f.remedy:
                lines.append(_indented(" " * 11 + "-> ", f.remedy))
    verdicts = [f.verdict for f in hosts_of]
    lines.append(f"{verdicts.count('failed')} failed, {verdicts.count('warning')} warnings")
    return "\n".join(lines)


def _indented(first: str, text: str) -> str:
    return first + text.replace("\n", "\n" + " " * len(first))
