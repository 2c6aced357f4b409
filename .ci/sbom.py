"""The bill of materials of an environment, in CycloneDX JSON, without the paths of the machine it is made on."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def without_local_references(document: dict[str, Any]) -> dict[str, Any]:
    """Where a package was installed from is no reference for anybody else if it is a folder or a file."""
    components = [document["metadata"]["component"], *document["components"]]
    for component in components:
        references = component.get("externalReferences", [])
        kept = [r for r in references if not r["url"].startswith(("file:", "/"))]
        component["externalReferences"] = kept
        if not kept:
            del component["externalReferences"]
    return document


def main(tool: str, python: str, output: Path) -> None:
    arguments = ["environment", "--pyproject", "pyproject.toml", "--output-reproducible"]
    done = subprocess.run(
        [tool, *arguments, "--short-PURLs", "--output-format", "JSON", python],
        check=True,
        capture_output=True,
        text=True,
    )
    document = without_local_references(json.loads(done.stdout))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{output}: {len(document['components'])} components")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
