"""Debian's package descriptions as a data set for text classification: the label is the section of the package."""

import random
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

SECTIONS, CAP = 32, 700
FEWEST_STANZAS = 20_000


class Package(NamedTuple):
    """One package: what is classified (`text`), its label (`section`) and whose row it is (`maintainer`)."""

    section: str
    text: str
    maintainer: str


def available() -> list[Package]:
    """Every package of the release whose description no other package has (the first by section and text stays).

    Without the updates to it, which come every few days: results are compared over months.
    """
    try:
        targets = _output("apt-get", "indextargets", "--format", "$(SUITE) $(FILENAME)", "Created-By: Packages")
        lists = [path for suite, path in map(str.split, targets.splitlines()) if "-" not in suite]
        listing = "\n\n".join(_output("/usr/lib/apt/apt-helper", "cat-file", path) for path in sorted(lists))
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError("this benchmark reads the package lists of apt: it needs Debian (or a relative)") from error
    found = list(_parse(listing))
    if len(found) < FEWEST_STANZAS:
        raise RuntimeError(f"apt knows only {len(found)} packages: run `apt-get update` first, then this again")
    return list({package.text: package for package in sorted(found, reverse=True)}.values())[::-1]


def sample(sections: int = SECTIONS, cap: int = CAP, seed: int = 0) -> list[Package]:
    """The largest sections, at most `cap` packages from each, drawn with `seed`."""
    by_section: defaultdict[str, list[Package]] = defaultdict(list)
    for package in available():
        by_section[package.section].append(package)
    largest = sorted(by_section, key=lambda name: (-len(by_section[name]), name))[:sections]
    draw = random.Random(seed)
    return [package for name in sorted(largest) for package in _at_most(cap, sorted(by_section[name]), draw)]


def _at_most(cap: int, packages: list[Package], draw: random.Random) -> list[Package]:
    return packages if len(packages) <= cap else draw.sample(packages, cap)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout


def _parse(listing: str) -> Iterator[Package]:
    """Only the first line of a description is read: the long one depends on how apt is set up."""
    for stanza in listing.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line and not line.startswith(" "))
        text = fields.get("Description") or fields.get("Description-en")
        if text and "Section" in fields:
            yield Package(fields["Section"].rsplit("/", 1)[-1], text.strip(), fields.get("Maintainer", "").strip())
