"""Whether a tag can be released: it is the version, which the changelog's newest heading and CITATION.cff have, too.

python scripts/check_release.py v0.1.0 --repository https://github.com/OWNER/NAME
"""

import argparse
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def problems(tag: str, repository: str | None = None, root: Path = ROOT) -> list[str]:
    """What speaks against a release of this tag; repository: its address, which the project's URLs must have."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    version, found = project["version"], []
    if tag != f"v{version}":
        found.append(f"the tag is {tag}, and pyproject.toml's version {version}: it would have to be v{version}")
    headings = re.findall(r"^## (.+)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    newest = headings[0] if headings else "(none)"
    if not re.fullmatch(rf"{re.escape(version)} \(\d{{4}}-\d\d-\d\d\)", newest):
        found.append(f"CHANGELOG.md's newest heading is {newest!r}; it must be '{version} (YYYY-MM-DD)'")
    if f"\nversion: {version}\n" not in (root / "CITATION.cff").read_text():
        found.append(f"CITATION.cff has another version than {version}")
    given = project.get("urls", {}).get("Repository")
    if repository and given != repository:
        found.append(f"project.urls.Repository of pyproject.toml is {given}; it must be {repository}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tag")
    parser.add_argument("--repository", metavar="URL")
    args = parser.parse_args()
    found = problems(args.tag, args.repository)
    print("\n".join(found) or f"{args.tag} can be released")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
