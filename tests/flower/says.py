"""Says what a child found where; run by test_boot.py."""

import secrets
import sys
import sysconfig

import fedtune
from fedtune.core import boot

print(secrets.__file__)
print(fedtune.__file__)
behind = sys.path.index(boot.PACKAGES) > sys.path.index(sysconfig.get_path("stdlib"))
print("standard library first" if behind else sys.path)
