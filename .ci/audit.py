"""What `pip-audit` found, said so that nothing is taken for audited that was not looked up.

pip-audit itself calls an environment clean of which it could look up no package, as where its database is out of reach.
"""

import json
import sys
from pathlib import Path


def verdict(report: str) -> tuple[int, list[str]]:
    """Exit status and lines for a JSON report of pip-audit; "" where it wrote none."""
    try:
        packages = json.loads(report)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return 0, ["NOT AUDITED: the advisory database could not be reached"]
    skipped = [package for package in packages if "skip_reason" in package]
    audited = [package for package in packages if "skip_reason" not in package]
    lines = [
        f"{package['name']} {package['version']}: {advisory['id']}, fixed in "
        f"{', '.join(advisory['fix_versions']) or 'no version yet'}"
        for package in audited
        for advisory in package["vulns"]
    ]
    found = len(lines)
    if not audited:
        lines.append(
            f"NOT AUDITED: the advisory database knows none of {len(skipped)} packages here"
        )
    else:
        lines.append(f"audited {len(audited)} packages: {found} known vulnerabilities")
        if skipped:
            names = ", ".join(sorted(package["name"] for package in skipped))
            lines.append(f"NOT AUDITED, {len(skipped)} packages: {names}")
    return int(found > 0), lines


if __name__ == "__main__":
    path = Path(sys.argv[1])
    status, said = verdict(path.read_text() if path.is_file() else "")
    print("\n".join(said))
    sys.exit(status)
